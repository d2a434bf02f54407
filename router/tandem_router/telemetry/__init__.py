"""What operators of a router see of single requests: traces and log lines."""
