"""What outlives a router process: spend, decisions, keys, labels; kept off the hot path."""
