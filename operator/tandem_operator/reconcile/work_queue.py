"""Which resources to reconcile next: each at most once at a time, failures later and later.

After a pass a resource rests for a moment, so that the many events of its own writes and of its
pods make one pass instead of ten.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tandem_operator.reconcile.requeue import Appointments, Key

FIRST_DELAY_S, MAX_DELAY_S = 0.5, 60.0
REST_S = 0.5


class WorkQueue:
    """A set of keys with an order. A key added while it is worked on or rests comes again."""

    def __init__(
        self, call_later: Callable[..., Any], clock: Callable[[], float], rest_s: float = REST_S
    ) -> None:
        self._waiting: dict[Key, None] = {}
        self._working: set[Key] = set()
        self._resting: set[Key] = set()
        self._again: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._retries = Appointments(self.add, call_later, clock)
        self._looks = Appointments(self.add, call_later, clock)
        self._call_later = call_later
        self._rest_s = rest_s
        self._ready = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._working) + len(self._again - self._working)

    def add(self, key: Key) -> None:
        """Reconcile this resource soon."""
        if key in self._working or key in self._resting:
            self._again.add(key)
            return
        self._waiting[key] = None
        self._ready.set()

    def add_later(self, key: Key, delay_s: float) -> None:
        """Reconcile this resource after a while, or sooner where that was asked for."""
        self._looks.within(key, delay_s)

    def cancel_timers(self) -> None:
        """Forget every retry and every later look."""
        self._retries.cancel_all()
        self._looks.cancel_all()

    async def take(self) -> Key:
        """The next resource; tell done or failed afterwards."""
        while not self._waiting:
            self._ready.clear()
            await self._ready.wait()
        key = next(iter(self._waiting))
        del self._waiting[key]
        self._working.add(key)
        return key

    def done(self, key: Key) -> None:
        """The pass went well."""
        self._failures.pop(key, None)
        self._retries.cancel(key)
        self._finish(key)

    def failed(self, key: Key) -> float:
        """The pass failed; it is tried again within the returned number of seconds.

        A failure before the next try is due was provoked by an event and makes the wait no longer:
        else the events of one bad moment would add up to a minute of waiting.
        """
        failures = self._failures.get(key, 0)
        if key not in self._retries:
            failures += 1
        delay = min(FIRST_DELAY_S * 2.0 ** min(failures - 1, 16), MAX_DELAY_S)
        self._failures[key] = failures
        self._finish(key)
        self._retries.within(key, delay)
        return delay

    def _finish(self, key: Key) -> None:
        self._working.discard(key)
        self._resting.add(key)
        self._call_later(self._rest_s, self._rested, key)

    def _rested(self, key: Key) -> None:
        self._resting.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)
