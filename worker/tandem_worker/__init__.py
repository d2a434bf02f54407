"""The inference engine: prefill, decode and unified workers."""
