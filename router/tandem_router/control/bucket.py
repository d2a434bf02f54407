"""The one bucket of everything that refills with time: dollars, tokens, requests.

What was ever granted is spent, held or left: `granted = spent + held + left`, always. Over any
interval of length d, settled spend is at most `capacity + per_s*d`, provided that nothing costs
more than was held for it. What does overrun leaves a debt, which closes the bucket until it is
refilled.
"""

from __future__ import annotations

import math


class Bucket:
    """An amount that may be used now, refilled at a rate; holds are deducted before use.

    Args:
        per_s: refill rate in units a second; 0 where only `grant` fills it.
        capacity: most that may pile up while nothing is used, in units.
        now: clock reading of the caller, seconds.
        level: what is there at first; default all of the capacity.
    """

    __slots__ = (
        "_now",
        "capacity",
        "granted",
        "held",
        "leased",
        "missed",
        "pace_goal",
        "pace_per_s",
        "per_s",
        "spent",
    )

    def __init__(
        self, per_s: float, capacity: float, now: float, level: float | None = None
    ) -> None:
        _check(per_s, capacity)
        self.per_s = per_s
        self.capacity = capacity
        self.leased = False  # filled by `grant` alone
        self.missed = 0.0  # the most that was wanted and not there since it was last looked at
        # What pacing aims at: this much use, and half full, room for an error either way.
        self.pace_per_s, self.pace_goal = per_s, capacity / 2
        self.granted = capacity if level is None else min(level, capacity)
        self.spent = 0.0
        self.held = 0.0
        self._now = now

    def left(self, now: float) -> float:
        """What a new hold may take; negative is debt."""
        self._refill(now)
        return self.granted - self.spent - self.held

    def balance(self, now: float) -> float:
        """Granted less spent, holds not deducted; negative is debt."""
        self._refill(now)
        return self.granted - self.spent

    def hold(self, now: float, amount: float, *, overdraw: bool = False) -> bool:
        """Set `amount` aside; False, and nothing changes, when it is not there.

        overdraw: a full bucket admits more than it can ever hold, and owes the rest. A request
        larger than one minute's allowance then waits for the full minute, not for ever.
        """
        wanted = min(amount, self.capacity) if overdraw else amount
        short = self._short_of(now, wanted)
        if not short <= 0.0:
            self.missed = max(self.missed, short)
            return False
        self.held += max(0.0, amount)
        return True

    def change(self, now: float, held: float, amount: float) -> bool:
        """Hold `amount` instead of `held`; False, and nothing changes, when it is not there."""
        if not (amount <= held or self.hold(now, amount - held)):
            return False
        if amount <= held:
            self.held = max(0.0, self.held + max(0.0, amount) - held)
        return True

    def settle(self, now: float, held: float, used: float) -> None:
        """Replace a hold by what was really used; a senseless number uses what was held."""
        self._refill(now)
        self.held = max(0.0, self.held - max(0.0, held))
        self.spent += max(0.0, used if math.isfinite(used) else held)

    def give_back(self, amount: float) -> None:
        """Unspend what was settled a moment ago and not used after all."""
        self.spent = max(0.0, self.spent - amount)

    def wait_s(self, now: float, amount: float, *, overdraw: bool = False) -> float | None:
        """Seconds until `amount` can be held if nothing else is; None: never."""
        wanted = min(amount, self.capacity) if overdraw else amount
        missing = self._short_of(now, wanted)
        if missing <= 0.0:
            return 0.0
        if self.pace_per_s <= 0.0 or wanted > self.capacity:
            return None
        if self.leased:
            self.missed = max(self.missed, missing)
        return missing / self.pace_per_s

    def grant(self, amount: float) -> None:
        """Add what was leased from elsewhere; negative hands back."""
        self.granted += amount

    def set_rate(self, now: float, per_s: float, capacity: float) -> None:
        """Refill at another rate from now on; what is spent, held and owed stays."""
        _check(per_s, capacity)
        self._refill(now)
        self.per_s, self.capacity, self.leased = per_s, capacity, False
        self.pace_per_s, self.pace_goal = per_s, capacity / 2
        self.granted = min(self.granted, self.spent + capacity)

    def lease_only(
        self, now: float, granted: float, capacity: float, pace_per_s: float, pace_goal: float
    ) -> None:
        """Be filled by `grant` alone from now on, as if only `granted` had been so far."""
        self._refill(now)
        self.per_s, self.capacity, self.leased = 0.0, capacity, True
        self.pace_per_s, self.pace_goal = pace_per_s, pace_goal
        self.granted = granted

    def _short_of(self, now: float, wanted: float) -> float:
        """What is missing of `wanted`; a rounding error is not.

        What was just given back can be taken again, and whoever waited as long as told gets it.
        """
        return wanted - self.left(now) - 1e-12 * max(1.0, self.granted)

    def _refill(self, now: float) -> None:
        elapsed = max(0.0, now - self._now)  # a clock that steps back refills nothing
        self._now = max(self._now, now)
        room = self.capacity - (self.granted - self.spent)
        self.granted += max(0.0, min(room, elapsed * self.per_s))


def budget_bucket(usd_per_hour: float, now: float, burst_s: float = 300.0) -> Bucket:
    """Dollars of an hourly budget: `burst_s` of it may pile up, half of that is there at first.

    Half full is the level that pacing aims at.
    """
    rate = usd_per_hour / 3600.0
    return Bucket(rate, rate * burst_s, now, level=rate * burst_s / 2)


def _check(per_s: float, capacity: float) -> None:
    if not (per_s >= 0.0 and math.isfinite(per_s)):
        raise ValueError(f"per_s={per_s} must be a number of units a second, 0 or more")
    if not (capacity >= 0.0 and math.isfinite(capacity)):
        raise ValueError(f"capacity={capacity} must be a number of units, 0 or more")
