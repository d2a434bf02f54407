"""What is asked now and soon: forecast, backlog, seasons, and which tier has fallen asleep.

The forecast smooths noise; a burst far above it that chance does not bring is believed at once,
and two silent readings end it: workers for a forecast of traffic long gone help nobody. What waits
already (held at routers, queued at workers) has to be worked off within `DRAIN_S` beside what
arrives.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from tandem_operator.autoscale.forecast import RateForecast
from tandem_operator.autoscale.profile import Load
from tandem_operator.autoscale.seasons import HourlyRates

BURST_OVER_FORECAST = 1.5
# Arrivals above the forecast, in standard deviations of a Poisson count, that are no chance.
BURST_DEVIATIONS = 3.0
DRAIN_S = 60.0
SILENT_READINGS = 2


class Demand:
    """The memory of one Router's traffic.

    Args:
        horizon_s: Time a worker takes to start.
        idle_after_s: A tier that nobody asked for so long may sleep; None: never.
        hourly: What was learnt of the week before.
    """

    def __init__(
        self, horizon_s: float, idle_after_s: float | None, hourly: HourlyRates | None = None
    ) -> None:
        self.idle_after_s = idle_after_s
        self.horizon_s = horizon_s
        self.hourly = hourly or HourlyRates()
        self._forecast = RateForecast(horizon_s)
        self._num_silent = 0
        self._read_s: float | None = None
        self._elapsed_s = 0.0
        self._busy_at: dict[str, float] = {}

    def observe(
        self,
        now: float,
        load: Load,
        asked: Collection[str] | None,
        awake: Collection[str],
        tiers: Collection[str],
    ) -> None:
        """Take a reading.

        Args:
            now: Clock, seconds since the epoch.
            asked: Tiers that somebody wanted since the last reading or waits for; None: unknown,
                any traffic counts for every tier.
            awake: Tiers that have workers.
            tiers: All of them. A loop that finds a tier empty lets it sleep on.
        """
        for tier in tiers:
            wanted = load.requests_per_s > 0.0 if asked is None else tier in asked
            if wanted:
                self._busy_at[tier] = now
            else:
                self._busy_at.setdefault(tier, now if tier in awake else -math.inf)
        self._elapsed_s = now - self._read_s if self._read_s is not None else 0.0
        self._read_s = now
        silent = load.requests_per_s <= 0.0 and not asked
        self._num_silent = self._num_silent + 1 if silent else 0
        if self._num_silent == SILENT_READINGS:
            self._forecast = RateForecast(self.horizon_s)
        self._forecast.observe(now, load.requests_per_s)
        self.hourly.observe(now, load.requests_per_s)

    def rate(self, now: float, current: float) -> float:
        """Requests per second to be ready for: the forecast, a burst, or what this hour brings."""
        if self._num_silent >= SILENT_READINGS:
            return 0.0
        ahead = self._forecast.predict() or 0.0
        if self._is_burst(current, ahead):
            return current
        return max(ahead, self.hourly.ahead(now, current, self.horizon_s))

    def _is_burst(self, current: float, ahead: float) -> bool:
        """Whether so much more came than was forecast that it is neither noise nor chance."""
        if current <= BURST_OVER_FORECAST * ahead:
            return False
        above = (current - ahead) * self._elapsed_s
        return above >= BURST_DEVIATIONS * math.sqrt(max(0.0, ahead) * self._elapsed_s)

    def asleep(self, now: float, tier: str) -> bool:
        """Whether nobody has asked for the tier for long enough."""
        since = self._busy_at.get(tier)
        return (
            self.idle_after_s is not None and since is not None and now - since >= self.idle_after_s
        )


def drain_rates(backlog: Mapping[str, float]) -> dict[str, float]:
    """Requests per second by tier that work a backlog off in time."""
    return {tier: count / DRAIN_S for tier, count in backlog.items() if count > 0.0}
