"""What other thresholds would have done with the recent requests.

The operator moves the threshold together with replica counts; for that it needs to know where a
threshold leads: each tier's share of requests and the predicted quality, on the traffic of now
and not of the training data.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from tandem_router.policy import Decision, TierVerdict, weighed


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Where one gain threshold leads, without a price of money."""

    threshold: float
    shares: dict[str, float]  # of scored requests per tier, sum 1
    quality_ratio: float  # predicted, of sending all to the dearest tier


class RoutingCurve:
    """Remembers the predicted qualities of recent requests; bounded memory.

    Args:
        window: recent scored requests that are kept.
    """

    def __init__(self, window: int = 1000) -> None:
        if window < 1:
            raise ValueError(f"window={window} must be at least 1 request")
        # As they were decided; read when somebody asks.
        self._verdicts: deque[tuple[tuple[TierVerdict, ...], float]] = deque(maxlen=window)

    def observe(self, decision: Decision) -> None:
        """Take one decision; those without a score of every tier say nothing."""
        if decision.gain is not None:
            self._verdicts.append((decision.verdicts, decision.stake))

    def _known(self) -> tuple[tuple[str, ...], list[list[float]], list[float]]:
        """The tiers, cheapest first, and their qualities in each request since they are those.

        And how many times the threshold each was asked for.
        """
        tiers: tuple[str, ...] = ()
        rows: list[list[float]] = []
        stakes: list[float] = []
        for verdicts, stake in self._verdicts:
            qualities = [v.quality for v in verdicts if v.quality is not None]
            if len(qualities) < 2 or len(qualities) < len(verdicts):
                continue
            names = tuple([verdict.tier for verdict in verdicts])
            if names != tiers:
                tiers, rows, stakes = names, [], []
            rows.append(qualities)
            stakes.append(stake)
        return tiers, rows, stakes

    def points(self, count: int = 11) -> tuple[CurvePoint, ...]:
        """Points from all-dearest to all-cheapest, evenly spaced in the gain's quantiles.

        Empty before the first scored request.
        """
        tiers, known, stakes = self._known()
        if not known or count < 2:
            return ()
        quality = np.array(known)  # (num_requests, num_tiers), cheapest first
        gains = quality[:, -1] - quality[:, 0]
        gain = np.sort([weighed(float(g), stake) for g, stake in zip(gains, stakes, strict=True)])
        ranks = np.linspace(0.0, 1.0, count)
        thresholds = [float(gain[0]) - 1e-6, *map(float, np.quantile(gain, ranks[1:]))]
        thresholds[-1] += 1e-6  # rounding must not leave the last request with the dearest tier
        height = np.outer(stakes, np.linspace(0.0, 1.0, quality.shape[1]))
        best = float(quality[:, -1].mean())
        rows = np.arange(len(quality))
        points: dict[float, CurvePoint] = {}
        for threshold in thresholds:
            # argmax takes the first of equals: the cheaper tier, as `decide` does.
            chosen = np.argmax(quality - threshold * height, axis=1)
            counts = np.bincount(chosen, minlength=len(tiers)) / len(quality)
            shares = dict(zip(tiers, map(float, counts), strict=True))
            ratio = float(quality[rows, chosen].mean()) / best if best > 0.0 else 1.0
            points[threshold] = CurvePoint(threshold, shares, ratio)
        return tuple(points.values())
