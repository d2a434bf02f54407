"""How long an answer will be: quantiles of the output tokens per tier, conformally widened.

Costs, schedulers and latency estimates need a range, not a mean. Each tier's 10 %, 50 % and 90 %
quantiles of log(1 + tokens) are a ridge on the hand features plus boosted quantile trees on what
it leaves; the outer two are then moved by what cross-fitting shows is missing (Romano et al. 2019,
conformalized quantile regression).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import GradientBoostingRegressor

from tandem_router.predictor import metrics
from tandem_router.predictor.artifact import Arrays
from tandem_router.predictor.data import Dataset
from tandem_router.predictor.estimators import Corpus, HandView, export_trees
from tandem_router.predictor.model import FloatArray
from tandem_router.predictor.runtime import QUANTILES

MIN_ROWS = 50


def train(
    corpus: Corpus,
    dataset: Dataset,
    folds: npt.NDArray[np.int64],
    seed: int,
    progress: Callable[[str], None],
) -> tuple[list[str], Arrays, dict[str, Any]]:
    """Tiers with enough lengths, the heads' arrays, and a report with pinball losses."""
    tokens = dataset.output_tokens()
    tiers = [
        index
        for index in range(len(dataset.tiers))
        if np.count_nonzero(~np.isnan(tokens[:, index])) >= MIN_ROWS
    ]
    if not tiers:
        return [], {}, {}
    progress("fitting the answer lengths")
    width = len(tiers) * len(QUANTILES)
    target = np.log1p(tokens[:, tiers])
    out_of_fold = np.full((len(corpus), width), np.nan)
    for fold in range(min(int(folds.max()) + 1, 3)):
        share = folds % 3 == fold
        inside, outside = np.flatnonzero(~share), np.flatnonzero(share)
        head = _Heads(seed).fit(corpus.take(inside), target[inside])
        out_of_fold[outside] = head.predict(corpus.take(outside))
    shift = np.zeros(width)
    report: dict[str, Any] = {}
    for position, index in enumerate(tiers):
        known = ~np.isnan(target[:, position]) & ~np.isnan(out_of_fold[:, 3 * position])
        actual = target[known, position]
        loss = {}
        for offset, quantile in enumerate(QUANTILES):
            column = 3 * position + offset
            error = np.sort(actual - out_of_fold[known, column])
            rank = min(max(int(np.ceil((len(error) + 1) * quantile)) - 1, 0), len(error) - 1)
            shift[column] = error[rank]
            forecast = np.expm1(out_of_fold[known, column] + shift[column])
            loss[f"q{round(100 * quantile)}"] = metrics.pinball(
                forecast, np.expm1(actual), quantile
            )
        report[dataset.tiers[index]] = {"pinball_tokens": loss, "num_rows": int(known.sum())}
    head = _Heads(seed).fit(corpus, target)
    arrays: Arrays = {f"lengths/linear/{k}": v for k, v in head.linear.export().arrays().items()}
    trees = export_trees(
        [
            (tree.tree_, np.array([column]), model.learning_rate)
            for column, model in enumerate(head.models)
            for tree in model.estimators_[:, 0]
        ],
        np.array([model.init_.constant_.ravel()[0] for model in head.models]),
    )
    arrays |= {f"lengths/trees/{k}": v for k, v in trees.arrays().items()}
    arrays["lengths/shift"] = shift
    return [dataset.tiers[index] for index in tiers], arrays, report


class _Heads:
    """A ridge for the middle and, per tier and quantile, boosted trees on its residuals."""

    def __init__(self, seed: int, num_trees: int = 40) -> None:
        self.seed = seed
        self.num_trees = num_trees

    def fit(self, corpus: Corpus, target: FloatArray) -> _Heads:
        repeated = np.repeat(target, len(QUANTILES), axis=1)
        self.linear = HandView(alpha=30.0).fit(corpus, repeated)
        residual = repeated - self.linear.predict(corpus)
        self.models = []
        for column in range(residual.shape[1]):
            known = ~np.isnan(residual[:, column])
            model = GradientBoostingRegressor(
                loss="quantile",
                alpha=QUANTILES[column % len(QUANTILES)],
                n_estimators=self.num_trees,
                max_depth=3,
                learning_rate=0.1,
                subsample=0.5,
                max_features=0.3,
                min_samples_leaf=10,
                random_state=self.seed,
            )
            self.models.append(model.fit(corpus.hand[known], residual[known, column]))
        return self

    def predict(self, corpus: Corpus) -> FloatArray:
        boosted = np.stack([model.predict(corpus.hand) for model in self.models], axis=1)
        return np.asarray(self.linear.predict(corpus) + boosted)
