"""From timings over a grid to the three numbers of each phase, with the fit's error.

prefill of one prompt   a + b * L + c * L^2
one decode step         a + b * sum(context) + c * batch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

Three = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class PrefillTiming:
    """Time to the first token of one prompt alone, seconds."""

    prompt_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DecodeTiming:
    """Mean time of a step while a batch decodes, seconds."""

    batch: int
    context_tokens: float  # of the whole batch, at the middle of the run
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients and how far they are off, as shares of what was measured."""

    coefficients: Three
    median_error: float
    worst_error: float


def fit_prefill(timings: Sequence[PrefillTiming]) -> Fit:
    """Fit the prefill form. Raises ValueError with fewer than three prompt lengths."""
    if len({t.prompt_tokens for t in timings}) < 3:
        raise ValueError("prefill needs at least three prompt lengths")
    rows = [(1.0, float(t.prompt_tokens), float(t.prompt_tokens) ** 2) for t in timings]
    return _fit(rows, [t.seconds for t in timings])


def fit_decode(timings: Sequence[DecodeTiming]) -> Fit:
    """Fit the decode form. Raises ValueError where batch and context were not both varied."""
    if len({t.batch for t in timings}) < 2 or len({t.context_tokens for t in timings}) < 3:
        raise ValueError("decode needs at least two batch sizes and three contexts")
    rows = [(1.0, t.context_tokens, float(t.batch)) for t in timings]
    return _fit(rows, [t.seconds for t in timings])


def _fit(rows: Sequence[Three], times: Sequence[float]) -> Fit:
    """Least squares of relative errors with coefficients that are not negative.

    Relative, because a profile that is right to a millisecond for long prompts and 30 % off for
    short ones would mislead every SLO. Coordinate descent; the problem is convex.
    """
    weights = [1.0 / max(t, 1e-9) for t in times]
    x = [[v * w for v in row] for row, w in zip(rows, weights, strict=True)]
    xtx = [[sum(r[i] * r[j] for r in x) for j in range(3)] for i in range(3)]
    xty = [sum(r[i] for r in x) for i in range(3)]
    found = [0.0, 0.0, 0.0]
    for _ in range(20_000):
        moved = 0.0
        for i in range(3):
            others = sum(xtx[i][j] * found[j] for j in range(3) if j != i)
            new = max(0.0, (xty[i] - others) / xtx[i][i]) if xtx[i][i] > 0.0 else 0.0
            moved = max(moved, abs(new - found[i]) * xtx[i][i] ** 0.5)
            found[i] = new
        if moved < 1e-12:
            break
    a, b, c = found
    errors = [
        abs(a * r[0] + b * r[1] + c * r[2] - t) / max(t, 1e-9)
        for r, t in zip(rows, times, strict=True)
    ]
    return Fit((a, b, c), median(errors), max(errors))
