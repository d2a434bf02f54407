"""Which worker of a tier: discovery, health, prefix affinity, load."""
