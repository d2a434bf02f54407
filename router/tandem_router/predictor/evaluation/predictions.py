"""What was predicted for graded rows: by the artifact as the router would, and by simpler ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.cascade.stored import Cascade
from tandem_router.predictor.evaluation import cascade_report
from tandem_router.predictor.evaluation.baselines import baselines
from tandem_router.predictor.linear_algebra import FloatArray
from tandem_router.predictor.records.dataset import Dataset
from tandem_router.predictor.runtime import QUANTILES, Predictor


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
    cost_usd: Mapping[str, FloatArray] = field(default_factory=dict)  # tier -> (num_rows,)
    verdicts: FloatArray | None = None  # (num_rows, 2): both qualities after the first's answer
    # (num_rows,): how good each view of the verifier takes the first's answer for; NaN: unknown
    verifier_views: Mapping[str, FloatArray] = field(default_factory=dict)

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
    costs: dict[str, FloatArray] = {}
    for index, row in enumerate(dataset.rows):
        score, outputs = predictor.score_with_views(row.captured or row.prompt)
        quality[index] = list(score.quality.values())
        utility[index] = list(score.utility.values())
        views[index] = outputs[:, :num_tiers]
        unusual[index] = score.out_of_distribution
        for tier, quantiles in (score.output_tokens or {}).items():
            tokens.setdefault(tier, np.zeros((count, len(QUANTILES))))[index] = quantiles
        for tier, usd in (score.cost_usd or {}).items():
            costs.setdefault(tier, np.zeros(count))[index] = usd
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
        costs,
        cascade_report.verdicts(cascade, dataset, _of_pair(predictor, cascade, quality))
        if cascade
        else None,
        cascade_report.said_by_views(cascade, dataset) if cascade else {},
    )


def _of_pair(predictor: Predictor, cascade: Cascade, quality: FloatArray) -> FloatArray:
    return quality[:, [predictor.tiers.index(tier) for tier in (cascade.first, cascade.second)]]
