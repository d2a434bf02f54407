"""OpenAI's wire: bodies, events, the Responses API."""
