"""What the load will be when a worker started now is ready.

Holt's linear method on irregular samples, plus the size of its own past errors as a margin, so
that a changeful load is provisioned for its upper side and a steady one is not. What chance alone
does to a count of arrivals in a few seconds is no error of the forecast, and sizing has room for
it: only the rest counts. A missing sample changes nothing: the forecast holds.
"""

from __future__ import annotations

import math


class RateForecast:
    """Forecasts one non-negative rate.

    Args:
        horizon_s: how far ahead, the time a worker takes to start.
        level_s: time constant of the level.
        trend_s: time constant of the trend; longer, because a trend seen in noise overshoots.
        margin: standard deviations of past forecast errors that are added.
    """

    def __init__(
        self,
        horizon_s: float = 60.0,
        *,
        level_s: float = 30.0,
        trend_s: float = 120.0,
        margin: float = 1.0,
    ) -> None:
        for name, value in (("horizon_s", horizon_s), ("level_s", level_s), ("trend_s", trend_s)):
            if not (value > 0.0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be a positive number of seconds")
        self.horizon_s = horizon_s
        self.level_s = level_s
        self.trend_s = trend_s
        self.margin = margin
        self._level: float | None = None
        self._trend = 0.0
        self._variance = 0.0
        self._chance = 0.0
        self._now = 0.0

    def observe(self, now: float, rate: float | None) -> None:
        """Take a sample; None, NaN, negative and out-of-order samples are ignored."""
        if rate is None or not math.isfinite(rate) or rate < 0.0:
            return
        if self._level is None:
            self._level, self._now = rate, now
            return
        elapsed = now - self._now
        if elapsed <= 0.0:
            return
        expected = self._level + self._trend * elapsed
        error = rate - expected
        weight = 1.0 - math.exp(-elapsed / self.level_s)
        level = expected + weight * error
        slow = 1.0 - math.exp(-elapsed / self.trend_s)
        self._trend += slow * ((level - self._level) / elapsed - self._trend)
        self._variance += slow * (error * error - self._variance)
        # A Poisson count of rate * elapsed has that variance.
        self._chance += slow * (level / elapsed - self._chance)
        self._level, self._now = level, now

    def predict(self) -> float | None:
        """Upper forecast at the horizon; None before the first sample."""
        if self._level is None:
            return None
        ahead = self._level + max(0.0, self._trend) * self.horizon_s
        # The level itself is a mean of what came within its time constant.
        unsure = max(0.0, self._variance - self._chance) + self._level / (2.0 * self.level_s)
        return max(0.0, ahead + self.margin * math.sqrt(unsure))
