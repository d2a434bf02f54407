"""The demonstration: a graded question suite and the run that routes it."""
