"""Worlds, rivals and traffic of benchmarks/autoscaling.py."""
