"""The engine: steps of a mixed batch in a thread of its own."""
