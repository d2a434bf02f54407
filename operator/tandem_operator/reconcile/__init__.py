"""observe, plan, apply: one pass of a custom resource, and when the next one is due."""
