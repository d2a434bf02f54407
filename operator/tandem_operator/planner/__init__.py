"""What to run: layouts, replicas and threshold searched by formula first, then by simulation."""
