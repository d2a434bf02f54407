"""Notice that traffic, or a tier's quality, has changed.

`TrafficShift` needs no labels: two-sample Kolmogorov-Smirnov tests of the newest requests against
those before them, on numbers that every request has anyway (prompt length, predicted gain).
`ResidualDrift` watches what labels say against what was predicted. On an alarm the controllers
forget: estimates from other traffic are worse than few estimates.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray


class TrafficShift:
    """Alarms when one of a request's numbers comes from another distribution than before.

    Args:
        recent: requests on the new side of the test.
        reference: requests on the old side; no test before half of them are there.
        every: requests between tests.
        false_alarms_per_test: bound for one test, split over the numbers tested.
    """

    def __init__(
        self,
        *,
        recent: int = 100,
        reference: int = 400,
        every: int = 20,
        false_alarms_per_test: float = 1e-5,
    ) -> None:
        self.recent = recent
        self.reference = reference
        self.every = every
        self.false_alarms_per_test = false_alarms_per_test
        self.num_alarms = 0
        self._rows: deque[tuple[float, ...]] = deque(maxlen=recent + reference)
        self._since_test = 0

    def observe(self, *numbers: float) -> bool:
        """Take one request's numbers (always the same count); True on an alarm."""
        if not all(map(math.isfinite, numbers)):
            return False
        self._rows.append(numbers)
        self._since_test += 1
        if self._since_test < self.every or len(self._rows) < self.recent + self.reference // 2:
            return False
        self._since_test = 0
        rows = np.asarray(self._rows)
        old, new = rows[: -self.recent], rows[-self.recent :]
        columns = rows.shape[1]
        # Smirnov's tail bound, two-sided: P(D > d) <= 2 exp(-2 d^2 nm/(n+m)).
        size = len(old) * len(new) / len(rows)
        limit = math.sqrt(math.log(2.0 * columns / self.false_alarms_per_test) / (2.0 * size))
        if all(ks_statistic(old[:, i], new[:, i]) <= limit for i in range(columns)):
            return False
        self.num_alarms += 1
        newest = list(self._rows)[-self.recent :]
        self._rows.clear()
        self._rows.extend(newest)
        return True


# Weight of a label in a long baseline.
_SLOWEST = 0.002
# Shares of the stake that is best for a move by `shift`: small ones find small moves.
_STAKES = (0.25, 0.5, 1.0)


class ResidualDrift:
    """Alarms when a tier's measured quality drifts away from its predicted one.

    Two one-sided e-detectors (Shin, Ramdas and Rinaldo 2024) on `measured - predicted`, against the
    mean since the last change: each bets that the residual has moved, with the stake that is best
    for a move by `shift`, and starts anew at nothing. Unlike a CUSUM of Gaussian likelihood ratios
    it keeps its false alarms with labels that are right or wrong, however skewed.

    Args:
        shift: smallest drift worth an alarm, quality points.
        log_odds: alarm level. By simulation one false alarm in 540,000 steady labels of nine kinds.
        warm_up: labels that only make the baseline.
    """

    def __init__(self, shift: float = 0.15, log_odds: float = 7.0, warm_up: int = 60) -> None:
        self.shift = shift
        self.log_odds = log_odds
        self.warm_up = warm_up
        # Of the last alarm: whether the quality went up.
        self.rose = False
        self.reset()

    @property
    def statistic(self) -> float:
        """Log of the capital won so far; an alarm at `log_odds`."""
        return max(*self._up, *self._down)

    @property
    def count(self) -> int:
        """Labels of the present baseline."""
        return self._count

    def reset(self) -> None:
        """Start a new baseline."""
        self._count = 0
        self._mean = 0.0
        self._square = 0.25
        self._up, self._down = [0.0] * len(_STAKES), [0.0] * len(_STAKES)

    def observe(self, measured: float, predicted: float) -> bool:
        """Take one label; True on an alarm, after which the baseline starts anew."""
        residual = measured - predicted
        if not math.isfinite(residual):
            return False
        deviation = residual - self._mean
        self._count += 1
        if self._count > self.warm_up:
            expected = predicted + self._mean
            self._won(self._up, deviation, expected)
            self._won(self._down, -deviation, 1.0 - expected)
            if self.statistic >= self.log_odds:
                self.rose = max(self._up) > max(self._down)
                self.reset()
                return True
        # A long baseline moves slowly, so that the drift to be found does not become part of it.
        weight = max(1.0 / self._count, _SLOWEST)
        self._mean += weight * deviation
        self._square += max(1.0 / (self._count + 10), _SLOWEST) * (deviation**2 - self._square)
        return False

    def _won(self, capitals: list[float], moved: float, most_lost: float) -> None:
        """The capital of each stake after one more bet that the residual moved this way.

        What the baseline may be off by is conceded. No bet can lose all.
        """
        known = min(self._count, 1.0 / _SLOWEST)
        off = math.sqrt(max(0.0, self._square) / known)
        conceded = min(self.shift / 3.0, max(self.shift / 10.0, 1.5 * off))
        best = self.shift / (max(0.01, self._square) + self.shift**2)
        most = 0.8 / (max(0.0, most_lost) + conceded)
        for index, share in enumerate(_STAKES):
            stake = min(share * best, most)
            won = capitals[index] + math.log1p(stake * (moved - conceded))
            capitals[index] = max(0.0, won)


def ks_statistic(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Largest distance between two empirical distribution functions."""
    points = np.concatenate([a, b])
    cdf_a = np.searchsorted(np.sort(a), points, side="right") / len(a)
    cdf_b = np.searchsorted(np.sort(b), points, side="right") / len(b)
    return float(np.abs(cdf_a - cdf_b).max())
