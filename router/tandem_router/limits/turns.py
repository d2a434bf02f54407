"""Whose request goes first at a worker: that of the tenant with fewer of them under way.

Workers order their queues by a number, lower first. A tenant that floods one waits behind its own
flood, and not everybody else with it. Pure.
"""

from __future__ import annotations

# So many requests of one tenant are ordered among themselves as the worker's scheduler likes.
REQUESTS_PER_TURN = 16
LAST = 100


def turn(asked: int | None, num_inflight: int) -> int | None:
    """The priority of a request; asked: by its client. None where nothing sets it apart."""
    behind = max(0, num_inflight - 1) // REQUESTS_PER_TURN
    if asked is None and not behind:
        return None
    return min(LAST, (asked or 0) + behind)
