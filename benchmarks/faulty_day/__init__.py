"""A day of random faults: what breaks and when, who answers and asks, whose books are right."""
