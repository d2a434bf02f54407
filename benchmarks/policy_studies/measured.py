"""What the estimate of delivered quality is worth: does its interval cover, what labels it asks.

Real outcomes stand for gold labels. A judge is right with a probability drawn per run from 80 to
90 %: about pairs of answers, as the router's judge is asked, or about each answer, apart for right
and for wrong ones, so that it also leans. A request is judged at a known probability, a judged one
gets a gold label at another. Beside the doubly robust estimate stands plain weighting: gold labels
alone, each weighted by one over its probability, with an interval by the same formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from outcomes import Outcomes

from policy_studies.streams import columns
from tandem_router.control import ResidualDrift
from tandem_router.control.quality_ratio import Estimate, Sample, estimate

Floats = NDArray[np.float64]

#: Chance that a request which the small, the large tier answered is judged.
UNIFORM = (0.1, 0.1)
TO_SMALL = (0.2, 0.05)
MOST_GOLD = 4  # times as many gold labels, of which plain weighting may take what it needs


@dataclass(frozen=True)
class Population:
    """All requests there are, with what each tier makes of them; a router's choices are made."""

    small: NDArray[np.bool_]  # (n,), whether the small tier answers
    predicted: Floats  # (n, 2): of the tier that answers, of the large tier
    gold: Floats  # (n, 2)

    @property
    def ratio(self) -> float:
        """The truth."""
        served, large = self.gold.mean(axis=0)
        return float(served / large)


def population(outcomes: Outcomes, small_share: float = 0.5, bias: float = 0.0) -> Population:
    """Requests of the least gain go to the small tier; bias: added to what is predicted of it."""
    p, q = columns(outcomes, np.arange(len(outcomes)))
    gain = p[:, 1] - p[:, 0]
    small = gain <= np.quantile(gain, small_share)
    p = np.clip(p + np.array([bias, 0.0]), 0.0, 1.0)

    def served(of: Floats) -> Floats:
        return np.stack([np.where(small, of[:, 0], of[:, 1]), of[:, 1]], axis=1)

    return Population(small, served(p), served(q))


def judged(
    gold: Floats, small: NDArray[np.bool_], rng: np.random.Generator, by_pair: bool
) -> Floats:
    """Verdicts that are right in 80 to 90 %; an answer that stands in both columns has one.

    by_pair: one verdict on two answers (first, second or equal), as the router's judge gives it;
    a wrong one is one of the other two. Else each answer is called right or wrong by itself.
    """
    if by_pair:
        lean = np.sign(gold[:, 0] - gold[:, 1])
        other = (lean + rng.choice([1, 2], len(lean)) + 1) % 3 - 1
        said = np.where(small & (rng.random(len(lean)) >= rng.uniform(0.8, 0.9)), other, lean)
        return np.stack([said >= 0, said <= 0], axis=1).astype(float)
    right_kept, wrong_kept = rng.uniform(0.8, 0.9, 2)
    kept = rng.random(gold.shape) < np.where(gold >= 0.5, right_kept, wrong_kept)
    verdict = np.where(kept, gold, 1.0 - gold)
    return np.stack([np.where(small, verdict[:, 0], verdict[:, 1]), verdict[:, 1]], axis=1)


def labelled(
    people: Population,
    rng: np.random.Generator,
    num_labels: int,
    gold_share: float,
    shares: tuple[float, float] = UNIFORM,
    by_pair: bool = True,
) -> Sample:
    """Traffic until so many requests are judged."""
    num = math.ceil(1.5 * num_labels / min(shares))
    rows = rng.integers(0, len(people.gold), num)
    chance = np.where(people.small[rows], *shares)
    taken = np.flatnonzero(rng.random(num) < chance)[:num_labels]
    rows, chance = rows[: taken[-1] + 1], chance[taken]
    drawn = rows[taken]
    gold = people.gold[drawn]
    known = rng.random(num_labels) < gold_share
    return Sample(
        weight=1.0 / chance,
        judged=judged(gold, people.small[drawn], rng, by_pair),
        predicted=people.predicted[drawn],
        gold=np.where(known[:, None], gold, np.nan),
        gold_weight=np.full(num_labels, 1.0 / gold_share),
        traffic=people.predicted[rows].mean(axis=0),
        num_traffic=len(rows),
    )


def plain(sample: Sample) -> Estimate:
    """The same from gold labels alone, by their weights."""
    known = np.isfinite(sample.gold[:, 0])
    num = int(known.sum())
    nothing = np.full((num, 2), np.nan)
    zeros = np.zeros((num, 2))
    weight, gold = sample.weight[known], sample.gold[known]
    return estimate(Sample(weight, gold, zeros, nothing, np.ones(num), np.zeros(2), num))


