"""Local mode: an in-process cluster that runs the same plans as Kubernetes, as local processes."""
