"""What the same hour brought on other days and weeks, remembered in a few kilobytes.

One mean rate per hour of the week. It raises the forecast only where the coming hour is known to
bring more than the present one, by the ratio of the two and not by their absolute size: traffic
grows, its shape stays. It never lowers what is asked now.
"""

from __future__ import annotations

import json
import math

HOURS = 168
SMOOTHING = 0.3  # of one hour's mean into the remembered one, once a week
MOST_RATIO = 4.0
LEAST_RATE = 1e-3


class HourlyRates:
    """Mean requests per second of each hour of the week (UTC)."""

    def __init__(self) -> None:
        self._rates: list[float | None] = [None] * HOURS
        self._hour: int | None = None
        self._sum = 0.0
        self._num = 0

    def observe(self, now_s: float, rate: float) -> None:
        """Take a reading; clock in seconds since the epoch."""
        hour = _hour(now_s)
        if hour != self._hour:
            self._close()
            self._hour = hour
        if math.isfinite(rate) and rate >= 0.0:
            self._sum += rate
            self._num += 1

    def _close(self) -> None:
        if self._hour is not None and self._num:
            mean = self._sum / self._num
            before = self._rates[self._hour]
            self._rates[self._hour] = (
                mean if before is None else before + SMOOTHING * (mean - before)
            )
        self._sum, self._num = 0.0, 0

    def of(self, now_s: float) -> float | None:
        """What this hour of the week brought before; yesterday's same hour stands in."""
        hour = _hour(now_s)
        for known in (hour, (hour - 24) % HOURS):
            rate = self._rates[known]
            if rate is not None:
                return rate
        return None

    def ahead(self, now_s: float, current: float, horizon_s: float) -> float:
        """The present rate, grown as this part of the week grows; 0 where nothing is known."""
        # Half an hour either way, so that the change of the hour is a slope and not a step.
        here = _between(self, now_s)
        soon = _between(self, now_s + horizon_s)
        if here is None or soon is None or here < LEAST_RATE or soon <= here:
            return 0.0
        return current * min(MOST_RATIO, soon / here)

    def as_json(self) -> str:
        """For a ConfigMap; at most two kilobytes."""
        return json.dumps([None if rate is None else float(f"{rate:.4g}") for rate in self._rates])

    @classmethod
    def parse(cls, text: str) -> HourlyRates:
        """What `as_json` wrote; anything else reads as nothing known."""
        found = cls()
        try:
            rates = json.loads(text, parse_int=float)
        except ValueError:
            return found
        if isinstance(rates, list) and len(rates) == HOURS:
            found._rates = [
                float(rate)
                if isinstance(rate, int | float) and math.isfinite(rate) and rate >= 0.0
                else None
                for rate in rates
            ]
        return found


def _hour(now_s: float) -> int:
    # The epoch began on a Thursday: hour 0 here is Thursday 00:00 UTC.
    return int(now_s // 3600.0) % HOURS


def _between(rates: HourlyRates, now_s: float) -> float | None:
    """Between the middles of two hours."""
    middle = now_s - 1800.0
    first, second = rates.of(middle), rates.of(middle + 3600.0)
    if first is None or second is None:
        return None
    part = (middle % 3600.0) / 3600.0
    return (1.0 - part) * first + part * second
