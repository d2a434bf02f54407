"""The OpenAI-compatible HTTP server and the worker-to-worker routes."""
