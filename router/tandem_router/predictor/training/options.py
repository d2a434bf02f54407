"""The options of training a predictor."""

from __future__ import annotations

from dataclasses import dataclass

from tandem_router.predictor.reading.embedding import StaticEmbedding

#: Least and most of each option; seeds are what numpy's and scikit-learn's generators take.
OPTION_BOUNDS = {
    "seed": (0, 2**32 - 2),
    "max_features": (1, 10_000_000),
    "max_bytes": (1, 2**40),
    "num_trees": (1, 10_000),
    "num_folds": (2, 1000),
}
LABEL_FORMS = ("gain", "deterministic", "probabilistic", "transformed")


@dataclass(frozen=True, slots=True)
class Options:
    """How to train; the defaults are the study's choice (docs/studies/routing.md).

    label_form: what the ranker learns: `gain` the difference of qualities, or one of Hybrid LLM's
    forms (Ding et al. 2024): P(first at least as good as second), from one answer each, from
    several samples, or with the margin t* that spreads the labels most.
    max_features: n-grams kept per text view.
    max_bytes: size the artifact may take, shared out between the views; a ConfigMap holds 1 MiB.
    num_trees: trees of the forest.
    num_folds: folds of the cross-fitting.
    embedding: token vectors of a local model directory as a further view.
    """

    seed: int = 0
    label_form: str = "gain"
    max_features: int = 60_000
    max_bytes: int | None = None
    num_trees: int = 100
    num_folds: int = 5
    embedding: StaticEmbedding | None = None
