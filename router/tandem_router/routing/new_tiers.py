"""A tier that the predictor has never seen: asked unseen until it is known, then weighed.

While fewer than `ENOUGH` labels tell of it, every request that may be learned from is
answered by it too, unseen, within the day's money. What they say makes its quality a function of
what is predicted of the tiers that are known; it begins as the cheapest of these, and is weighed
from `FIRST` labels on. A predictor that knows the tier takes its place. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from tandem_router.policy import PlainScore, Score
from tandem_router.store.records import Label

#: Labels before which a tier is not used, and until which it is looked at more than others.
FIRST, ENOUGH = 20, 40
#: Of requests, as long as a tier is looked at.
EXPLORED_SHARE = 1.0
#: Labels of the newest that count.
MOST_LABELS = 500
#: Labels at which what they say counts as much as the guess.
GUESS_WORTH = 5.0


class NewTier:
    """Quality of one tier, from two predictions: (1, lowest known tier, highest known tier)."""

    def __init__(self) -> None:
        self._said: OrderedDict[str, tuple[float, float, float]] = OrderedDict()
        self._weights: NDArray[np.float64] | None = None

    @property
    def num_labels(self) -> int:
        return len(self._said)

    def learn(self, request_id: str, lowest: float, highest: float, quality: float) -> None:
        """quality: as measured, on the predictor's scale. A request counts once."""
        self._said[request_id] = (lowest, highest, quality)
        if len(self._said) > MOST_LABELS:
            self._said.popitem(last=False)
        self._weights = None

    def quality(self, lowest: float, highest: float) -> float | None:
        """None until enough is known."""
        if len(self._said) < FIRST:
            return None
        if self._weights is None:
            rows = np.array(list(self._said.values()))
            x = np.column_stack([np.ones(len(rows)), rows[:, :2]])
            guess = np.array([0.0, 1.0, 0.0])
            # Slopes need many labels, the level few.
            ridge = np.diag([GUESS_WORTH, 4 * GUESS_WORTH, 4 * GUESS_WORTH])
            beyond = x.T @ (rows[:, 2] - x @ guess)
            self._weights = guess + np.linalg.solve(x.T @ x + ridge, beyond)
        level, low, high = map(float, self._weights)
        return min(1.0, max(0.0, level + low * lowest + high * highest))


class NewTiers:
    """Those of one router. tiers: of the router, cheapest first; known: to the predictor."""

    def __init__(self) -> None:
        self._tiers: tuple[str, ...] = ()
        self._new: dict[str, NewTier] = {}

    def set_tiers(self, tiers: tuple[str, ...], known: Collection[str] | None) -> None:
        """known: None where nothing is learned, so that no tier is newer than others."""
        self._tiers = tiers
        new = [] if known is None or not set(known) & set(tiers) else set(tiers) - set(known)
        self._new = {tier: self._new.get(tier) or NewTier() for tier in new}

    @property
    def num(self) -> int:
        return len(self._new)

    @property
    def to_explore(self) -> str | None:
        """A tier of which more has to be known."""
        return next((t for t, new in self._new.items() if new.num_labels < ENOUGH), None)

    def _ends(self, quality: Mapping[str, float]) -> tuple[float, float] | None:
        known = [quality[t] for t in self._tiers if t in quality and t not in self._new]
        return (known[0], known[-1]) if known else None

    def learn(self, label: Label) -> None:
        """A label of a new tier and a known one."""
        ends = self._ends(label.predicted) if self._new else None
        if ends is None or label.source == "feedback":
            return
        for tier, new in self._new.items():
            known = (t for t in label.quality if t not in self._new and t in label.predicted)
            if tier in label.quality and (other := next(known, None)):
                # Whatever the judge's level is, both answers have it.
                beside = label.quality[tier] - label.quality[other] + label.predicted[other]
                new.learn(label.request_id, *ends, beside)

    def complete(self, score: Score | None) -> Score | None:
        """The score, with tiers that the predictor lacks."""
        if not self._new or score is None:
            return score
        ends = self._ends(score.quality)
        if ends is None:
            return score
        found = {tier: new.quality(*ends) for tier, new in self._new.items()}
        more = {tier: quality for tier, quality in found.items() if quality is not None}
        if not more:
            return score
        return PlainScore(
            {**score.quality, **more},
            score.output_tokens,
            score.out_of_distribution,
            getattr(score, "mean_tokens", None),
        )

    def state(self) -> dict[str, int]:
        """Labels of each new tier."""
        return {tier: new.num_labels for tier, new in self._new.items()}
