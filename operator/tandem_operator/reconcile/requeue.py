"""When to look at a resource again without any event: at the soonest time that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tandem_operator.reconcile.reconciler import Key


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
