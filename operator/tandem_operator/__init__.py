"""Tandem's operator: custom resources in, running workers and routers out."""
