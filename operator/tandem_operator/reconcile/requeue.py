"""Names of resources, and when to look at one again: at the soonest time that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# How long router pods may take to read a new artifact; they look every two seconds.
SETTLE_S = 5.0


@dataclass(frozen=True)
class Key:
    """Names one resource."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind.lower()}/{self.name}"


@dataclass
class Result:
    """What a pass did: number of writes, and when to look again without any event."""

    writes: int = 0
    again_s: float | None = None

    def look_again(self, within_s: float) -> None:
        """Ask for a pass within this time; the soonest that anyone asks for counts."""
        self.again_s = within_s if self.again_s is None else min(self.again_s, within_s)


class Appointments:
    """One appointment per resource.

    due: called with the resource when its time has come. call_later: calls a function with
    arguments after some seconds and gives a handle with `cancel()`. clock: in the same seconds.
    """

    def __init__(
        self,
        due: Callable[[Key], None],
        call_later: Callable[..., Any],
        clock: Callable[[], float],
    ) -> None:
        self._due = due
        self._call_later = call_later
        self._clock = clock
        self._timers: dict[Key, tuple[float, Any]] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._timers

    def within(self, key: Key, delay_s: float) -> None:
        """See to it that the resource is due no later than this; a sooner appointment stays."""
        at = self._clock() + delay_s
        if key in self._timers:
            if self._timers[key][0] <= at:
                return
            self.cancel(key)
        self._timers[key] = (at, self._call_later(delay_s, self._come, key))

    def cancel(self, key: Key) -> None:
        """Forget the resource's appointment, if there is one."""
        if (timer := self._timers.pop(key, None)) is not None:
            timer[1].cancel()

    def cancel_all(self) -> None:
        """Forget every appointment."""
        for key in list(self._timers):
            self.cancel(key)

    def _come(self, key: Key) -> None:
        self._timers.pop(key, None)
        self._due(key)
