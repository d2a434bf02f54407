"""What operators of a router see of it: metrics, and of single requests traces and log lines."""
