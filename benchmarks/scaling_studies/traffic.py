"""Two weeks of request rates, real lengths, and prompts with measured qualities."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from outcomes import DATA, Floats, azure_arrivals, load

from tandem_operator.simulate.arrivals import Arrival
from tandem_router.control import RoutingCurve
from tandem_router.control.floor_limit import FloorLimit
from tandem_router.control.predicted_floor import threshold_for_floor
from tandem_router.policy import (
    PlainScore,
    PolicySetPoints,
    PolicyState,
    RouteRequest,
    ScoreStatus,
    TierOption,
    decide,
)

WINDOW_S = 600.0
# A router's floor and curve are of its last thousand requests: followed in strides of EVERY, once
# WARM are there, MOVING times.
EVERY, WARM, MOVING = 64, 1024, 2048
LEAST, MOST = 5.0, 60.0
Rate = Callable[[float], float]
"""Requests per second at a time in seconds."""


def servegen(column: str = "language/m-large_rps") -> tuple[float, ...]:
    """The 14 days at ten minutes, their peak brought to 60 requests/s and at least 5."""
    path = DATA / "traces" / "servegen" / "rate_curves_10min.csv"
    if not path.exists():
        raise SystemExit(f"{path} is absent; this benchmark needs the shared data folder")
    with path.open() as lines:
        raw = [float(row[column] or 0.0) for row in csv.DictReader(lines)]
    scale = MOST / max(raw)
    return tuple(max(LEAST, value * scale) for value in raw)


def between(points: Sequence[float]) -> Rate:
    """Linear between the ten-minute values."""

    def rate(at_s: float) -> float:
        place = min(max(at_s / WINDOW_S, 0.0), len(points) - 1.0)
        index = min(int(place), len(points) - 2)
        part = place - index
        return points[index] + part * (points[index + 1] - points[index])

    return rate


@dataclass(frozen=True)
class Prompts:
    """Lengths of Azure's conversations and outcomes of MMLU, drawn independently."""

    lengths: tuple[tuple[int, int], ...]
    rows: tuple[tuple[float, float, float, float], ...]  # predicted and measured, small and large

    def arrivals(self, rate: Rate, until_s: float, most: float, seed: int) -> Iterator[Arrival]:
        """A Poisson process of that rate (at most `most`), by thinning."""
        rng = random.Random(seed)
        now = 0.0
        while (now := now + rng.expovariate(most)) < until_s:
            if rng.random() * most > rate(now):
                continue
            prompt, output = rng.choice(self.lengths)
            p_small, p_large, q_small, q_large = rng.choice(self.rows)
            yield Arrival(
                now,
                prompt,
                {"": output},
                quality={"small": q_small, "large": q_large},
                predicted={"small": p_small, "large": p_large},
            )

    @cached_property
    def prompt_tokens(self) -> float:
        return sum(p for p, _ in self.lengths) / len(self.lengths)

    @cached_property
    def output_tokens(self) -> float:
        return sum(o for _, o in self.lengths) / len(self.lengths)


def prompts() -> Prompts:
    """Drawn from the shared data."""
    _, prompt, answer = azure_arrivals("conv")
    found = load("mmlu")
    # The floor is held on predictions, so they have to be calibrated: what is judged here is the
    # loop and not a predictor. On the gain, as that is what the threshold cuts.
    p_large = _calibrated(found.p_large, found.large)
    p_small = p_large - _calibrated(found.gain, found.large - found.small)
    rows = zip(p_small, p_large, found.small, found.large, strict=True)
    return Prompts(
        tuple((max(1, int(p)), max(1, int(a))) for p, a in zip(prompt, answer, strict=True)),
        tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in rows),
    )


def _calibrated(score: Floats, label: Floats) -> Floats:
    """Quadratic in the score: smooth, so that no plateau of equal scores decides anything."""
    return np.asarray(np.polyval(np.polyfit(score, label, 2), score))


@dataclass(frozen=True, slots=True)
class Point:
    """What a router knows at a moment: of its recent requests, not of all that may come."""

    limit: float
    curve: tuple[dict[str, object], ...]


@dataclass(frozen=True, slots=True)
class Routing:
    """Where thresholds lead, as routers report it, and what is measured there."""

    limit: float  # the threshold that the floor lets through, over all prompts
    moving: tuple[Point, ...]  # what a router says after every `EVERY` requests, for ever round
    gains: tuple[float, ...]  # sorted
    measured: tuple[float, ...]  # quality kept where so many of the lowest gains go to small

    def after(self, requests: float) -> Point:
        """What a router says after so many."""
        return self.moving[int(requests / EVERY) % len(self.moving)]

    def share_small(self, threshold: float) -> float:
        """Share of prompts whose gain is at most the threshold."""
        low, high = 0, len(self.gains)
        while low < high:
            middle = (low + high) // 2
            if self.gains[middle] <= threshold:
                low = middle + 1
            else:
                high = middle
        return low / len(self.gains)

    def quality_ratio(self, threshold: float) -> float:
        """Measured quality there over the large tier's."""
        return self.measured[round(self.share_small(threshold) * len(self.gains))]


def _moving(found: Prompts, floor: float, limit: float, seed: int = 0) -> Iterator[Point]:
    """The production curve and floor under requests that are drawn like the trace's."""
    curve, held = RoutingCurve(), FloorLimit(floor, limit)
    options = [TierOption(name=name) for name in ("small", "large")]
    state, rng = PolicyState(), random.Random(seed)
    for number in range(1, WARM + MOVING * EVERY + 1):
        p_small, p_large, _, _ = rng.choice(found.rows)
        score = PlainScore({"small": p_small, "large": p_large})
        request = RouteRequest(prompt_tokens=1, score=score, score_status=ScoreStatus.OK)
        curve.observe(decide(request, options, PolicySetPoints(), state))
        held.observe(p_large - p_small, p_large)
        if number > WARM and number % EVERY == 0:
            points = curve.points()
            yield Point(
                held.threshold,
                tuple(
                    {"threshold": p.threshold, "shares": p.shares, "quality_ratio": p.quality_ratio}
                    for p in points
                ),
            )


def routing(found: Prompts, floor: float) -> Routing:
    """From all rows, through the production curve and floor."""
    ordered = sorted(found.rows, key=lambda row: row[1] - row[0])
    large = math.fsum(row[3] for row in ordered)
    kept, measured = large, [1.0]
    for row in ordered:
        kept += row[2] - row[3]
        measured.append(kept / large)
    limit = threshold_for_floor([(b - a, b) for a, b, _, _ in found.rows], floor)
    moving = tuple(_moving(found, floor, limit))
    return Routing(limit, moving, tuple(b - a for a, b, _, _ in ordered), tuple(measured))
