"""Graded answers without writing code: ask every tier, grade, and say what the grades mean.

``tandem grade`` makes the rows that ``tandem train`` reads, ``tandem verify`` says what a running
Router delivered. The graders (:mod:`.graders`) are pure and need no HTTP client.
"""
