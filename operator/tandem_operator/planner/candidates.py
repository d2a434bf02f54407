"""Plans worth simulating: every layout and threshold, sized by the control loop's own formulas.

Coarse on purpose: it only has to hold the best plan among a dozen. The simulator judges.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tandem_operator.autoscale.profile import Load, PerformanceProfile, Slo
from tandem_operator.autoscale.sizing import PoolSpec, Role, workers_for_slo
from tandem_operator.simulate.arrivals import Arrival
from tandem_operator.simulate.profiles import Profile

Layout = Literal["unified", "split"]
Key = tuple[str, Role]
ROLES: Mapping[Layout, tuple[Role, ...]] = {"unified": ("unified",), "split": ("prefill", "decode")}
THRESHOLDS = 9


@dataclass(frozen=True, slots=True)
class TierSpec:
    """A tier that may be sized: its profile and what one worker costs."""

    name: str
    profile: Profile
    gpus: int
    usd_per_hour: float
    max_num_seqs: int
    layouts: tuple[Layout, ...] = ("unified", "split")
    maximum: int = 64


@dataclass(frozen=True, slots=True)
class Candidate:
    """One plan: workers of each pool, the gain threshold and the tokens that a step may hold.

    max_batched_tokens: None leaves it to the Models.
    """

    workers: tuple[tuple[Key, int], ...]
    threshold: float
    usd_per_hour: float
    gpus: int
    max_batched_tokens: int | None = None

    def count(self, key: Key) -> int:
        """Workers of a pool; 0 where the plan has none."""
        return dict(self.workers).get(key, 0)

    def with_workers(self, key: Key, count: int, tiers: Sequence[TierSpec]) -> Candidate:
        """The same with another number in one pool."""
        changed = candidate({**dict(self.workers), key: count}, self.threshold, tiers)
        return replace(changed, max_batched_tokens=self.max_batched_tokens)

    def without_tier(self, name: str, tiers: Sequence[TierSpec]) -> Candidate:
        """The same without a tier: its requests go to those that remain."""
        left = {key: count for key, count in self.workers if key[0] != name}
        changed = candidate(left, self.threshold, tiers)
        return replace(changed, max_batched_tokens=self.max_batched_tokens)

    def describe(self) -> str:
        """In a line."""
        pools = ", ".join(f"{tier}/{role} {count}" for (tier, role), count in self.workers)
        step = self.max_batched_tokens
        tokens = "" if step is None else f"; maxBatchedTokens {step}"
        return f"{pools}; threshold {self.threshold:.3g}{tokens}"


def candidate(workers: Mapping[Key, int], threshold: float, tiers: Sequence[TierSpec]) -> Candidate:
    """A plan with its price."""
    by_name = {tier.name: tier for tier in tiers}
    known = tuple(sorted(item for item in workers.items() if item[1] > 0))
    return Candidate(
        known,
        threshold,
        sum(by_name[tier].usd_per_hour * count for (tier, _), count in known),
        sum(by_name[tier].gpus * count for (tier, _), count in known),
    )


@dataclass(frozen=True, slots=True)
class Share:
    """Where a threshold leads on the outcomes: shares of requests, and quality of the dearest's."""

    threshold: float
    shares: Mapping[str, float]
    quality_ratio: float | None


def shares_of(arrivals: Sequence[Arrival], tiers: Sequence[str], fallback: str) -> list[Share]:
    """Operating points, from all-dearest to all-cheapest.

    Without predictions of every tier there is nothing to choose: all go to the fallback tier.
    """
    first, last = tiers[0], tiers[-1]
    rows = [
        (a.predicted[last] - a.predicted[first], a.quality or {})
        for a in arrivals
        if a.predicted and first in a.predicted and last in a.predicted
    ]
    if len(tiers) < 2 or not rows:
        return [Share(0.1, {tier: float(tier == fallback) for tier in tiers}, None)]
    gains = sorted(gain for gain, _ in rows)
    points = []
    for step in range(THRESHOLDS):
        rank = step / (THRESHOLDS - 1)
        index = min(len(gains) - 1, int(rank * len(gains)))
        threshold = gains[0] - 1e-6 if step == 0 else gains[index] + 1e-9
        small = [(gain <= threshold, quality) for gain, quality in rows]
        share = sum(taken for taken, _ in small) / len(rows)
        known = [(t, q) for t, q in small if first in q and last in q]
        best = sum(q[last] for _, q in known)
        ratio = sum(q[first] if t else q[last] for t, q in known) / best if best > 0.0 else None
        points.append(Share(threshold, {first: share, last: 1.0 - share}, ratio))
    return points


def busiest(arrivals: Sequence[Arrival], window_s: float = 60.0) -> float:
    """Requests per second of the busiest window."""
    best = start = 0
    for end, arrival in enumerate(arrivals):
        while arrival.at_s - arrivals[start].at_s > window_s:
            start += 1
        best = max(best, end - start + 1)
    span = arrivals[-1].at_s - arrivals[0].at_s if arrivals else 0.0
    return best / max(1.0, min(window_s, span))


def load_of(arrivals: Sequence[Arrival], tier: str, rate: float) -> Load:
    """The traffic's shape at a rate."""
    prompts = [a.prompt_tokens for a in arrivals]
    count = max(1, len(prompts))
    return Load(
        rate,
        sum(prompts) / count,
        sum(p * p for p in prompts) / count,
        sum(a.output_of(tier) for a in arrivals) / count,
    )


def propose(
    tiers: Sequence[TierSpec],
    points: Sequence[Share],
    arrivals: Sequence[Arrival],
    slo: Slo,
    quality_floor: float | None,
) -> Iterator[Candidate]:
    """Every layout at every threshold that holds the floor, sized for the busiest minute."""
    rate = busiest(arrivals)
    holds = [
        p
        for p in points
        if quality_floor is None or p.quality_ratio is None or p.quality_ratio >= quality_floor
    ] or [points[0]]
    for point in holds:
        for layouts in itertools.product(*(tier.layouts for tier in tiers)):
            workers: dict[Key, int] = {}
            for tier, layout in zip(tiers, layouts, strict=True):
                part = load_of(arrivals, tier.name, rate * point.shares.get(tier.name, 0.0))
                if part.requests_per_s <= 0.0:
                    continue
                profile = PerformanceProfile(
                    tier.profile.prefill, tier.profile.decode, tier.profile.kv_tokens,
                    tier.max_num_seqs,
                )  # fmt: skip
                for role in ROLES[layout]:
                    pool = PoolSpec(tier.name, role, tier.gpus, tier.usd_per_hour, 1, tier.maximum)
                    workers[pool.key], _ = workers_for_slo(pool, part, profile, slo)
            yield candidate(workers, point.threshold, tiers)
