"""Whose request goes first at an engine that knows no tenants: of who has fewer under way.

Such an engine orders its queue by a number, lower first. A tenant that floods it waits behind its
own flood, and not everybody else with it. Our workers are told the tenant and share themselves
(`tandem_worker/scheduling/tenants.py`). Pure.
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
