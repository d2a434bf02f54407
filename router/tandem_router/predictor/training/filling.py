"""What a row was not graded for is guessed by plain views, so that tiers are learned together."""

from __future__ import annotations

import numpy as np

from tandem_router.predictor.linear_algebra import FloatArray
from tandem_router.predictor.training.corpus import Corpus
from tandem_router.predictor.training.estimators import HandView, TextView, TreeView

#: Trees of the forest that guesses what a row was not graded for.
FILL_TREES = 30


def filled(corpus: Corpus, targets: FloatArray) -> FloatArray:
    """Targets without a gap: what a row was not graded for is what plain views expect of it.

    Tiers graded on different rows are so learned on the same rows: forests share their splits and
    errors of two tiers cancel in their difference, where a forest per tier ranks two good models by
    its own noise. Grades given together still rank better (docs/studies/routing.md).
    """
    missing = np.isnan(targets)
    if not missing.any():
        return targets
    known = (~missing).any(axis=0)
    guess = np.full_like(targets, 0.5)
    part = targets[:, known]
    words = TextView("word", "squared", 3.0).fit(corpus, part).predict(corpus)
    hand = HandView(alpha=30.0).fit(corpus, part).predict(corpus)
    trees = TreeView(num_trees=FILL_TREES).fit(corpus, part).predict(corpus)
    guess[:, known] = np.clip((words + hand + 2.0 * trees) / 4.0, 0.0, 1.0)
    return np.where(missing, guess, targets)
