"""Virtual time: events in order, ties in the order in which they were made."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class VirtualClock:
    """Runs callbacks at their time; nothing else moves the clock. Seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self._made = 0

    def __call__(self) -> float:
        return self.now

    def at(self, when: float, act: Callable[..., Any], *args: Any) -> None:
        """Run act(*args) at a time; one that has passed counts as now."""
        self._made += 1
        heapq.heappush(self._events, (max(when, self.now), self._made, act, args))

    def after(self, delay: float, act: Callable[..., Any], *args: Any) -> None:
        """Run act(*args) so many seconds from now."""
        self.at(self.now + delay, act, *args)

    @property
    def next_at(self) -> float | None:
        """When the next event is due; None when there is none."""
        return self._events[0][0] if self._events else None

    def run(self, until: float = float("inf")) -> None:
        """Run every event that is due up to a time, those made meanwhile included."""
        events = self._events
        while events and events[0][0] <= until:
            when, _, act, args = heapq.heappop(events)
            self.now = when
            act(*args)
