"""The best plan: candidates raced on growing parts of the trace, the winner then trimmed.

Successive halving on the simulator: all candidates see the beginning of the trace, the better half
sees more of it. What is left is trimmed worker by worker as long as it still holds the SLO, so
that the next cheaper plan is known together with what breaks it. Where that plan would hold with
larger or smaller steps, it is taken with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tandem_operator.planner.candidates import Candidate, TierSpec


@dataclass(frozen=True, slots=True)
class Score:
    """What the simulator said of a plan."""

    slo_met: float  # share of requests, rejected and failed ones missed
    quality_ratio: float | None
    ttft_p95_s: float | None
    tpot_p95_s: float | None


@dataclass(frozen=True, slots=True)
class Judged:
    """A plan with its score on so many requests."""

    candidate: Candidate
    score: Score
    num_requests: int


Simulate = Callable[[Candidate, int], Score]
"""(plan, number of requests) -> score."""

Progress = Callable[[str], None]

STEP_SIZES = (512, 2048, 256, 4096)
"""Tokens a step, tried where a plan just fails: small ones keep gaps between tokens short, large
ones waste fewer steps' constants."""


QUALITY_NOISE = 0.005
"""What a simulated ratio of quality may lie below the floor: candidates were chosen by the ratio of
the whole trace, and a part of it has another."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a plan has to hold.

    Attributes:
        slo_share: Of requests within the SLO; its percentile as a share.
        usd_per_hour: Budget; None: none.
    """

    slo_share: float = 0.95
    quality_floor: float | None = None
    usd_per_hour: float | None = None
    gpus: int | None = None

    def affordable(self, plan: Candidate) -> bool:
        """Whether a plan is within the budget."""
        return (self.usd_per_hour is None or plan.usd_per_hour <= self.usd_per_hour + 1e-9) and (
            self.gpus is None or plan.gpus <= self.gpus
        )

    def held(self, score: Score) -> bool:
        """Whether a score keeps every promise, the floor as far as so few requests can tell."""
        quality = score.quality_ratio
        floor = self.quality_floor
        good = floor is None or quality is None or quality >= floor - QUALITY_NOISE
        return score.slo_met >= self.slo_share and good


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search.

    Attributes:
        best: Cheapest plan that holds everything; None where the budget allows none.
        front: Plans that no other beats in both price and SLO, cheapest first.
        next_cheaper: A cheaper plan that fails, and how.
        cheapest_holding: Where the budget is short: what holding would cost.
    """

    best: Judged | None
    front: tuple[Judged, ...]
    next_cheaper: Judged | None
    cheapest_holding: Judged | None
    num_simulated: int


def search(
    candidates: Sequence[Candidate],
    tiers: Sequence[TierSpec],
    wanted: Wanted,
    simulate: Simulate,
    num_requests: int,
    progress: Progress,
    *,
    most: int = 16,
) -> Found:
    """Race, trim and tell."""
    plans = sorted(set(candidates), key=lambda plan: plan.usd_per_hour)
    field = _spread(plans, most)
    judged: list[Judged] = []
    count = max(200, num_requests // 8)
    simulated = 0
    while True:
        judged = []
        for plan in field:
            judged.append(Judged(plan, simulate(plan, count), count))
            simulated += 1
        progress(f"{len(field)} plans on {count} requests")
        if count >= num_requests or len(field) <= 2:
            break
        keep = max(2, len(field) // 2)
        field = [one.candidate for one in sorted(judged, key=lambda j: _rank(j, wanted))[:keep]]
        count = min(num_requests, count * 4)
    if count < num_requests:
        judged = [Judged(j.candidate, simulate(j.candidate, num_requests), num_requests)
                  for j in judged]  # fmt: skip
        simulated += len(judged)
    holding = [one for one in judged if wanted.held(one.score)]
    if not holding:
        best_effort = min(judged, key=lambda j: -j.score.slo_met)
        grown, more = _grow(best_effort, tiers, wanted, simulate, num_requests)
        simulated += more
        judged.append(grown)
        holding = [grown] if wanted.held(grown.score) else []
    cheapest = min(holding, key=lambda j: j.candidate.usd_per_hour, default=None)
    failed: Judged | None = None
    if cheapest is not None:
        cheapest, failed, more = _trim(cheapest, tiers, wanted, simulate, num_requests)
        simulated += more
        for size in STEP_SIZES if failed is not None else ():
            assert failed is not None
            other = replace(failed.candidate, max_batched_tokens=size)
            again = Judged(other, simulate(other, num_requests), num_requests)
            simulated += 1
            if wanted.held(again.score):
                cheapest, failed, more = _trim(again, tiers, wanted, simulate, num_requests)
                simulated += more
                break
        judged.append(cheapest)
        if failed is not None:
            judged.append(failed)
    best = cheapest if cheapest is not None and wanted.affordable(cheapest.candidate) else None
    return Found(best, _front(judged), failed, cheapest, simulated)


def _spread(plans: Sequence[Candidate], most: int) -> list[Candidate]:
    """The cheapest half, and some of every price above."""
    if len(plans) <= most:
        return list(plans)
    half = most // 2
    rest = plans[half:]
    step = len(rest) / (most - half)
    return [*plans[:half], *(rest[int(i * step)] for i in range(most - half))]


def _rank(one: Judged, wanted: Wanted) -> tuple[bool, float, float]:
    """Holding ones first by price, then the nearest to holding."""
    holds = wanted.held(one.score)
    return (not holds, one.candidate.usd_per_hour if holds else 0.0, -one.score.slo_met)


def _trim(
    best: Judged,
    tiers: Sequence[TierSpec],
    wanted: Wanted,
    simulate: Simulate,
    num_requests: int,
) -> tuple[Judged, Judged | None, int]:
    """Take workers away, the dearest first, then whole tiers, while everything holds."""
    failed: Judged | None = None
    simulated = 0
    again = True
    while again:
        again = False
        pools = sorted(best.candidate.workers, key=lambda item: -_price(item[0][0], tiers))
        for key, count in pools:
            if count > 1:
                fewer = best.candidate.with_workers(key, count - 1, tiers)
            elif len({tier for (tier, _), _ in best.candidate.workers}) > 1:
                # The last of its pool: what remains may hold everything alone.
                fewer = best.candidate.without_tier(key[0], tiers)
            else:
                continue
            judged = Judged(fewer, simulate(fewer, num_requests), num_requests)
            simulated += 1
            if wanted.held(judged.score):
                best, again = judged, True
                break
            if failed is None or fewer.usd_per_hour > failed.candidate.usd_per_hour:
                failed = judged
    if failed is not None and failed.candidate.usd_per_hour >= best.candidate.usd_per_hour:
        failed = None
    return best, failed, simulated


def _grow(
    best: Judged,
    tiers: Sequence[TierSpec],
    wanted: Wanted,
    simulate: Simulate,
    num_requests: int,
) -> tuple[Judged, int]:
    """Add a worker to every pool, up to four times: the formulas may have been too hopeful."""
    simulated = 0
    for _ in range(4):
        plan = best.candidate
        for key, count in plan.workers:
            plan = plan.with_workers(key, count + max(1, count // 4), tiers)
        best = Judged(plan, simulate(plan, num_requests), num_requests)
        simulated += 1
        if wanted.held(best.score):
            break
    return best, simulated


def _price(tier: str, tiers: Sequence[TierSpec]) -> float:
    return next(spec.usd_per_hour + spec.gpus for spec in tiers if spec.name == tier)


def _front(judged: Sequence[Judged]) -> tuple[Judged, ...]:
    most = max((one.num_requests for one in judged), default=0)
    ordered = sorted(
        (one for one in judged if one.num_requests == most),
        key=lambda j: (j.candidate.usd_per_hour, -j.score.slo_met),
    )
    front: list[Judged] = []
    for one in ordered:
        if not front or one.score.slo_met > front[-1].score.slo_met:
            front.append(one)
    return tuple(front)
