"""The router: one OpenAI-compatible endpoint in front of a small and a large model."""
