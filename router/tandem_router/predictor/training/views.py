"""The views a predictor is made of, and their cross-fitting.

Nobody knows beforehand which view of a prompt a pair of models rewards: all are fitted, and
:mod:`tandem_router.predictor.training.stacking` weighs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_router.predictor import artifact
from tandem_router.predictor.artifact import Arrays
from tandem_router.predictor.linear_algebra import FloatArray
from tandem_router.predictor.training.corpus import Corpus
from tandem_router.predictor.training.estimators import (
    TOPIC_FEATURES,
    DenseView,
    HandView,
    NeighbourView,
    TextView,
    TreeView,
)
from tandem_router.predictor.training.filling import filled
from tandem_router.predictor.training.options import Options

View = TextView | HandView | TreeView | NeighbourView | DenseView

#: How much heavier than a text view a forest is in the average, and the rows at which it is twice
#: that: sparse words learn least from few labels. On 77 cases (five pairs, parts of them, 300 to
#: 4,500 labels) the weights lower the distance to the best baseline; MMLU pays 0.001 for them.
FOREST_WEIGHT = 1.5
FOREST_ROWS = 600.0
NUM_TOPICS = 40
#: Header, evaluation, calibration and length heads under a size limit.
RESERVED_BYTES = 120_000
#: Training prompts kept as neighbours.
MAX_POINTS = 4096


def core_views(num_rows: int) -> dict[str, float]:
    """Views whose average is the ranking to beat, with their weights."""
    forest = FOREST_WEIGHT * (1.0 + FOREST_ROWS / num_rows)
    return {
        "words": 1.0,
        "chars": 1.0,
        "trees": forest,
        "topics": forest,
        "embedding": 1.25,
    }


def default_views(options: Options, num_tiers: int = 2, num_rows: int = 0) -> dict[str, View]:
    """The views by name; what each is worth stands in docs/studies/routing.md.

    Under a size limit a fifth goes to each text view, a fifth to the topics' words and the
    neighbours, and what is left, less a reserve for the rest, to the two forests. Without one,
    `num_rows` tells whether the views would outgrow what an artifact may take.
    """
    features, topic_features, leaves = options.max_features, TOPIC_FEATURES, None
    num_trees, seed, max_points = options.num_trees, options.seed, MAX_POINTS
    outputs = num_tiers + (0 if options.label_form == "gain" else num_tiers**2 // 2)
    nodes = 2.0 * num_rows / TreeView().min_samples_leaf
    limit, per_node = options.max_bytes, 9 + 4 * outputs
    size = 2 * features * (8 + 4 * outputs) + 2 * num_trees * nodes * per_node
    if limit is None and size > 0.8 * artifact.MAX_BYTES:
        limit = int(0.8 * artifact.MAX_BYTES)  # the rest is for an evaluation of many pairs
    if limit is not None:
        part = max(limit - RESERVED_BYTES, 0) / 5.0
        features = min(features, max(int(part / (8 + 4 * outputs)), 100))
        topic_features = min(topic_features, max(int(0.6 * part / (8 + 2 * NUM_TOPICS)), 50))
        per_point = 2 * NeighbourView().num_dims + 4 * outputs
        max_points = min(max_points, max(int(0.4 * part / per_point), 100))
        leaves = max(int(part / num_trees / per_node / 2), 4)
    views: dict[str, View] = {
        "words": TextView("word", "logistic", 1.0, 2, features),
        "chars": TextView("char", "squared", 6.0, 3, features),
        "trees": TreeView(0, num_trees=num_trees, max_leaf_nodes=leaves, random_state=seed),
        "topics": TreeView(
            NUM_TOPICS,
            topic_features,
            num_trees=num_trees,
            max_leaf_nodes=leaves,
            random_state=seed,
        ),
        "neighbours": NeighbourView(
            NUM_TOPICS, topic_features, max_points=max_points, random_state=seed
        ),
        "hand": HandView(alpha=30.0),
        "length": HandView(alpha=1.0, columns=("log_chars",)),
    }
    if options.embedding is not None:
        views["embedding"] = DenseView()  # the last: without its directory, the rest goes on
    return views


def cross_fit(
    corpus: Corpus,
    targets: FloatArray,
    folds: npt.NDArray[np.int64],
    views: Mapping[str, View],
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[FloatArray, FloatArray]:
    """Out-of-fold view outputs ``(num_rows, num_views, num_outputs)`` and unknown-word shares."""
    out = np.zeros((len(corpus), len(views), targets.shape[1]))
    unknown = np.zeros(len(corpus))
    for fold in range(int(folds.max()) + 1):
        progress(f"cross-fitting, part {fold + 1} of {int(folds.max()) + 1}")
        inside, outside = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        known_part, held_out = corpus.take(inside), corpus.take(outside)
        learned = filled(known_part, targets[inside])
        for index, view in enumerate(views.values()):
            fitted = view.fit(known_part, learned)
            out[outside, index] = fitted.predict(held_out)
            if isinstance(fitted, TextView) and fitted.kind == "word":
                unknown[outside] = fitted.unknown_share(held_out)
    return out, unknown


def export_view(name: str, view: View) -> tuple[dict[str, Any], Arrays]:
    """A fitted view as metadata and arrays."""
    if isinstance(view, TextView):
        text_part = view.export()
        return {"name": name, "type": "text", **text_part.describe()}, text_part.arrays()
    if isinstance(view, HandView):
        return {"name": name, "type": "hand"}, view.export().arrays()
    if isinstance(view, NeighbourView):
        width = view.space_.components.shape[1]
        return {"name": name, "type": "neighbours", "width": width}, view.export().arrays()
    if isinstance(view, DenseView):
        return {"name": name, "type": "embedding"}, view.export().arrays()
    topics, trees = view.export()
    described: dict[str, Any] = {"name": name, "type": "trees"}
    arrays = trees.arrays()
    if topics is not None:
        described |= {"topics": {**topics.describe(), "width": topics.coef.shape[1]}}
        arrays |= {f"topics/{key}": value for key, value in topics.arrays().items()}
    return described, arrays
