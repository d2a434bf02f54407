"""What each answer cost: in dollars where the data or the prices say so, else unknown.

A price beats what the data paid, so that a change of price moves a report without new answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tandem_router.predictor.linear_algebra import FloatArray
from tandem_router.predictor.records.dataset import Dataset

CHARS_PER_TOKEN = 4.0


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens."""

    input: float
    output: float

    def usd(self, prompt_chars: FloatArray, output_tokens: FloatArray) -> FloatArray:
        tokens = prompt_chars / CHARS_PER_TOKEN
        return np.asarray((tokens * self.input + output_tokens * self.output) / 1e6)


Prices = Mapping[str, Price]


def row_costs(dataset: Dataset, tiers: Sequence[str], prices: Prices) -> FloatArray | None:
    """US dollars of every tier's answer ``(num_rows, num_tiers)``; None where a tier's are unknown.

    A row without a cost of its own is given its tier's mean.
    """
    chars = np.array(
        [row.captured.num_chars if row.captured else float(len(row.prompt)) for row in dataset.rows]
    )
    costs = np.full((len(dataset.rows), len(tiers)), np.nan)
    for index, tier in enumerate(tiers):
        if tier in prices:
            tokens = [row.output_tokens.get(tier, np.nan) for row in dataset.rows]
            costs[:, index] = prices[tier].usd(chars, np.array(tokens))
        if np.isnan(costs[:, index]).all():
            costs[:, index] = [row.cost_usd.get(tier, np.nan) for row in dataset.rows]
        known = ~np.isnan(costs[:, index])
        if not known.any():
            return None
        costs[~known, index] = costs[known, index].mean()
    return costs
