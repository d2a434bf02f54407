"""Requests with what both tiers would have made of them, as the policy sees them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from outcomes import LARGE_PRICE, SMALL_PRICE, Outcomes

from tandem_router.policy import PlainScore, RouteRequest, TierOption, cost_usd

TIERS = (
    TierOption("small", True, *SMALL_PRICE),
    TierOption("large", True, *LARGE_PRICE),
)


@dataclass
class Stream:
    """A sequence of requests: when, how long, what both tiers would have made of it."""

    at_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    answer_tokens: NDArray[np.int64]
    p: NDArray[np.float64]  # (n, 2) predicted
    q: NDArray[np.float64]  # (n, 2) measured
    lengths: tuple[float, float, float]  # what the length head says: quantiles of the first 10 min

    def __len__(self) -> int:
        return len(self.at_s)

    @property
    def gain(self) -> NDArray[np.float64]:
        return self.p[:, 1] - self.p[:, 0]

    def request(self, i: int) -> RouteRequest:
        score = PlainScore(
            {"small": float(self.p[i, 0]), "large": float(self.p[i, 1])},
            {"small": self.lengths, "large": self.lengths},
        )
        return RouteRequest(int(self.prompt_tokens[i]), score, max_tokens=1000)

    def cost(self, i: int, tier: int) -> float:
        return cost_usd(TIERS[tier], int(self.prompt_tokens[i]), int(self.answer_tokens[i]))


def columns(outcomes: Outcomes, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], ...]:
    p = np.stack([outcomes.p_small[rows], outcomes.p_large[rows]], axis=1)
    return p, np.stack([outcomes.small[rows], outcomes.large[rows]], axis=1)
