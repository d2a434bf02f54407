"""What ends a command with a sentence instead of a trace."""

from __future__ import annotations


class CommandError(Exception):
    """A command failed; the message is what the user sees."""
