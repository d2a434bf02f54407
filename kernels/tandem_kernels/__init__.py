"""Triton operations, each with its torch reference."""
