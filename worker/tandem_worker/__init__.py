"""One worker: a model, its KV blocks, a scheduler and an OpenAI-compatible server."""
