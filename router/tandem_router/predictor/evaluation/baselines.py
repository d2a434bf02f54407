"""What a predictor has to beat: random, length, task table and single views, from the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tandem_router.predictor.errors import ArtifactError
from tandem_router.predictor.evaluation.verdict import RANDOM
from tandem_router.predictor.linear_algebra import FloatArray
from tandem_router.predictor.records.dataset import Dataset

#: The simple ways that are views of the predictor's own.
COLUMNS = {"TF-IDF pair": "words", "ridge gain": "chars", "kNN": "neighbours"}


def baselines(
    dataset: Dataset,
    tiers: Sequence[str],
    views: FloatArray,
    names: Sequence[str],
    meta: Mapping[str, Any],
) -> dict[str, FloatArray]:
    """Simpler predictors, learned from the same training rows, as qualities per tier.

    random: nothing is known. prompt length: longer prompts to the tier that is better on average.
    task table: the mean quality of the row's `task`, of all rows where it is unknown. TF-IDF pair:
    one logistic head per tier on words. ridge gain: ridge regression of the difference on n-grams.
    kNN: the outcomes of the most similar prompts. P(<tier> wrong) is made per pair by the report.
    """
    count = len(dataset.rows)
    length = np.array(
        [row.captured.num_chars if row.captured else float(len(row.prompt)) for row in dataset.rows]
    )
    means, table = _facts(meta, len(tiers))
    direction = np.argsort(np.argsort(means, kind="stable"), kind="stable").astype(float)
    found = {
        RANDOM: np.zeros((count, len(tiers))),
        "prompt length": np.log1p(length)[:, None] * direction,
    }
    if table and any(row.task in table for row in dataset.rows):
        found["task table"] = np.array([table.get(row.task, means) for row in dataset.rows])
    for name, view in COLUMNS.items():
        if view in names:
            found[name] = views[:, list(names).index(view)]
    return found


def _facts(meta: Mapping[str, Any], num_tiers: int) -> tuple[FloatArray, dict[str, FloatArray]]:
    """The mean quality per tier and per task that an artifact carries, checked."""
    try:
        means = np.array(meta.get("mean_quality", [0.0] * num_tiers), dtype=np.float64)
        rows = (meta.get("task_table") or {}).items()
        table = {task: np.array(row, dtype=np.float64) for task, row in rows}
    except (AttributeError, TypeError, ValueError) as error:
        raise ArtifactError(f"its task table cannot be read ({error}): damaged") from error
    for row in (means, *table.values()):
        if row.shape != (num_tiers,) or not np.isfinite(row).all():
            raise ArtifactError(f"its task table has not one number per tier ({row}): damaged")
    return means, table


def training_facts(dataset: Dataset) -> dict[str, Any]:
    """What the content-blind baselines learn: mean quality per tier, and per task and tier."""
    labels = dataset.quality()
    known = [column[~np.isnan(column)] for column in labels.T]
    overall = [float(column.mean()) if len(column) else 0.5 for column in known]
    table: dict[str, list[float]] = {}
    tasks = sorted({row.task for row in dataset.rows if row.task})
    if 2 <= len(tasks) <= 200:
        of = np.array([row.task for row in dataset.rows])
        for task in tasks:
            part = labels[of == task]
            counts = (~np.isnan(part)).sum(axis=0)
            sums = np.nansum(part, axis=0)
            # five rows' worth of the overall mean: a task seen twice says little
            means = (sums + 5.0 * np.array(overall)) / (counts + 5.0)
            table[task] = [round(float(m), 6) for m in means]
    return {"mean_quality": [round(mean, 6) for mean in overall], "task_table": table}
