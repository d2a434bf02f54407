"""From graded rows to an artifact."""
