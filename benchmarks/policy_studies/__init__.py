"""The studies of `benchmarks/policy.py`, one a module, on streams of real outcomes."""
