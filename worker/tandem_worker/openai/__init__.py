"""OpenAI's wire at a worker: what a body may hold, what a reply looks like."""
