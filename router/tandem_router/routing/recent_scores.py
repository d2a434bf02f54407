"""What a prompt's length says where its score is late: the last scores, ranked by length.

A busy CPU makes predictors late, and just then nothing should go to the dear tier that need not.
Longer prompts are taken to be harder, as by the length predictor, but on the scale of the scores
that came in time: a prompt at the 30th percentile of the last lengths gets the 30th percentile of
the last gains, so the threshold sends as many requests to each tier as before. Pure.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from tandem_router.policy import PlainScore, Score

KEPT = 256
LEAST = 8  # scores before which nothing is estimated
RENEWED_EVERY = 32  # scores after which the quantiles are taken anew


class _Quantiles(Struct):
    lengths: list[int]  # of prompts, ascending
    best: float  # mean quality of the best tier
    gains: dict[str, list[float]]  # of the best tier over each, ascending
    output_tokens: dict[str, tuple[float, float, float]]
    mean_tokens: dict[str, float]


class RecentScores:
    """The last scores of one predictor; gains: how its qualities are to be read."""

    def __init__(self, gains: Callable[[Score], Score] = lambda score: score) -> None:
        self._gains = gains
        self._seen: deque[tuple[int, Score]] = deque(maxlen=KEPT)
        self._num_since = 0
        self._quantiles: _Quantiles | None = None

    def saw(self, num_chars: int, score: Score) -> None:
        """A score that was made, in time or not."""
        if not score.out_of_distribution:
            self._seen.append((num_chars, score))
            self._num_since += 1

    def forget(self) -> None:
        """Another predictor is in use: its scale is another one."""
        self._seen.clear()
        self._quantiles = None

    def estimate(self, num_chars: int) -> PlainScore | None:
        """A score by length alone; None while too little is known."""
        if len(self._seen) < LEAST:
            return None
        if self._quantiles is None or self._num_since >= RENEWED_EVERY:
            self._quantiles, self._num_since = self._taken(), 0
        known = self._quantiles
        if not known.gains:
            return None
        rank = bisect_left(known.lengths, num_chars) / len(known.lengths)
        quality = {
            tier: min(1.0, max(0.0, known.best - _quantile(gains, rank)))
            for tier, gains in known.gains.items()
        }
        return PlainScore(
            quality, known.output_tokens or None, mean_tokens=known.mean_tokens or None
        )

    def _taken(self) -> _Quantiles:
        scores = [self._gains(score) for _, score in self._seen]
        tiers = [
            tier
            for tier in scores[-1].quality
            if all(_good(score.quality.get(tier)) for score in scores)
        ]
        means = {tier: _mean([score.quality[tier] for score in scores]) for tier in tiers}
        best = max(tiers, key=lambda tier: means[tier], default="")
        lengths = [score.output_tokens for score in scores if score.output_tokens]
        told: list[Mapping[str, float]] = [
            mean for score in scores if (mean := getattr(score, "mean_tokens", None))
        ]
        return _Quantiles(
            lengths=sorted(num_chars for num_chars, _ in self._seen),
            best=means.get(best, 0.0),
            gains={
                tier: sorted(score.quality[best] - score.quality[tier] for score in scores)
                for tier in tiers
            },
            output_tokens={
                tier: (
                    _mean([each[tier][0] for each in rows]),
                    _mean([each[tier][1] for each in rows]),
                    _mean([each[tier][2] for each in rows]),
                )
                for tier in tiers
                if (rows := [each for each in lengths if tier in each])
            },
            mean_tokens={
                tier: _mean([each[tier] for each in means_of])
                for tier in tiers
                if (means_of := [each for each in told if tier in each])
            },
        )


def _good(value: float | None) -> bool:
    return value is not None and 0.0 <= value <= 1.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _quantile(ascending: Sequence[float], rank: float) -> float:
    return ascending[min(len(ascending) - 1, int(rank * len(ascending)))]
