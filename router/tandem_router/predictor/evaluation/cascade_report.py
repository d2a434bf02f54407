"""What reading the first tier's answer is worth: the verifier's verdicts and their report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.cascade.stored import Cascade, weighed
from tandem_router.predictor.evaluation import metrics
from tandem_router.predictor.linear_algebra import FloatArray
from tandem_router.predictor.records.dataset import Dataset


def verdicts(cascade: Cascade, dataset: Dataset, predicted: FloatArray) -> FloatArray:
    """Quality of both tiers after the first one's answer ``(num_rows, 2)``; NaN without one.

    predicted: of both tiers, by the prompt alone ``(num_rows, 2)``.
    """
    out = np.full((len(dataset.rows), 2), np.nan)
    rows = [i for i, row in enumerate(dataset.rows) if cascade.first in row.responses]
    if rows:
        out[rows] = cascade.verifier.predict(
            [dataset.rows[i].prompt for i in rows],
            [dataset.rows[i].responses[cascade.first] for i in rows],
            [dataset.rows[i].token_statistics.get(cascade.first) for i in rows],
        )
        if cascade.combination is not None:
            out[rows] = weighed(cascade.combination, out[rows], predicted[rows])
    return out


def cascade_report(
    found: FloatArray,
    quality: FloatArray,
    names: tuple[str, str],
    groups: npt.NDArray[Any],
    folds: npt.NDArray[np.int64],
    repeats: int,
    seed: int,
) -> Mapping[str, Any] | None:
    """What routing gains when the first tier's answer is read before deciding."""
    rows = np.flatnonzero(~np.isnan(found).any(axis=1) & ~np.isnan(quality).any(axis=1))
    if len(rows) < 5:
        return None
    score, low, high = found[rows, 1] - found[rows, 0], quality[rows, 0], quality[rows, 1]
    curve = metrics.curve(score, low, high)
    apgr = curve.apgr()
    if apgr is None:
        return None
    drawn = list(metrics.resamples(groups[rows], repeats, seed))
    interval = metrics.interval([metrics.apgr(score[r], low[r], high[r]) for r in drawn])
    by_fold = [
        metrics.apgr(score[folds[rows] == f], low[folds[rows] == f], high[folds[rows] == f])
        for f in np.unique(folds[rows])
    ]
    usable = [value for value in by_fold if value is not None]
    first, second = names
    said = found[rows, 0]
    auc, passed = metrics.auc(said, low), metrics.false_positive_rate(said, low)
    aucs = [metrics.auc(said[r], low[r]) for r in drawn]
    passes = [metrics.false_positive_rate(said[r], low[r]) for r in drawn]
    return {
        "first": first,
        "second": second,
        "num_rows": len(rows),
        "apgr": apgr,
        "apgr_interval": interval,
        "apgr_mean_of_folds": float(np.mean(usable)) if usable else None,
        "cpt50": curve.cpt(50.0),
        "cpt80": curve.cpt(80.0),
        "saved_at_no_drop": curve.saved(0.0),
        "saved_at_1_percent_drop": curve.saved(0.01),
        "ece": metrics.expected_calibration_error(found[rows, 0], low),
        "auc": auc,
        "auc_interval": metrics.interval(aucs),
        "false_positive_rate": passed,
        "false_positive_rate_interval": metrics.interval(passes),
        "sentence": (
            f"reading {first}'s answer first: share of the gap recovered {apgr:.3f}, "
            f"{curve.saved(0.0):.0%} of the {second} calls saved at no drop, "
            f"{curve.saved(0.01):.0%} at a 1 % drop"
        ),
        "verifier_sentence": _told(first, auc, metrics.interval(aucs), passed, passes),
    }


def _told(
    first: str,
    auc: float | None,
    around: tuple[float, float] | None,
    passed: float | None,
    passes: list[float | None],
) -> str:
    """What the verifier is worth by itself, a sentence; empty where all answers are alike."""
    if auc is None or passed is None:
        return ""
    within = f" ({around[0]:.3f} to {around[1]:.3f})" if around is not None else ""
    spread = metrics.interval(passes)
    between = f" ({spread[0]:.0%} to {spread[1]:.0%})" if spread is not None else ""
    return (
        f"the verifier ranks a right answer of {first} above a wrong one {auc:.3f} of the time"
        f"{within}, and takes {passed:.0%}{between} of the wrong ones for right"
    )
