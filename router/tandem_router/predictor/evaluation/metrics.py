"""Exact routing metrics: APGR and CPT as RouteLLM defines them, calibration, pinball, bootstrap.

A curve is walked row by row (no grid of thresholds); rows with the same score are taken in
expectation over their order, so that a constant score is exactly random routing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.linear_algebra import FloatArray


@dataclass(frozen=True, slots=True)
class Curve:
    """Mean quality against the share of calls sent to the second tier of a pair.

    `share` and `quality` have num_rows + 1 points, from all calls to the first tier to all to the
    second.
    """

    share: FloatArray
    quality: FloatArray

    @property
    def routable(self) -> bool:
        """Whether the second tier is better on average, without which a gap means nothing."""
        return bool(self.quality[-1] - self.quality[0] > 1e-12)

    def apgr(self) -> float | None:
        """Average performance gap recovered over all shares (RouteLLM, section 4)."""
        if not self.routable:
            return None
        gap = self.quality[-1] - self.quality[0]
        recovered = (self.quality - self.quality[0]) / gap
        return float(np.trapezoid(recovered, self.share))

    def cpt(self, percent: float) -> float | None:
        """The least share of second-tier calls that recovers `percent` of the gap."""
        if not self.routable:
            return None
        gap = self.quality[-1] - self.quality[0]
        return self._first_share(self.quality[0] + percent / 100.0 * gap)

    def saved(self, drop: float = 0.0) -> float:
        """Share of second-tier calls saved while quality stays at (1 - drop) of all-second."""
        return 1.0 - self._first_share(self.quality[-1] - drop * abs(self.quality[-1]))

    def _first_share(self, wanted: float) -> float:
        reached = np.flatnonzero(self.quality >= wanted - 1e-12)
        if len(reached) == 0:
            return 1.0
        at = int(reached[0])
        if at == 0:
            return 0.0
        low, high = self.quality[at - 1], self.quality[at]
        part = (wanted - low) / (high - low) if high > low else 1.0
        part = min(max(part, 0.0), 1.0)
        return float(self.share[at - 1] + part * (self.share[at] - self.share[at - 1]))


def curve(score: FloatArray, first: FloatArray, second: FloatArray) -> Curve:
    """Routing by descending `score`: the quality of the first and the second tier per row."""
    count = len(score)
    order = np.argsort(-score, kind="stable")
    gain = (second - first)[order]
    ranked = score[order]
    starts = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1])))
    sizes = np.diff(starts, append=count)
    expected = np.repeat(np.add.reduceat(gain, starts) / sizes, sizes) if count else gain
    quality = (first.sum() + np.concatenate(([0.0], np.cumsum(expected)))) / max(count, 1)
    return Curve(np.arange(count + 1) / max(count, 1), quality)


def apgr(score: FloatArray, first: FloatArray, second: FloatArray) -> float | None:
    return curve(score, first, second).apgr()


def expected_calibration_error(
    predicted: FloatArray, actual: FloatArray, num_bins: int = 10
) -> float:
    """Mean distance between predicted and actual over bins of equal width (Guo et al. 2017)."""
    width = np.minimum((predicted * num_bins).astype(np.int64), num_bins - 1)
    off = np.bincount(width, predicted - actual, minlength=num_bins)
    return float(np.abs(off).sum() / max(len(predicted), 1))


def adaptive_calibration_error(
    predicted: FloatArray, actual: FloatArray, num_bins: int = 10
) -> float:
    """The same over bins of equal count, which never leaves a bin with a handful of rows."""
    order = np.argsort(predicted, kind="stable")
    bins = np.array_split(predicted[order] - actual[order], min(num_bins, max(len(order), 1)))
    return float(sum(abs(part.sum()) for part in bins) / max(len(order), 1))


def calibration_noise(
    predicted: FloatArray,
    error: Callable[[FloatArray, FloatArray], float],
    repeats: int = 100,
    seed: int = 0,
) -> float:
    """The calibration error that right-or-wrong labels show when every prediction is exact.

    A binned error is positive by chance alone; what exceeds this mean is miscalibration.
    """
    draw = np.random.default_rng(seed)
    found = [
        error(predicted, (draw.random(len(predicted)) < predicted).astype(np.float64))
        for _ in range(repeats)
    ]
    return float(np.mean(found))


def brier(predicted: FloatArray, actual: FloatArray) -> float:
    """Mean squared distance; with fractional labels, of the expected quality."""
    return float(np.mean((predicted - actual) ** 2))


def auc(score: FloatArray, right: FloatArray) -> float | None:
    """How often a right answer is scored above a wrong one; ties count half (Fawcett 2006).

    right: 0..1 per answer; a fraction counts as that part of a right and the rest of a wrong one.
    None where all are right, or all are wrong.
    """
    values, at = np.unique(score, return_inverse=True)
    good = np.bincount(at, right, minlength=len(values))
    bad = np.bincount(at, 1.0 - right, minlength=len(values))
    pairs = good.sum() * bad.sum()
    if pairs <= 1e-12:
        return None
    below = np.cumsum(bad) - bad
    return float((good * (below + bad / 2.0)).sum() / pairs)


def false_positive_rate(score: FloatArray, right: FloatArray, above: float = 0.5) -> float | None:
    """The share of wrong answers that are scored `above` or more; None where none is wrong."""
    wrong = 1.0 - right
    total = wrong.sum()
    return float(wrong[score >= above].sum() / total) if total > 1e-12 else None


def pinball(predicted: FloatArray, actual: FloatArray, quantile: float) -> float:
    """Mean pinball loss of a quantile forecast, in the unit of `actual`."""
    error = actual - predicted
    return float(np.mean(np.maximum(quantile * error, (quantile - 1.0) * error)))


def resamples(groups: npt.NDArray[Any], repeats: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Row indices of bootstrap samples that draw whole groups with replacement."""
    generator = np.random.default_rng(seed)
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    alone = len(members) == len(order)
    for _ in range(repeats):
        drawn = generator.integers(0, len(members), len(members))
        yield order[drawn] if alone else np.concatenate([members[i] for i in drawn])


def interval(values: Sequence[float | None], level: float = 0.95) -> tuple[float, float] | None:
    """The percentile interval, or None where most samples have no value."""
    known = [value for value in values if value is not None]
    if len(known) < 2 or len(known) < len(values) / 2:
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
