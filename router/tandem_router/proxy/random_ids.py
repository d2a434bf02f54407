"""Ids and seeds from the system's randomness, asked for a few thousand bytes at a time.

A call of the system for each id costs more than the id; nobody can tell the difference.
"""

from __future__ import annotations

import os

_POOL_BYTES = 4096


class RandomPool:
    """Random hexadecimal digits, none of them given out twice."""

    def __init__(self) -> None:
        self._digits = ""
        self._at = 0

    def digits(self, number: int) -> str:
        """So many of them, at most 8,192."""
        at = self._at
        end = at + number
        if end > len(self._digits):
            self._digits = os.urandom(_POOL_BYTES).hex()
            at, end = 0, number
        self._at = end
        return self._digits[at:end]


_pool = RandomPool()


def new_request_id() -> str:
    """128 bits as 32 digits."""
    return _pool.digits(32)


def seed_of(request_id: str) -> int:
    """63 bits, the same at every worker that has the request."""
    return int(request_id[:16], 16) >> 1
