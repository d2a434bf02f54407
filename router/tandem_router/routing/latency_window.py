"""How long a tier's last requests took: at a percentile, and how many met a target.

Counts of several routers add up, so whoever asks them all knows the share of all requests that met
the target; percentiles of several routers would not.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

KEPT_S = 300.0
MOST_KEPT = 4096


@dataclass(frozen=True, slots=True)
class LatencyReport:
    """Latencies of one kind in the window; value_s is that at the percentile asked for."""

    num: int
    num_met: int | None  # None without a target
    value_s: float | None  # None while num is 0


class LatencyWindow:
    """The latencies of the last five minutes, at most `MOST_KEPT` of them."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=MOST_KEPT)

    def saw(self, latency_s: float, now: float) -> None:
        self._seen.append((now, latency_s))

    def report(self, percentile: float, target_s: float | None, now: float) -> LatencyReport:
        """The smallest latency that `percentile` percent of the requests did not exceed."""
        while self._seen and self._seen[0][0] < now - KEPT_S:
            self._seen.popleft()
        values = sorted(latency for _, latency in self._seen)
        met = None if target_s is None else sum(value <= target_s for value in values)
        if not values:
            return LatencyReport(0, met, None)
        at = max(0, math.ceil(percentile / 100.0 * len(values)) - 1)
        return LatencyReport(len(values), met, values[at])
