"""Answer a small share of requests with both tiers, at a probability that is written down.

A label drawn with probability pi counts 1/pi times, so estimates are unbiased for all traffic
however the probabilities are chosen. They are chosen by price: where the large tier answers
anyway, the second answer is a cheap small one, so it is asked for more often.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ShadowPlan:
    """A second answer to fetch in the background and never to show."""

    tier: str
    probability: float  # stored with the label


@dataclass(frozen=True, slots=True)
class ShadowLabel:
    """Both tiers' judged quality for one request."""

    gain: float  # predicted, as the policy saw it
    quality_small: float  # 0..1
    quality_large: float  # 0..1
    probability: float  # with which this request was drawn
    # Predicted qualities, where the caller has them: they let a change show much earlier.
    predicted_small: float | None = None
    predicted_large: float | None = None


class ShadowSampler:
    """Draws requests for shadowing.

    Args:
        after_small: probability where another than the dearest tier answers, so that the shadow
            is the dear one.
        after_large: probability where the dearest tier answers; the cheapest is the shadow.
    """

    def __init__(self, after_small: float = 0.05, after_large: float = 0.25) -> None:
        for name, value in (("after_small", after_small), ("after_large", after_large)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}={value} must be a probability between 0 and 1")
        self.after_small = after_small
        self.after_large = after_large

    @property
    def smallest_probability(self) -> float:
        """Bounds the importance weights; `QualityFloor` needs it."""
        positive = [p for p in (self.after_small, self.after_large) if p > 0.0]
        return min(positive, default=1.0)

    def draw(self, uniform: float, chosen: str, cheapest: str, dearest: str) -> ShadowPlan | None:
        """Decide for one request; `uniform` in [0, 1) is the caller's randomness."""
        if cheapest == dearest:
            return None
        probability = self.after_large if chosen == dearest else self.after_small
        if not (math.isfinite(uniform) and uniform < probability):
            return None
        return ShadowPlan(cheapest if chosen == dearest else dearest, probability)
