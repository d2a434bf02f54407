"""How long an answer will be and what it will cost, per tier, calibrated out of fold.

Costs, schedulers and latency estimates need a range, not a mean. One forest predicts
log(1 + tokens) of every tier, a second how far off the first was on prompts it had not seen. The
10 %, 50 % and 90 % quantiles are ``middle + spread * k``, each k the conformal quantile of the
scaled out-of-fold errors (Lei et al. 2018, locally weighted conformal prediction): on new prompts
from the same source each quantile is exceeded as often as it says. Boosted quantile trees were
tried instead: forty times the training time, the same pinball loss.

What a thousand requests will cost is a sum, and a sum of medians is too low by a third where few
answers are long. So a third forest predicts the mean itself, of tokens and, where rows say what
they cost, of dollars, scaled by what was spent over what was predicted out of fold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.artifact import Arrays
from tandem_router.predictor.evaluation import metrics
from tandem_router.predictor.linear_algebra import FloatArray, Trees, join_trees
from tandem_router.predictor.runtime import MIN_SPREAD, QUANTILES
from tandem_router.predictor.training.corpus import Corpus
from tandem_router.predictor.training.estimators import TreeView

MIN_ROWS = 50
NUM_FOLDS = 3


@dataclass(frozen=True, slots=True)
class Lengths:
    """The heads of an artifact: tiers with lengths, tiers with costs, arrays, and a report."""

    length_tiers: list[str]
    cost_tiers: list[str]
    arrays: Arrays
    report: dict[str, Any]


def train(
    corpus: Corpus,
    names: tuple[str, ...],
    tokens: FloatArray,
    costs: FloatArray,
    folds: npt.NDArray[np.int64],
    seed: int,
    progress: Callable[[str], None],
    *,
    num_trees: int = 50,
    max_leaf_nodes: int | None = 256,
) -> Lengths:
    """Heads for the tiers with enough lengths or costs.

    tokens, costs: of every answer, ``(num_rows, num_tiers)``, NaN where not known; names: the
    tiers.
    """
    tiers, cost_tiers = _known_often(tokens), _known_often(costs)
    if not tiers and not cost_tiers:
        return Lengths([], [], {}, {})
    progress("fitting the answer lengths and costs")
    forest = TreeView(
        num_trees=num_trees, min_samples_leaf=8, max_leaf_nodes=max_leaf_nodes, random_state=seed
    )
    report: dict[str, Any] = {}
    grown: list[Trees] = []
    arrays: Arrays = {"lengths/factors": np.zeros((len(tiers), len(QUANTILES)))}
    if tiers:
        target = np.log1p(tokens[:, tiers])
        middle = _out_of_fold(forest, corpus, target, folds)
        missed = np.abs(target - middle)
        spread = np.maximum(_out_of_fold(forest, corpus, missed, folds), MIN_SPREAD)
        scaled = (target - middle) / spread
        for position, index in enumerate(tiers):
            known = ~np.isnan(scaled[:, position])
            factors, loss = _factors(
                scaled[known, position],
                middle[known, position],
                spread[known, position],
                tokens[known, index],
            )
            arrays["lengths/factors"][position] = factors
            report[names[index]] = {"pinball_tokens": loss, "num_rows": int(known.sum())}
        grown += [forest.fit(corpus, part).export()[1] for part in (target, missed)]
    means = np.concatenate((tokens[:, tiers], costs[:, cost_tiers]), axis=1)
    unit = np.maximum(np.nanmean(means, axis=0), 1e-12)
    smooth = TreeView(
        num_trees=num_trees, min_samples_leaf=15, max_leaf_nodes=max_leaf_nodes, random_state=seed
    )
    said = _out_of_fold(smooth, corpus, means / unit, folds)
    known = ~np.isnan(means)
    counted = np.where(known, said, 0.0).sum(axis=0) * unit
    arrays["lengths/units"] = unit * np.nansum(means, axis=0) / np.maximum(counted, 1e-12)
    grown.append(smooth.fit(corpus, means / unit).export()[1])
    arrays |= {f"lengths/trees/{key}": value for key, value in join_trees(grown).arrays().items()}
    return Lengths(
        [names[index] for index in tiers],
        [names[index] for index in cost_tiers],
        arrays,
        report,
    )


def _known_often(values: FloatArray) -> list[int]:
    return [i for i, column in enumerate(values.T) if (~np.isnan(column)).sum() >= MIN_ROWS]


def _factors(
    scaled: FloatArray, middle: FloatArray, spread: FloatArray, tokens: FloatArray
) -> tuple[FloatArray, dict[str, float]]:
    """The conformal factor of each quantile, and the pinball loss with it."""
    errors = np.sort(scaled)
    factors = np.zeros(len(QUANTILES))
    loss = {}
    for column, quantile in enumerate(QUANTILES):
        rank = int(np.ceil((len(errors) + 1) * quantile)) - 1
        factors[column] = errors[min(max(rank, 0), len(errors) - 1)]
        forecast = np.expm1(middle + spread * factors[column])
        loss[f"q{round(100 * quantile)}"] = metrics.pinball(forecast, tokens, quantile)
    return factors, loss


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
