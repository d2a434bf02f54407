"""The most that learning may cost in a day: held before it is spent, so that it is never passed.

Pure. Days are UTC. Several routers have an equal part of the cap each.
"""

from __future__ import annotations

import math


class DailyCap:
    """daily_usd: this router's part. Whatever is under way at midnight counts for its first day."""

    def __init__(self, daily_usd: float) -> None:
        self.daily_usd = daily_usd
        self._spent: dict[str, float] = {}
        self._held: dict[str, float] = {}

    def spent(self, day: str) -> float:
        return self._spent.get(day, 0.0)

    def restore(self, day: str, usd: float) -> None:
        """What an earlier process spent."""
        self._spent[day] = self.spent(day) + usd

    def left(self, day: str) -> float:
        return self.daily_usd - self.spent(day) - self._held.get(day, 0.0)

    def hold(self, day: str, usd: float) -> bool:
        """Set aside; False, and nothing changes, where it is not there."""
        if not usd <= self.left(day) + 1e-12:
            return False
        self._held[day] = self._held.get(day, 0.0) + usd
        if len(self._spent) > 8:
            self._spent = {key: usd for key, usd in self._spent.items() if key >= day}
        return True

    def settle(self, day: str, held: float, used: float) -> None:
        """Replace what was held by what was used; a senseless number uses what was held."""
        self._held[day] = max(0.0, self._held.get(day, 0.0) - held)
        if self._held[day] <= 1e-15:
            del self._held[day]
        self._spent[day] = self.spent(day) + (max(0.0, used) if math.isfinite(used) else held)
