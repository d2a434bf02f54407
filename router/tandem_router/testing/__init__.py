"""Stand-ins for what a router talks to: a worker, a provider, a client; for tests and examples."""
