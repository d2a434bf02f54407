"""Notice that traffic has changed before any label says so.

Two-sample Kolmogorov-Smirnov tests of the newest requests against those before them, on numbers
that every request has anyway (prompt length, predicted gain). On an alarm the controllers forget:
estimates from other traffic are worse than few estimates.
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


def ks_statistic(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Largest distance between two empirical distribution functions."""
    points = np.concatenate([a, b])
    cdf_a = np.searchsorted(np.sort(a), points, side="right") / len(a)
    cdf_b = np.searchsorted(np.sort(b), points, side="right") / len(b)
    return float(np.abs(cdf_a - cdf_b).max())