def coverage_study(mmlu: Outcomes, gsm8k: Outcomes, seeds: Sequence[int]) -> dict[str, object]:
    """Coverage, width, and how many gold labels plain weighting needs for the same width."""
    result: dict[str, object] = {}
    cases = [
        (
            f"{name}, {num:,} judged, {share:.0%} gold, {judge}, {drawn}",
            people,
            num,
            share,
            shares,
            pair,
        )
        for name, people in (("mmlu", population(mmlu)), ("gsm8k", population(gsm8k)))
        for judge, pair in (("verdicts on pairs", True), ("on each answer", False))
        for drawn, shares in (("drawn alike", UNIFORM), ("drawn where small answers", TO_SMALL))
        for num, share in ((2_100, 0.1), (2_100, 0.3), (2_100, 1.0))
        if share < 1.0 or pair
    ]
    for title, people, num, share, shares, pair in cases:
        rows = [_covers(people, num, share, shares, pair, seed) for seed in seeds]
        plain_half = np.nanmean([row.plain_half for row in rows], axis=0)
        half = float(np.mean([row.half for row in rows]))
        num_gold = float(np.mean([row.num_gold for row in rows]))
        # Widths shrink about as one over the root: interpolate there.
        needed = float(np.interp(1.0 / half**2, 1.0 / plain_half**2, num_gold * _TIMES))
        errors = np.abs([row.error for row in rows])
        result[title] = {
            "covers": float(np.mean([row.covers for row in rows])),
            "gold labels": num_gold,
            "half width": half,
            "95 % of errors within": float(np.quantile(errors, 0.95)),
            "gold that plain weighting needs": needed,
            "share of it": num_gold / needed,
        }
    return result


_TIMES = np.array([0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0])


@dataclass(frozen=True)
class _Run:
    covers: bool
    num_gold: int
    half: float
    error: float
    plain_half: Floats


def _covers(
    people: Population,
    num: int,
    gold_share: float,
    shares: tuple[float, float],
    by_pair: bool,
    seed: int,
) -> _Run:
    rng = np.random.default_rng(seed)
    found = estimate(labelled(people, rng, num, gold_share, shares, by_pair))
    assert found.ratio is not None
    assert found.low is not None
    assert found.high is not None
    more = labelled(people, rng, math.ceil(num * gold_share * MOST_GOLD), 1.0, shares)
    halves = [_half(plain(_first(more, round(num * gold_share * times)))) for times in _TIMES]
    return _Run(
        found.low <= people.ratio <= found.high,
        found.num_gold,
        (found.high - found.low) / 2,
        found.ratio - people.ratio,
        np.array(halves),
    )


def _half(found: Estimate) -> float:
    return math.nan if found.high is None or found.low is None else (found.high - found.low) / 2


def _first(sample: Sample, num: int) -> Sample:
    return Sample(
        sample.weight[:num],
        sample.judged[:num],
        sample.predicted[:num],
        sample.gold[:num],
        sample.gold_weight[:num],
        sample.traffic,
        sample.num_traffic,
    )


def bias_study(mmlu: Outcomes, seeds: Sequence[int]) -> dict[str, object]:
    """A predictor that thinks the small tier .05 better than it is, where that one answers all."""
    result: dict[str, object] = {}
    for bias in (0.0, 0.05):
        people = population(mmlu, small_share=1.0, bias=bias)
        for num, gold_share in ((600, 0.3), (2_100, 0.3), (1_000, 1.0), (2_100, 1.0)):
            noticed, errors, before = [], [], []
            for seed in seeds:
                sample = labelled(people, np.random.default_rng(seed), num, gold_share)
                found = estimate(sample)
                assert found.ratio is not None
                predicted = float(sample.traffic[0] / sample.traffic[1])
                noticed.append(not (found.low or 0.0) <= predicted <= (found.high or 0.0))
                errors.append(found.ratio - people.ratio)
                before.append(predicted - people.ratio)
            result[f"biased by {bias:g}, {num:,} judged, {gold_share:.0%} gold"] = {
                "predicted is off by": float(np.mean(before)),
                "outside the interval": float(np.mean(noticed)),
                "estimate is off by": float(np.mean(errors)),
                "its standard deviation": float(np.std(errors)),
            }
    return result


def drop_study(
    qualities: Floats, predicted: Floats, names: Sequence[str], seeds: Sequence[int]
) -> dict[str, object]:
    """A tier gets silently worse at one third of a stream of labelled requests."""
    result: dict[str, object] = {}
    for tier, name in enumerate(names):
        for drop in (0.1, 0.18, 0.3):
            waits, false_alarms = [], 0
            for seed in seeds:
                rng = np.random.default_rng(seed)
                rows = rng.permutation(len(qualities))
                at = len(rows) // 3
                quality = qualities[rows, tier]
                kept = rng.random(len(rows)) < 1.0 - drop / qualities[:, tier].mean()
                quality = np.where((np.arange(len(rows)) < at) | kept, quality, 0.0)
                detector = ResidualDrift()
                alarms = [
                    i
                    for i, (q, p) in enumerate(zip(quality, predicted[rows, tier], strict=True))
                    if detector.observe(float(q), float(p))
                ]
                false_alarms += any(i < at for i in alarms)
                after = [i - at + 1 for i in alarms if i >= at]
                waits.append(after[0] if after else math.inf)
            result[f"{name}, worse by {drop:g}"] = {
                "labelled requests to the alarm, median": float(np.median(waits)),
                "in nine of ten runs": float(np.quantile(waits, 0.9, method="higher")),
                "within 200": float(np.mean(np.array(waits) <= 200)),
                "false alarms before, of runs": false_alarms / len(list(seeds)),
                "requests at shadowShare 0.02, median": float(np.median(waits)) / 0.02,
            }
    return result
