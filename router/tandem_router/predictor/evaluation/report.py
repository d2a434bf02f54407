"""How good a predictor is, beside everything simpler: numbers, intervals and an honest sentence.

The same report is made of an artifact on graded data, of cross-validation, and of the
out-of-fold predictions an artifact carries about itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.errors import DataError
from tandem_router.predictor.evaluation import cascade_report, metrics
from tandem_router.predictor.evaluation.costs import Prices, row_costs
from tandem_router.predictor.evaluation.pair_report import in_order, pair_report
from tandem_router.predictor.evaluation.predictions import Predictions
from tandem_router.predictor.evaluation.verdict import MIN_ROWS, Report, graded_apart
from tandem_router.predictor.linear_algebra import FloatArray
from tandem_router.predictor.records.dataset import Dataset
from tandem_router.predictor.runtime import QUANTILES

NUM_SURPRISES = 12


def make_report(
    dataset: Dataset,
    predictions: Predictions,
    *,
    repeats: int = 200,
    seed: int = 0,
    curves: bool = True,
    prices: Prices | None = None,
) -> Report:
    """All numbers of the evaluation as plain JSON values.

    Each pair of tiers is reported once, from the cheaper to the dearer tier.
    """
    labels = _aligned(dataset, predictions.tiers)
    groups = dataset.groups()
    costs = row_costs(dataset, predictions.tiers, prices or {})
    pairs: dict[str, Any] = {}
    for one, other in itertools.combinations(range(len(predictions.tiers)), 2):
        known = np.flatnonzero(~np.isnan(labels[:, one]) & ~np.isnan(labels[:, other]))
        if len(known) >= MIN_ROWS:
            pair = in_order(labels[known], costs, one, other)
            name = " -> ".join(predictions.tiers[index] for index in pair)
            pairs[name] = pair_report(
                predictions, labels, costs, groups, known, pair, repeats, seed, curves
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
            predictions.verifier_views,
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
        "tiers": list(predictions.tiers),
        "in_usd": costs is not None,
        "pairs": pairs,
        "not_judged": apart,
        "heads": _heads(predictions, labels, groups, repeats, seed),
        "lengths": _lengths(dataset, predictions, groups, repeats, seed),
        "spend": _spend(dataset, predictions),
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


def _spend(dataset: Dataset, predictions: Predictions) -> Report:
    """Per tier, what the answers cost and what was predicted of them, US dollars per request."""
    found: Report = {}
    for tier, predicted in predictions.cost_usd.items():
        actual = np.array([row.cost_usd.get(tier, np.nan) for row in dataset.rows])
        known = ~np.isnan(actual)
        if known.any():
            spent, said = float(actual[known].mean()), float(predicted[known].mean())
            found[tier] = {
                "num_rows": int(known.sum()),
                "mean_usd": spent,
                "predicted_mean_usd": said,
                "error": said / spent - 1.0 if spent > 0.0 else None,
            }
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
