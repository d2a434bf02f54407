"""What the views learn: each tier's quality and, per pair, Hybrid LLM's label forms.

Ding et al. 2024 label a pair by P(first at least as good as second), from one answer each, from
several samples, or with a margin t* that spreads the labels most.
"""

from __future__ import annotations

import numpy as np

from tandem_router.predictor.linear_algebra import FloatArray
from tandem_router.predictor.records.dataset import Dataset


def targets_of(
    dataset: Dataset, labels: FloatArray, pairs: list[tuple[int, int]], form: str
) -> tuple[FloatArray, list[str]]:
    """Columns to learn: every tier's quality, and per pair its label where it is not the gain."""
    outputs = list(dataset.tiers)
    if form == "gain":
        return labels, outputs
    columns = [labels]
    for first, second in pairs:
        names = dataset.tiers[first], dataset.tiers[second]
        outputs.append(f"{names[0]} -> {names[1]}")
        columns.append(hybrid_labels(dataset, names, form)[:, None])
    return np.concatenate(columns, axis=1), outputs


def hybrid_labels(dataset: Dataset, pair: tuple[str, str], form: str) -> FloatArray:
    """1 - P(quality of the first >= quality of the second - t): Hybrid LLM's labels, turned.

    `deterministic` compares the means with t = 0; `probabilistic` all pairs of samples with
    t = 0; `transformed` all pairs with the t* that maximises the mean absolute difference between
    two rows' labels (Ding et al. 2024, section 3.3), so that a large gap does not make every
    label the same.
    """
    first, second = pair
    gaps: list[FloatArray | None] = []
    for row in dataset.rows:
        if first not in row.quality or second not in row.quality:
            gaps.append(None)
            continue
        a = np.array(row.samples.get(first, (row.quality[first],)))
        b = np.array(row.samples.get(second, (row.quality[second],)))
        if form == "deterministic":
            a, b = a.mean(keepdims=True), b.mean(keepdims=True)
        gaps.append(np.subtract.outer(b, a).ravel())

    def labels(margin: float) -> FloatArray:
        return np.array(
            [np.nan if gap is None else float(np.mean(gap > margin + 1e-9)) for gap in gaps]
        )

    if form != "transformed":
        return labels(0.0)
    best = max(np.linspace(0.0, 0.9, 19), key=lambda margin: _spread(labels(float(margin))))
    return labels(float(best))


def _spread(labels: FloatArray) -> float:
    known = np.sort(labels[~np.isnan(labels)])
    count = len(known)
    if count < 2:
        return 0.0
    return float(np.sum((2 * np.arange(count) - count + 1) * known) / (count * count))
