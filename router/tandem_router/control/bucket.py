"""The hard stop on spend: a token bucket of dollars with reservations.

Over any interval of length d, settled spend is at most `capacity + rate*d`, provided that no
answer costs more than was reserved for it. An answer that does overrun leaves a debt, which
closes the bucket until it is refilled.
"""

from __future__ import annotations

import math


class TokenBucket:
    """Dollars that may be spent now, refilled at the budget's rate.

    Args:
        usd_per_s: refill rate, the budget.
        capacity_usd: most that may pile up while traffic is slow.
        now: clock reading of the caller, seconds.
        level_usd: initial level; default half full, the level that pacing aims at.
    """

    def __init__(
        self,
        usd_per_s: float,
        capacity_usd: float,
        now: float,
        level_usd: float | None = None,
    ) -> None:
        if not (usd_per_s > 0.0 and math.isfinite(usd_per_s)):
            raise ValueError(f"usd_per_s={usd_per_s} must be a positive number of dollars a second")
        if not (capacity_usd > 0.0 and math.isfinite(capacity_usd)):
            raise ValueError(f"capacity_usd={capacity_usd} must be a positive number of dollars")
        self.usd_per_s = usd_per_s
        self.capacity_usd = capacity_usd
        self._level = capacity_usd / 2 if level_usd is None else min(level_usd, capacity_usd)
        self._reserved = 0.0
        self._now = now

    def remaining_usd(self, now: float) -> float:
        """What a new reservation may take; reservations already made are deducted."""
        self._refill(now)
        return self._level - self._reserved

    def balance_usd(self, now: float) -> float:
        """Refilled less settled spend, reservations not deducted; negative is debt."""
        self._refill(now)
        return self._level

    def reserve(self, now: float, usd: float) -> bool:
        """Set `usd` aside; False, and nothing changes, when it is not there."""
        if not usd <= self.remaining_usd(now):
            return False
        self._reserved += max(0.0, usd)
        return True

    def change(self, now: float, reserved_usd: float, usd: float) -> bool:
        """Replace a reservation; False, and nothing changes, when the difference is not there."""
        old, new = max(0.0, reserved_usd), max(0.0, usd)
        if not (new <= old or new <= self.remaining_usd(now) + old):
            return False
        self._reserved = max(0.0, self._reserved + new - old)
        return True

    def settle(self, now: float, reserved_usd: float, actual_usd: float) -> None:
        """Replace a reservation by what the answer really cost."""
        self._refill(now)
        self._reserved = max(0.0, self._reserved - max(0.0, reserved_usd))
        self._level -= max(0.0, actual_usd) if math.isfinite(actual_usd) else reserved_usd

    def _refill(self, now: float) -> None:
        elapsed = max(0.0, now - self._now)  # a clock that steps back refills nothing
        self._now = max(self._now, now)
        self._level = min(self.capacity_usd, self._level + elapsed * self.usd_per_s)
