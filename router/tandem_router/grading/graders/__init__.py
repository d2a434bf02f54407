"""How an answer becomes a grade from 0 to 1: by a reference, a judge, or the user's own command.

`reference`, `judge` and `agreement` are pure; `command` runs a process that the user named.
"""
