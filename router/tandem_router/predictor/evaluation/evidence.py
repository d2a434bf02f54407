"""The numbers a verdict is made of: gap, saving and its price, each with an interval over groups.

A saving is measured as it will be met: the threshold is chosen on one half of the groups and judged
on the other, since the best point of a noisy curve saves more on paper than on the next prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.evaluation import metrics
from tandem_router.predictor.evaluation.verdict import TOLERANCE, Estimate, Evidence
from tandem_router.predictor.linear_algebra import FloatArray

#: Splits into halves, each used both ways.
NUM_SPLITS = 10
#: What is asked for beyond a drop on the half that chooses, to meet it on the other.
ASKED = np.linspace(-0.02, 0.0, 11)


@dataclass(frozen=True, slots=True)
class PairRows:
    """The rows that grade both tiers of a pair; `spend` has two columns, calls 0 and 1 or USD."""

    cheap: FloatArray
    dear: FloatArray
    spend: FloatArray  # (num_rows, 2)
    groups: npt.NDArray[Any]


def evidence(
    names: tuple[str, str],
    rows: PairRows,
    in_usd: bool,
    score: FloatArray | None,
    repeats: int = 200,
    seed: int = 0,
) -> Evidence:
    """What the graded rows of a pair say, with the ranking `score` of them where there is one."""
    gain = rows.dear - rows.cheap
    draws = list(metrics.resamples(rows.groups, max(repeats, 50), seed))
    means = [float(gain[drawn].mean()) for drawn in draws]
    gap = _estimate(float(gain.mean()), means)
    usd = (float(rows.spend[:, 0].mean()), float(rows.spend[:, 1].mean())) if in_usd else None
    found = Evidence(*names, len(gain), float(rows.cheap.mean()), float(rows.dear.mean()), gap, usd)
    if score is None or gap.low <= 0.0:
        return found
    apgr = metrics.curve(score, rows.cheap, rows.dear).apgr()
    areas = [metrics.apgr(score[d], rows.cheap[d], rows.dear[d]) for d in draws]
    saved = _saved(score, rows, TOLERANCE)
    around = [_saved(score, rows, TOLERANCE, d) for d in draws[:100]]
    middle = float(np.median(around))
    honest = min(met_on_other_rows(score, rows, TOLERANCE, seed).saved, saved)
    low, high = np.quantile(around, [0.025, 0.975])
    return replace(
        found,
        apgr=_estimate(0.5 if apgr is None else apgr, [a for a in areas if a is not None]),
        saved=Estimate(
            honest,
            max(honest + float(low) - middle, 0.0),
            min(max(honest + float(high) - middle, honest), 1.0),
        ),
        mixed=saved_by_mixing(gap.value, rows.spend),
    )


def saved_by_mixing(gap: float, spend: FloatArray, drop: float = TOLERANCE) -> float:
    """Share of the dear tier's spend that a random mix saves while losing no more than `drop`."""
    part = min(drop / max(gap, 1e-9), 1.0)
    return part * (1.0 - float(spend[:, 0].sum()) / max(float(spend[:, 1].sum()), 1e-12))


@dataclass(frozen=True, slots=True)
class Met:
    """What thresholds chosen on half of the groups save on the other half."""

    saved: float  # share of the dear tier's spend
    saved_calls: float
    quality: float


def met_on_other_rows(score: FloatArray, rows: PairRows, drop: float, seed: int) -> Met:
    """The most that is saved while losing no more than `drop`, of thresholds chosen elsewhere.

    Drops below the one wanted are asked for on the half that chooses, until the other half meets
    it. Where none does, nothing is saved.
    """
    generator = np.random.default_rng(seed)
    names = np.unique(rows.groups)
    asked = drop + ASKED
    sums = np.zeros((3, len(asked)))  # saved spend, saved calls, lost quality
    count = 0
    for _ in range(NUM_SPLITS):
        chosen = generator.permutation(names)[: len(names) // 2]
        half = np.isin(rows.groups, chosen)
        for inside in (half, ~half):
            here, there = np.flatnonzero(inside), np.flatnonzero(~inside)
            if len(here) < 2 or len(there) < 2:
                continue
            for index, threshold in enumerate(_thresholds(score, rows, here, asked)):
                sums[:, index] += _outcome(rows, there, score[there] >= threshold)
            count += 1
    saved, calls, lost = sums / max(count, 1)
    fits = np.flatnonzero(lost <= drop) if count else np.empty(0, dtype=np.int64)
    if not len(fits) or saved[fits].max() <= 0.0:
        return Met(0.0, 0.0, float(rows.dear.mean()))
    best = fits[int(np.argmax(saved[fits]))]
    return Met(float(saved[best]), float(calls[best]), float(rows.dear.mean() - lost[best]))


def _outcome(
    rows: PairRows, at: npt.NDArray[np.int64], up: npt.NDArray[np.bool_]
) -> tuple[float, float, float]:
    spend = rows.spend[at]
    spent = float(np.where(up, spend[:, 1], spend[:, 0]).sum())
    lost = float(np.where(up, 0.0, rows.dear[at] - rows.cheap[at]).mean())
    return 1.0 - spent / max(float(spend[:, 1].sum()), 1e-12), 1.0 - float(up.mean()), lost


def _thresholds(
    score: FloatArray, rows: PairRows, here: npt.NDArray[np.int64], asked: FloatArray
) -> list[float]:
    """Per asked drop, the highest threshold whose quality is no more than that below all-dear.

    It lies halfway to the next score: at the last score sent up, the first prompt of the other half
    that scores a hair less would be missed.
    """
    cheap, dear = rows.cheap[here], rows.dear[here]
    order = np.argsort(-score[here], kind="stable")
    ranked = score[here][order]
    quality = (cheap.sum() + np.cumsum((dear - cheap)[order])) / len(here)
    found = []
    for drop in asked:
        reached = np.flatnonzero(quality >= dear.mean() - drop - 1e-12)
        below = ranked[ranked < ranked[reached[0]]] if len(reached) else ranked[:0]
        halfway = (ranked[reached[0]] + below[0]) / 2.0 if len(below) else float("-inf")
        found.append(float(halfway))
    return found


def _saved(
    score: FloatArray, rows: PairRows, drop: float, drawn: npt.NDArray[np.int64] | None = None
) -> float:
    """The saving at the first point of the curve that loses no more than `drop`."""
    at = slice(None) if drawn is None else drawn
    scored, cheap, dear, spend = score[at], rows.cheap[at], rows.dear[at], rows.spend[at]
    curve = metrics.curve(scored, cheap, dear)
    reached = np.flatnonzero(curve.quality >= curve.quality[-1] - drop - 1e-12)
    if not len(reached):
        return 0.0
    up = np.argsort(-scored, kind="stable")[: int(reached[0])]
    extra = spend[:, 1] - spend[:, 0]
    spent = float(spend[:, 0].sum() + extra[up].sum())
    return 1.0 - spent / max(float(spend[:, 1].sum()), 1e-12)


def _estimate(value: float, drawn: list[float]) -> Estimate:
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) > 1 else (value, value)
    return Estimate(value, min(float(low), value), max(float(high), value))
