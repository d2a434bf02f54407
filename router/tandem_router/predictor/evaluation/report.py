"""How good a predictor is, beside everything simpler: numbers, intervals and an honest sentence.

The same report is made of an artifact on graded data, of cross-validation, and of the
out-of-fold predictions an artifact carries about itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.errors import DataError
from tandem_router.predictor.evaluation import cascade_report, metrics
from tandem_router.predictor.evaluation.baselines import baselines
from tandem_router.predictor.evaluation.verdict import (
    MIN_ROWS,
    ORACLE,
    PREDICTOR,
    Report,
    graded_apart,
    verdict,
)
from tandem_router.predictor.linear_algebra import FloatArray
from tandem_router.predictor.runtime import QUANTILES, Predictor
from tandem_router.predictor.training.dataset import Dataset

NUM_CURVE_POINTS = 201
NUM_SURPRISES = 12


@dataclass(frozen=True, slots=True)
class Predictions:
    """What was predicted for the rows of a dataset, by the predictor and by its baselines.

    `baselines` maps a name to the expected quality per tier ``(num_rows, num_tiers)``; only
    differences between tiers matter. `fold` says which training part a row was predicted from.
    """

    tiers: tuple[str, ...]
    quality: FloatArray  # (num_rows, num_tiers)
    utility: FloatArray  # (num_rows, num_tiers)
    baselines: Mapping[str, FloatArray]
    tokens: Mapping[str, FloatArray]  # tier -> (num_rows, 3)
    unusual: npt.NDArray[np.bool_]  # (num_rows,), out of distribution
    fold: npt.NDArray[np.int64]
    views: Mapping[str, FloatArray]  # what each view said of the tiers, for ablations
    cascade: tuple[str, str] | None = None
    verdicts: FloatArray | None = None  # (num_rows, 2): both qualities after the first's answer

    def gain(self, first: int, second: int) -> FloatArray:
        return self.utility[:, second] - self.utility[:, first]


def predict_rows(predictor: Predictor, dataset: Dataset) -> Predictions:
    """Scores every row with the artifact exactly as the router would."""
    count = len(dataset.rows)
    num_tiers = len(predictor.tiers)
    quality, utility = np.zeros((count, num_tiers)), np.zeros((count, num_tiers))
    views = np.zeros((count, len(predictor.view_names), num_tiers))
    unusual = np.zeros(count, dtype=bool)
    cascade = predictor.cascade
    tokens: dict[str, FloatArray] = {}
    for index, row in enumerate(dataset.rows):
        score, outputs = predictor.score_with_views(row.prompt)
        quality[index] = list(score.quality.values())
        utility[index] = list(score.utility.values())
        views[index] = outputs[:, :num_tiers]
        unusual[index] = score.out_of_distribution
        for tier, quantiles in (score.output_tokens or {}).items():
            tokens.setdefault(tier, np.zeros((count, len(QUANTILES))))[index] = quantiles
    return Predictions(
        predictor.tiers,
        quality,
        utility,
        baselines(dataset, predictor.tiers, views, predictor.view_names, predictor.meta),
        tokens,
        unusual,
        np.zeros(count, dtype=np.int64),
        {name: views[:, index] for index, name in enumerate(predictor.view_names)},
        (cascade.first, cascade.second) if cascade else None,
        cascade_report.verdicts(cascade, dataset) if cascade else None,
    )


def make_report(
    dataset: Dataset,
    predictions: Predictions,
    *,
    repeats: int = 200,
    seed: int = 0,
    curves: bool = True,
) -> Report:
    """All numbers of the evaluation as plain JSON values."""
    labels = _aligned(dataset, predictions.tiers)
    groups = dataset.groups()
    pairs: dict[str, Any] = {}
    for first, second in itertools.permutations(range(len(predictions.tiers)), 2):
        known = np.flatnonzero(~np.isnan(labels[:, first]) & ~np.isnan(labels[:, second]))
        name = f"{predictions.tiers[first]} -> {predictions.tiers[second]}"
        if len(known) >= MIN_ROWS:
            pairs[name] = _pair(
                predictions, labels, groups, known, (first, second), repeats, seed, curves
            )
    apart = graded_apart(labels, predictions.tiers)
    if not pairs:
        raise DataError(
            f"no two of the tiers {', '.join(predictions.tiers)} are graded on the same "
            f"{MIN_ROWS} rows; evaluation needs prompts that both tiers answered"
        )
    cascade = None
    if predictions.cascade and predictions.verdicts is not None:
        first, second = (predictions.tiers.index(tier) for tier in predictions.cascade)
        cascade = cascade_report.cascade_report(
            predictions.verdicts,
            labels[:, [first, second]],
            predictions.cascade,
            groups,
            predictions.fold,
            repeats,
            seed,
        )
    return {
        "data": {
            "digest": dataset.digest,
            "num_rows": len(dataset.rows),
            "num_groups": len(np.unique(groups)),
            "num_rejected": len(dataset.rejected),
        },
        "pairs": pairs,
        "not_judged": apart,
        "heads": _heads(predictions, labels, groups, repeats, seed),
        "lengths": _lengths(dataset, predictions, groups, repeats, seed),
        "cascade": cascade,
        "out_of_distribution_share": float(predictions.unusual.mean()),
        "surprises": _surprises(dataset, predictions, labels, groups),
    }


def _aligned(dataset: Dataset, tiers: Sequence[str]) -> FloatArray:
    unknown = [tier for tier in tiers if tier not in dataset.tiers]
    if len(unknown) > len(tiers) - 2:
        raise DataError(
            f"the data grades {', '.join(dataset.tiers) or 'no tier'}, the predictor knows "
            f"{', '.join(tiers)}; evaluation needs two tiers in common"
        )
    labels = dataset.quality()
    return np.stack(
        [
            labels[:, dataset.tiers.index(tier)]
            if tier in dataset.tiers
            else np.full(len(labels), np.nan)
            for tier in tiers
        ],
        axis=1,
    )


def _pair(
    predictions: Predictions,
    labels: FloatArray,
    groups: npt.NDArray[Any],
    known: npt.NDArray[np.int64],
    pair: tuple[int, int],
    repeats: int,
    seed: int,
    curves: bool,
) -> Report:
    first, second = pair
    low, high = labels[known, first], labels[known, second]
    scores = {PREDICTOR: predictions.gain(first, second)[known]}
    for name, value in predictions.baselines.items():
        scores[name] = (value[:, second] - value[:, first])[known]
    wrong = f"P({predictions.tiers[first]} wrong)"
    scores[wrong] = -predictions.quality[known, first]
    scores[ORACLE] = high - low
    methods = {
        name: _method(score, low, high, groups[known], repeats, seed)
        for name, score in scores.items()
    }
    found: Report = {
        "num_rows": len(known),
        "quality": {
            predictions.tiers[first]: float(low.mean()),
            predictions.tiers[second]: float(high.mean()),
        },
        "methods": methods,
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
        if name not in (PREDICTOR, ORACLE) and method["apgr"] is not None
    }
    if rivals:
        found["best_baseline"] = max(rivals, key=lambda name: rivals[name])
    found["routable"], found["sentence"] = verdict(
        predictions.tiers[first], predictions.tiers[second], found
    )
    if curves:
        found["curves"] = {
            name: _thinned(metrics.curve(score, low, high)) for name, score in scores.items()
        }
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


def _heads(
    predictions: Predictions,
    labels: FloatArray,
    groups: npt.NDArray[Any],
    repeats: int,
    seed: int,
) -> Report:
    heads: Report = {}
    for index, tier in enumerate(predictions.tiers):
        known = np.flatnonzero(~np.isnan(labels[:, index]))
        if len(known) < MIN_ROWS:
            continue
        predicted, actual = predictions.quality[known, index], labels[known, index]
        drawn = list(metrics.resamples(groups[known], repeats, seed))
        bins = np.array_split(np.argsort(predicted, kind="stable"), min(10, len(known)))
        heads[tier] = {
            "num_rows": len(known),
            "mean_quality": float(actual.mean()),
            "ece": metrics.expected_calibration_error(predicted, actual),
            "ece_interval": metrics.interval(
                [metrics.expected_calibration_error(predicted[r], actual[r]) for r in drawn]
            ),
            "ece_if_perfect": metrics.calibration_noise(
                predicted, metrics.expected_calibration_error, seed=seed
            ),
            "ece_equal_count": metrics.adaptive_calibration_error(predicted, actual),
            "ece_equal_count_if_perfect": metrics.calibration_noise(
                predicted, metrics.adaptive_calibration_error, seed=seed
            ),
            "brier": metrics.brier(predicted, actual),
            "brier_interval": metrics.interval(
                [metrics.brier(predicted[r], actual[r]) for r in drawn]
            ),
            "brier_of_the_mean": metrics.brier(np.full(len(known), actual.mean()), actual),
            "reliability": [
                {
                    "predicted": float(predicted[rows].mean()),
                    "actual": float(actual[rows].mean()),
                    "num_rows": len(rows),
                }
                for rows in bins
            ],
        }
    return heads


def _lengths(
    dataset: Dataset,
    predictions: Predictions,
    groups: npt.NDArray[Any],
    repeats: int,
    seed: int,
) -> Report:
    found: Report = {}
    actual = dataset.output_tokens()
    for tier, quantiles in predictions.tokens.items():
        if tier not in dataset.tiers:
            continue
        column = actual[:, dataset.tiers.index(tier)]
        known = ~np.isnan(column)
        if not known.any():
            continue
        found[tier] = {
            "num_rows": int(known.sum()),
            "mean_tokens": float(column[known].mean()),
            "inside_q10_to_q90": float(
                np.mean((column >= quantiles[:, 0])[known] & (column <= quantiles[:, 2])[known])
            ),
        }
        for position, quantile in enumerate(QUANTILES):
            name = f"pinball_q{round(100 * quantile)}"
            forecast, answered = quantiles[known, position], column[known]
            found[tier][name] = metrics.pinball(forecast, answered, quantile)
            found[tier][f"{name}_interval"] = metrics.interval(
                [
                    metrics.pinball(forecast[rows], answered[rows], quantile)
                    for rows in metrics.resamples(groups[known], repeats, seed)
                ]
            )
            constant = np.full(int(known.sum()), np.quantile(column[known], quantile))
            found[tier][f"{name}_of_a_constant"] = metrics.pinball(
                constant, column[known], quantile
            )
    return found


def _surprises(
    dataset: Dataset, predictions: Predictions, labels: FloatArray, groups: npt.NDArray[Any]
) -> list[dict[str, Any]]:
    """Rows whose outcome is farthest from the forecast, one per group."""
    graded = [column[~np.isnan(column)] for column in labels.T]
    order = np.argsort([g.mean() if len(g) else 0.5 for g in graded], kind="stable")
    first, second = int(order[0]), int(order[-1])
    actual = labels[:, second] - labels[:, first]
    distance = np.abs(actual - predictions.gain(first, second))
    found: list[dict[str, Any]] = []
    shown: set[int] = set()
    for index in np.argsort(-np.nan_to_num(distance, nan=-1.0), kind="stable"):
        if np.isnan(distance[index]) or len(found) == NUM_SURPRISES:
            break
        if int(groups[index]) in shown:
            continue
        shown.add(int(groups[index]))
        row = dataset.rows[int(index)]
        found.append(
            {
                "line": row.line,
                "prompt": " ".join(row.prompt[:600].split())[:240],
                "task": row.task,
                "quality": dict(row.quality),
                "predicted": {
                    tier: round(float(value), 4)
                    for tier, value in zip(
                        predictions.tiers, predictions.quality[index], strict=True
                    )
                },
                "out_of_distribution": bool(predictions.unusual[index]),
            }
        )
    return found
