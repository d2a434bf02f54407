"""How far a judge can be believed: its verdicts beside references, with intervals.

Both orders of a pair are one piece of evidence as far as they err together, so the interval counts
pairs and verdicts by how alike the verdicts of a pair are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tandem_router.grading.graders.judge import Verdict


@dataclass(frozen=True, slots=True)
class Compared:
    """Two answers that references grade too, and what the judge said of them in each order.

    `verdicts` name the two answers in the same order, whichever was shown first.
    """

    first: float
    second: float
    verdicts: tuple[Verdict, ...]

    def right(self) -> Verdict:
        """The verdict that the references imply."""
        if self.first == self.second:
            return "tie"
        return "first" if self.first > self.second else "second"


@dataclass(frozen=True, slots=True)
class Share:
    """A share of `num_verdicts` verdicts about `num_pairs` pairs, with its 95 % interval."""

    value: float
    low: float
    high: float
    num_verdicts: int
    num_pairs: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """`overall` counts ties too; `decided` only pairs of which one answer is better."""

    overall: Share | None
    decided: Share | None


def agreement(pairs: Sequence[Compared]) -> Agreement:
    """The share of verdicts that are what the references imply."""
    judged = [pair for pair in pairs if pair.verdicts]
    return Agreement(_share(judged), _share([pair for pair in judged if pair.first != pair.second]))


def _share(pairs: Sequence[Compared]) -> Share | None:
    if not pairs:
        return None
    rights = [sum(verdict == pair.right() for verdict in pair.verdicts) for pair in pairs]
    counts = [len(pair.verdicts) for pair in pairs]
    total = sum(counts)
    value = sum(rights) / total
    spread = sum((right - value * n) ** 2 for right, n in zip(rights, counts, strict=True))
    independent = value * (1 - value) * total
    effective = float(total)
    if spread > 0 and independent > 0:
        effective = min(float(total), max(float(len(pairs)), total * independent / spread))
    elif len(pairs) < total:
        effective = float(len(pairs))
    low, high = wilson(value, effective)
    return Share(value, low, high, total, len(pairs))


def wilson(share: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share of `count` independent trials."""
    if count <= 0:
        return 0.0, 1.0
    scale = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    # At both ends the bound is the share itself, which rounding must not leave outside.
    return (
        0.0 if share <= 0 else max(0.0, centre - half),
        1.0 if share >= 1 else min(1.0, centre + half),
    )
