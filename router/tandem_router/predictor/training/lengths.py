"""How long an answer will be: quantiles of the output tokens per tier, calibrated out of fold.

Costs, schedulers and latency estimates need a range, not a mean. One forest predicts
log(1 + tokens) of every tier, a second how far off the first was on prompts it had not seen. The
10 %, 50 % and 90 % quantiles are ``middle + spread * k``, each k the conformal quantile of the
scaled out-of-fold errors (Lei et al. 2018, locally weighted conformal prediction): on new prompts
from the same source each quantile is exceeded as often as it says. Boosted quantile trees were
tried instead: forty times the training time, the same pinball loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.artifact import Arrays
from tandem_router.predictor.evaluation import metrics
from tandem_router.predictor.linear_algebra import FloatArray, join_trees
from tandem_router.predictor.runtime import MIN_SPREAD, QUANTILES
from tandem_router.predictor.training.dataset import Dataset
from tandem_router.predictor.training.estimators import Corpus, TreeView

MIN_ROWS = 50
NUM_FOLDS = 3


def train(
    corpus: Corpus,
    dataset: Dataset,
    folds: npt.NDArray[np.int64],
    seed: int,
    progress: Callable[[str], None],
    *,
    num_trees: int = 50,
    max_leaf_nodes: int | None = 256,
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
    target = np.log1p(tokens[:, tiers])
    forest = TreeView(
        num_trees=num_trees, min_samples_leaf=8, max_leaf_nodes=max_leaf_nodes, random_state=seed
    )
    middle = _out_of_fold(forest, corpus, target, folds)
    missed = np.abs(target - middle)
    spread = np.maximum(_out_of_fold(forest, corpus, missed, folds), MIN_SPREAD)
    scaled = (target - middle) / spread
    factors = np.zeros((len(tiers), len(QUANTILES)))
    report: dict[str, Any] = {}
    for position, index in enumerate(tiers):
        known = ~np.isnan(scaled[:, position])
        errors = np.sort(scaled[known, position])
        loss = {}
        for column, quantile in enumerate(QUANTILES):
            rank = int(np.ceil((len(errors) + 1) * quantile)) - 1
            factors[position, column] = errors[min(max(rank, 0), len(errors) - 1)]
            forecast = middle[known, position] + spread[known, position] * factors[position, column]
            loss[f"q{round(100 * quantile)}"] = metrics.pinball(
                np.expm1(forecast), tokens[known, index], quantile
            )
        report[dataset.tiers[index]] = {"pinball_tokens": loss, "num_rows": int(known.sum())}
    _, middles = forest.fit(corpus, target).export()
    _, spreads = forest.fit(corpus, missed).export()
    joined = join_trees([middles, spreads])
    arrays: Arrays = {f"lengths/trees/{key}": value for key, value in joined.arrays().items()}
    arrays["lengths/factors"] = factors
    return [dataset.tiers[index] for index in tiers], arrays, report


def _out_of_fold(
    forest: TreeView, corpus: Corpus, target: FloatArray, folds: npt.NDArray[np.int64]
) -> FloatArray:
    out = np.zeros_like(target)
    num_folds = min(NUM_FOLDS, int(folds.max()) + 1)
    for fold in range(num_folds):
        held_out = folds % num_folds == fold
        inside, outside = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        if len(inside) and len(outside):
            fitted = forest.fit(corpus.take(inside), target[inside])
            out[outside] = fitted.predict(corpus.take(outside))
    return out
