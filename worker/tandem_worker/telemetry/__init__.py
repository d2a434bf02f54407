"""What operators of a worker see beside its metrics: traces and log lines."""
