"""How a model family writes tool calls and thoughts, and how an answer's text is read."""
