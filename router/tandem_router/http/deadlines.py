"""One timer for all replies that are waited for: it wakes when the first of them may be late.

A timer of its own for each reply costs more than reading it, and nearly all are cancelled unused.
"""

from __future__ import annotations

import asyncio
import math
from typing import Protocol


class Watched(Protocol):
    def due(self, now: float) -> float:
        """When it may be late, after `now`; infinity where it is, and has been failed."""
        ...


class Deadlines:
    """The watched replies of one event loop; each is looked at when it may be late, not before."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watched: set[Watched] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = math.inf

    def __len__(self) -> int:
        return len(self._watched)

    def watch(self, one: Watched, at: float) -> None:
        """Look at it at `at`, in loop time, or earlier."""
        self._watched.add(one)
        if at < self._wakes_at:
            self._wake_at(at)

    def forget(self, one: Watched) -> None:
        self._watched.discard(one)

    def _wake_at(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._wakes_at = at
        self._timer = self._loop.call_at(at, self._look)

    def _look(self) -> None:
        self._timer, self._wakes_at = None, math.inf
        now = self._loop.time()
        soonest = min([one.due(now) for one in tuple(self._watched)], default=math.inf)
        if soonest < self._wakes_at:
            self._wake_at(soonest)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._wakes_at = None, math.inf
