"""What share of the dearest tier's quality was delivered, with an interval that holds at any time.

Three sources, each corrected by the next, scarcer one (doubly robust, as in prediction-powered
inference, Angelopoulos et al. 2023):

* predictions, known for every request, and maybe biased;
* verdicts of a judge on a few requests, drawn at a known probability, and maybe wrong;
* gold labels on a few of those, right.

For each sum the estimate is `a*mean(predicted, all) + mean(b*judged - a*predicted, judged ones) +
mean(gold - b*judged, gold ones)`, each mean weighted by one over the probability. Whatever a and b
are, it estimates the gold mean (without gold labels: the judge's); they are chosen for the smallest
variance, so a bad predictor or judge costs nothing but its worth. The ratio of two such sums is
linearised, and its interval is an asymptotic confidence sequence (Waudby-Smith, Arbour, Sinha,
Kennedy and Ramdas 2024): valid at every moment at once, for as long as traffic stays what it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Labels before which an interval says nothing.
MIN_LABELS = 30
#: Gold labels from which they correct the judge; fewer would add more noise than they take away.
MIN_GOLD = 20
#: Labels at which the interval is tightest.
TUNED_FOR = 1000.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A quality ratio and its interval; None: there are too few labels for one."""

    ratio: float | None
    low: float | None
    high: float | None
    num_labels: int
    num_gold: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Labelled requests, a row each; two columns: the tier looked at, and the dearest.

    weight: one over the probability of being judged. judged, predicted: qualities (n, 2); a
    prediction that is unknown is 0, there and in `traffic`. gold: (n, 2), NaN where there is none.
    gold_weight: one over the probability of having a gold label, once judged. traffic: mean
    predictions of all requests, (2,). num_traffic: how many those are.
    """

    weight: Floats
    judged: Floats
    predicted: Floats
    gold: Floats
    gold_weight: Floats
    traffic: Floats
    num_traffic: int


def estimate(sample: Sample, risk: float = 0.05) -> Estimate:
    """The first column's mean quality over the second's, with an interval of level 1 - risk."""
    has_gold = np.asarray(np.isfinite(sample.gold).all(axis=1))
    num, num_gold = len(sample.weight), int(has_gold.sum())
    if num < MIN_LABELS:
        return Estimate(None, None, None, num, num_gold)
    judged = sample.judged
    gold_weight = np.where(has_gold, sample.gold_weight, 0.0)
    if num_gold < MIN_GOLD:
        # A gold label is the better verdict on its own request; it corrects no other.
        judged = np.where(has_gold[:, None], np.nan_to_num(sample.gold), judged)
        gold_weight = np.zeros(num)
    gold = np.where(gold_weight[:, None] > 0.0, np.nan_to_num(sample.gold), 0.0)
    parts = (
        sample.weight / sample.weight.sum(),
        sample.weight * gold_weight / max(1e-300, (sample.weight * gold_weight).sum()),
    )
    means = parts[1] @ gold if num_gold >= MIN_GOLD else parts[0] @ judged
    ratio = _ratio(means)
    for _ in range(2):
        # Both columns move along the direction in which the ratio is measured.
        along = np.array([1.0, -ratio])
        a, b = _tuned(sample, judged, gold, parts, along)
        means = a * sample.traffic + parts[0] @ (b * judged - a * sample.predicted)
        if num_gold >= MIN_GOLD:
            means = means + parts[1] @ (gold - b * judged)
        ratio = _ratio(means)
    along = np.array([1.0, -ratio])
    first = (b * judged - a * sample.predicted) @ along
    influence = parts[0] * (first - parts[0] @ first)
    if num_gold >= MIN_GOLD:
        second = (gold - b * judged) @ along
        influence = influence + parts[1] * (second - parts[1] @ second)
    # One label's worth of doubt more than was seen: thirty labels that agree prove little.
    variance = float(num * (influence @ influence)) + 1.0 / num
    spread = sample.predicted @ along
    variance += a * a * float(np.var(spread)) * num / max(num, sample.num_traffic)
    dearest = max(1e-6, float(means[1]))
    half = _half_width(num, variance / dearest**2, risk)
    return Estimate(ratio, max(0.0, ratio - half), ratio + half, num, num_gold)


def _ratio(means: Floats) -> float:
    return float(max(0.0, means[0]) / max(1e-6, means[1]))


def _tuned(
    sample: Sample, judged: Floats, gold: Floats, parts: tuple[Floats, Floats], along: Floats
) -> tuple[float, float]:
    """(a, b): how much of the predictions and of the judge to use, for the smallest variance."""
    has_gold = np.flatnonzero(parts[1])
    said, expected = judged @ along, sample.predicted @ along
    b = 1.0
    if len(has_gold):
        weight = parts[1][has_gold]
        right, judge = (gold @ along)[has_gold], said[has_gold]
        variance = _covariance(weight, judge, judge)
        share = len(has_gold) / len(said)
        b = _covariance(weight, right, judge) / max(1e-12, variance * (1.0 + share))
        b = min(1.0, max(0.0, b))
    variance = _covariance(parts[0], expected, expected)
    share = len(said) / max(len(said), sample.num_traffic)
    a = b * _covariance(parts[0], said, expected) / max(1e-12, variance * (1.0 + share))
    return (min(1.0, max(0.0, a)) if variance > 1e-12 else 0.0), b


def _covariance(weight: Floats, one: Floats, other: Floats) -> float:
    weight = weight / weight.sum()
    return float(weight @ ((one - weight @ one) * (other - weight @ other)))


def _half_width(num: float, variance: float, risk: float) -> float:
    """Of the two-sided sequence after `num` labels of this variance (theorem 2.2 of the paper)."""
    log = -2.0 * math.log(risk)
    rho2 = (log + math.log(log + 1.0)) / TUNED_FOR
    time = num * variance
    # rho is tuned in labels; measured in variance it is the same number of labels.
    rho2 /= max(1e-12, variance)
    inside = time * rho2 + 1.0
    return math.sqrt(2.0 * inside / (num**2 * rho2) * math.log(math.sqrt(inside) / risk))
