"""Reconciles Tandem's custom resources, runs them locally, and holds the tandem command."""
