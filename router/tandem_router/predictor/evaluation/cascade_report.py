"""What reading the first tier's answer is worth: the verifier's verdicts and their report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.cascade.stored import Cascade, weighed
from tandem_router.predictor.cascade.verifier import features_of, sigmoid
from tandem_router.predictor.evaluation import metrics
from tandem_router.predictor.linear_algebra import FloatArray
from tandem_router.predictor.records.dataset import Dataset

#: Rows below which a number says nothing.
MIN_ROWS = 5


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


#: In the order of `verifier.VIEWS`.
VIEW_NAMES = (
    "form and sums of the answer",
    "words of the answer",
    "words of the question",
    "agreement with reference pairs",
)
CERTAINTY = "certainty of tokens"
JUDGE = "a judge of the answer"


def said_by_views(cascade: Cascade, dataset: Dataset) -> dict[str, FloatArray]:
    """How good each view takes the first tier's answer for, 0..1, (num_rows,); NaN: not known.

    The certainty of tokens is one of the features; by itself it is their mean probability. A
    judge's word is no part of the verifier; it is what rows say under `judged`.
    """
    count = len(dataset.rows)
    found = {name: np.full(count, np.nan) for name in (*VIEW_NAMES, CERTAINTY, JUDGE)}
    for index, row in enumerate(dataset.rows):
        answer = row.responses.get(cascade.first)
        if answer is None:
            continue
        tokens = row.token_statistics.get(cascade.first)
        found[JUDGE][index] = row.judged.get(cascade.first, np.nan)
        x = features_of([row.prompt], [answer], [tokens])
        said = sigmoid(cascade.verifier.views.logits(x, [row.prompt], [answer])[0, 0])
        for name, value in zip(VIEW_NAMES, said, strict=True):
            found[name][index] = value
        if tokens is not None:
            found[CERTAINTY][index] = np.exp(tokens.mean_logprob)
    return found


def _view_report(
    name: str,
    said: FloatArray,
    right: FloatArray,
    groups: npt.NDArray[Any],
    repeats: int,
    seed: int,
) -> Mapping[str, Any] | None:
    """One view's worth by itself; None where too few rows have it or all answers are alike."""
    rows = np.flatnonzero(~np.isnan(said) & ~np.isnan(right))
    if len(rows) < MIN_ROWS:
        return None
    said, right = said[rows], right[rows]
    auc, passed = metrics.auc(said, right), metrics.false_positive_rate(said, right)
    if auc is None or passed is None:
        return None
    drawn = list(metrics.resamples(groups[rows], repeats, seed))
    around = metrics.interval([metrics.auc(said[r], right[r]) for r in drawn])
    spread = metrics.interval([metrics.false_positive_rate(said[r], right[r]) for r in drawn])
    within = f" ({around[0]:.3f} to {around[1]:.3f})" if around is not None else ""
    between = f" ({spread[0]:.0%} to {spread[1]:.0%})" if spread is not None else ""
    return {
        "num_rows": len(rows),
        "auc": auc,
        "auc_interval": around,
        "false_positive_rate": passed,
        "false_positive_rate_interval": spread,
        "sentence": (
            f"{name}: AUC {auc:.3f}{within}, {passed:.0%}{between} of the wrong ones taken for "
            f"right, {len(rows):,} rows"
        ),
    }


def cascade_report(
    found: FloatArray,
    quality: FloatArray,
    names: tuple[str, str],
    views: Mapping[str, FloatArray],
    groups: npt.NDArray[Any],
    folds: npt.NDArray[np.int64],
    repeats: int,
    seed: int,
) -> Mapping[str, Any] | None:
    """What routing gains when the first tier's answer is read before deciding."""
    rows = np.flatnonzero(~np.isnan(found).any(axis=1) & ~np.isnan(quality).any(axis=1))
    if len(rows) < MIN_ROWS:
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
        "views": {
            name: one
            for name, told in views.items()
            if (one := _view_report(name, told, quality[:, 0], groups, repeats, seed)) is not None
        },
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
