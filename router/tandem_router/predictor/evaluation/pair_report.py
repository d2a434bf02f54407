"""Everything a report says of one pair of tiers, from the cheaper to the dearer one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.evaluation import metrics
from tandem_router.predictor.evaluation.evidence import (
    PairRows,
    evidence,
    met_on_other_rows,
    saved_by_mixing,
)
from tandem_router.predictor.evaluation.predictions import Predictions
from tandem_router.predictor.evaluation.verdict import ORACLE, PREDICTOR, RANDOM, Report, judge
from tandem_router.predictor.linear_algebra import FloatArray

NUM_CURVE_POINTS = 201
#: Floors of the table, as shares of the dearer tier's quality.
FLOORS = (1.0, 0.99, 0.98, 0.95, 0.9)


def in_order(labels: FloatArray, costs: FloatArray | None, one: int, other: int) -> tuple[int, int]:
    """Which tier of a pair is the cheaper: by cost, else as the data names them.

    Without money, a tier that is clearly worse than the one named after it is taken for the
    cheaper one: nobody pays more for it.
    """
    if costs is not None:
        first = costs[:, one].mean() <= costs[:, other].mean()
    else:
        lead = labels[:, one] - labels[:, other]
        first = lead.mean() <= 2.0 * lead.std() / np.sqrt(len(lead))
    return (one, other) if first else (other, one)


def pair_report(
    predictions: Predictions,
    labels: FloatArray,
    costs: FloatArray | None,
    groups: npt.NDArray[Any],
    known: npt.NDArray[np.int64],
    pair: tuple[int, int],
    repeats: int,
    seed: int,
    curves: bool,
) -> Report:
    """Methods, verdict, and the table of floors of one pair on the rows that grade both tiers."""
    first, second = pair
    names = predictions.tiers[first], predictions.tiers[second]
    low, high = labels[known, first], labels[known, second]
    scores = {PREDICTOR: predictions.gain(first, second)[known]}
    for name, value in predictions.baselines.items():
        scores[name] = (value[:, second] - value[:, first])[known]
    scores[f"P({names[0]} wrong)"] = -predictions.quality[known, first]
    scores[ORACLE] = high - low
    methods = {
        name: _method(score, low, high, groups[known], repeats, seed)
        for name, score in scores.items()
    }
    calls = np.stack([np.zeros(len(known)), np.ones(len(known))], axis=1)
    rows = PairRows(
        low, high, calls if costs is None else costs[known][:, list(pair)], groups[known]
    )
    seen = evidence(names, rows, costs is not None, scores[PREDICTOR], repeats, seed)
    verdict = judge(seen)
    found: Report = {
        "tiers": list(names),
        "num_rows": len(known),
        "quality": {names[0]: float(low.mean()), names[1]: float(high.mean())},
        "methods": methods,
        "evidence": asdict(seen),
        "decision": verdict.decision.value,
        "routable": verdict.routable,
        "sentence": verdict.sentence,
    }
    folds = predictions.fold[known]
    if len(np.unique(folds)) > 1:
        by_fold = [
            metrics.apgr(scores[PREDICTOR][folds == fold], low[folds == fold], high[folds == fold])
            for fold in np.unique(folds)
        ]
        usable = [value for value in by_fold if value is not None]
        found["apgr_mean_of_folds"] = float(np.mean(usable)) if usable else None
    rivals = {
        name: method["apgr"]
        for name, method in methods.items()
        if name not in (PREDICTOR, ORACLE, RANDOM) and method["apgr"] is not None
    }
    if rivals:
        found["best_baseline"] = max(rivals, key=lambda name: rivals[name])
        found["beside"] = _beside(methods, found["best_baseline"])
    if verdict.floors:
        found["floors"] = _floors(scores[PREDICTOR], rows, seen.usd, seed)
    if curves:
        found["curves"] = {
            name: _thinned(metrics.curve(score, low, high)) for name, score in scores.items()
        }
    return found


def _beside(methods: Report, best: str) -> str | None:
    """What it means that a simple column ranks these rows better than the predictor does."""
    own, simple = methods[PREDICTOR], methods[best]
    if simple["apgr"] <= own["apgr"]:
        return None
    means = (
        "the predictor reads the task off the prompt, since a request does not carry its label"
        if best == "task table"
        else "it is one of the rankings that the predictor weighs, and has its share already; with "
        "more labels a lead that lasts gains weight"
    )
    interval = own["apgr_interval"]
    chance = (
        ", which is within the predictor's interval"
        if interval and interval[0] <= simple["apgr"] <= interval[1]
        else ""
    )
    return (
        f"{best} alone ranks these rows better (APGR {simple['apgr']:.3f} against "
        f"{own['apgr']:.3f}{chance}): {means}"
    )


def _floors(
    score: FloatArray, rows: PairRows, usd: tuple[float, float] | None, seed: int
) -> list[Report]:
    """Per quality floor, what is saved and the quality met, with thresholds chosen elsewhere.

    Beside it, what a random mix at the same floor would save.
    """
    best = float(rows.dear.mean())
    gap = best - float(rows.cheap.mean())
    found = []
    for floor in FLOORS:
        drop = (1.0 - floor) * best
        met = met_on_other_rows(score, rows, drop, seed)
        found.append(
            {
                "floor": floor,
                "saved": met.saved,
                "saved_calls": met.saved_calls,
                "mixed": saved_by_mixing(gap, rows.spend, drop),
                "quality": met.quality,
                "saved_usd_per_1000": None if usd is None else 1000.0 * met.saved * usd[1],
                "yaml": f'objective: {{qualityFloor: "{floor:g}"}}',
            }
        )
    return found


_STATISTICS = ("apgr", "cpt50", "cpt80", "saved_at_no_drop", "saved_at_1_percent_drop")


def _statistics(curve: metrics.Curve) -> dict[str, float | None]:
    return {
        "apgr": curve.apgr(),
        "cpt50": curve.cpt(50.0),
        "cpt80": curve.cpt(80.0),
        "saved_at_no_drop": curve.saved(0.0),
        "saved_at_1_percent_drop": curve.saved(0.01),
    }


def _method(
    score: FloatArray,
    low: FloatArray,
    high: FloatArray,
    groups: npt.NDArray[Any],
    repeats: int,
    seed: int,
) -> Report:
    found: Report = dict(_statistics(metrics.curve(score, low, high)))
    drawn = [
        _statistics(metrics.curve(score[rows], low[rows], high[rows]))
        for rows in metrics.resamples(groups, repeats, seed)
    ]
    for name in _STATISTICS:
        found[f"{name}_interval"] = metrics.interval([values[name] for values in drawn])
    return found


def _thinned(curve: metrics.Curve) -> dict[str, list[float]]:
    at = np.unique(np.linspace(0, len(curve.share) - 1, NUM_CURVE_POINTS).astype(int))
    return {
        "share": [round(float(x), 5) for x in curve.share[at]],
        "quality": [round(float(y), 5) for y in curve.quality[at]],
    }
