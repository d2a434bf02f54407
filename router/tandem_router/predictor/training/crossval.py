"""Cross-validation of the whole method: every part is predicted by an artifact that never saw it.

Each fold trains an artifact on the other folds, inner cross-fitting included, and scores its rows
through the serving code, so that the numbers are those of the thing that would be deployed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tandem_router.predictor import runtime
from tandem_router.predictor.errors import DataError
from tandem_router.predictor.evaluation import verdict
from tandem_router.predictor.evaluation.predictions import Predictions, predict_rows
from tandem_router.predictor.records.dataset import Dataset
from tandem_router.predictor.training import trainer
from tandem_router.predictor.training.options import Options


def cross_validate(
    dataset: Dataset,
    options: Options,
    num_folds: int,
    progress: Callable[[str], None] = lambda _: None,
    by: np.ndarray | None = None,
) -> Predictions:
    """Predictions for every row from `num_folds` artifacts; groups are never split.

    `by` replaces the groups by something coarser that must not be split, such as the subject.
    """
    folds = check(dataset, options, num_folds, by)
    parts: list[tuple[np.ndarray, Predictions]] = []
    for fold in range(num_folds):
        progress(f"fold {fold + 1} of {num_folds}")
        inside, outside = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        trained = trainer.train(dataset.take(inside), options)
        predictor = runtime.loads(trained.dumps(), options.embedding)
        parts.append((outside, predict_rows(predictor, dataset.take(outside))))
    return _joined(parts, folds)


def check(
    dataset: Dataset, options: Options, num_folds: int, by: np.ndarray | None = None
) -> np.ndarray:
    """The fold of each row, or a :class:`DataError` that says why the data cannot be divided."""
    trainer.check(dataset, options)
    groups = dataset.groups() if by is None else by
    most = len(dataset.rows) // trainer.MIN_ROWS + 1 if by is None else len(np.unique(groups))
    if not 2 <= num_folds <= most:
        raise DataError(
            f"{num_folds} folds are not possible with {len(dataset.rows)} rows in "
            f"{len(np.unique(groups))} groups; use --cross-validate 2 to {most}"
        )
    apart = verdict.graded_apart(dataset.quality(), dataset.tiers)
    if len(apart) == len(dataset.tiers) * (len(dataset.tiers) - 1) // 2:
        raise DataError(f"cross-validation has nothing to judge: {apart[0]}")
    folds = trainer.fold_of(groups, num_folds, options.seed + 1)
    for fold in range(num_folds):
        try:
            trainer.check(dataset.take(np.flatnonzero(folds != fold)), options)
        except DataError as error:
            raise DataError(
                f"without part {fold + 1} of {num_folds}, {error}; or leave out --cross-validate"
            ) from error
    return folds


def _joined(parts: list[tuple[np.ndarray, Predictions]], folds: np.ndarray) -> Predictions:
    order = np.argsort(np.concatenate([rows for rows, _ in parts]), kind="stable")
    found = [predictions for _, predictions in parts]
    shared = set.intersection(*(set(part.baselines) for part in found))
    lengths = set.intersection(*(set(part.tokens) for part in found))
    priced = set.intersection(*(set(part.cost_usd) for part in found))
    agreed = found[0].cascade is not None and len({part.cascade for part in found}) == 1
    return Predictions(
        found[0].tiers,
        np.concatenate([part.quality for part in found])[order],
        np.concatenate([part.utility for part in found])[order],
        {
            name: np.concatenate([part.baselines[name] for part in found])[order]
            for name in found[0].baselines
            if name in shared
        },
        {
            tier: np.concatenate([part.tokens[tier] for part in found])[order]
            for tier in found[0].tokens
            if tier in lengths
        },
        np.concatenate([part.unusual for part in found])[order],
        folds,
        {
            name: np.concatenate([part.views[name] for part in found])[order]
            for name in found[0].views
        },
        found[0].cascade if agreed else None,
        {
            tier: np.concatenate([part.cost_usd[tier] for part in found])[order]
            for tier in found[0].cost_usd
            if tier in priced
        },
        np.concatenate([part.verdicts for part in found if part.verdicts is not None])[order]
        if agreed
        else None,
    )
