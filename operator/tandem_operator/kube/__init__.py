"""Kubernetes: the operator's client, its caches, leader election and main loop."""
