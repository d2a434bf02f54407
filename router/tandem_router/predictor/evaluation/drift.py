"""Whether today's prompts still look like the ones the predictor was trained on.

An artifact carries the deciles of every hand feature of the training prompts, and what share of
them lies between. The population stability index compares how new prompts fall between them: below
0.1 is the same traffic, above 0.25 another one. Predicted qualities are left out: on new prompts
they differ from out-of-fold predictions even when the traffic is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tandem_router.predictor.linear_algebra import FloatArray
from tandem_router.predictor.reading import hand_features, ngrams
from tandem_router.predictor.runtime import Predictor

SHIFTED = 0.25
MIN_PROMPTS = 100
NUM_BINS = 10


@dataclass(frozen=True, slots=True)
class Drift:
    """Stability index per hand feature."""

    index: dict[str, float]

    @property
    def shifted(self) -> list[str]:
        """Features that left the training data behind, the farthest first."""
        far = [name for name, value in self.index.items() if value > SHIFTED]
        return sorted(far, key=lambda name: -self.index[name])

    def sentence(self) -> str:
        """What somebody who reads grades of such prompts has to know; asked where any shifted."""
        names = ", ".join(f"{name} {self.index[name]:.2f}" for name in self.shifted[:5])
        return (
            f"these prompts are not like those the predictor was trained on ({names}; above "
            f"{SHIFTED} is other traffic): train it on grades of prompts like these"
        )


def compare(predictor: Predictor, prompts: Sequence[str]) -> Drift | None:
    """How far recent prompts are from the training data; None for fewer than 100 of them."""
    if len(prompts) < MIN_PROMPTS:
        return None
    rows = np.array([hand_features.features(ngrams.read(prompt)) for prompt in prompts])
    edges, shares = predictor.reference
    return Drift(
        {
            name: stability(edges[:, index], shares[:, index], rows[:, index])
            for index, name in enumerate(hand_features.NAMES)
        }
    )


def stability(edges: FloatArray, shares: FloatArray, values: FloatArray) -> float:
    """Population stability index of `values` against a :func:`reference` column.

    Edges that coincide (a feature that is mostly zero) leave empty bins on both sides.
    """
    actual = _shares(edges, values)
    # half a prompt in a hundred keeps an empty bin finite
    expected, actual = np.maximum(shares, 0.005), np.maximum(actual, 0.005)
    return float(np.sum((actual - expected) * np.log(actual / expected)))


def reference(signals: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Inner deciles ``(9, num_signals)`` of training signals, and shares between ``(10, ...)``."""
    edges = np.quantile(signals, np.linspace(0.1, 0.9, NUM_BINS - 1), axis=0)
    shares = [_shares(edges[:, i], signals[:, i]) for i in range(signals.shape[1])]
    return edges, np.stack(shares, axis=1)


def _shares(edges: FloatArray, values: FloatArray) -> FloatArray:
    counts = np.bincount(np.searchsorted(edges, values, side="left"), minlength=NUM_BINS)
    return np.asarray(counts / max(len(values), 1))
