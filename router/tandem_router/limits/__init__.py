"""What tenants and the router may use, set aside before and settled after, and what it costs."""
