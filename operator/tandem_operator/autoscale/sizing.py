"""How many workers each role of each tier needs, and which threshold fits into the budget.

The large share, and with it the load of every tier, is a function of the routing threshold. So
the two levers are one search: take the highest threshold that meets the quality floor; size
every pool to the SLO; while that is over the budget, move the threshold to cheaper tiers; when
the cheapest mix still does not fit, give out what there is one worker at a time, each to the pool
where it saves most SLO misses per unit of budget (water-filling).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from tandem_operator.autoscale.profile import (
    Load,
    PerformanceProfile,
    Slo,
    shared_tpot_s,
    shared_ttft_s,
    tpot_s,
    ttft_s,
)

Role = Literal["prefill", "decode", "unified"]
MAX_WORKERS = 4096  # bound of every search

WORTH_MOVING = 0.15
"""Share of requests (as `_water_fill` weighs misses) that makes sharing out anew worth a move."""


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """One pool as the plan may size it."""

    tier: str
    role: Role
    gpus: int  # per worker
    usd_per_hour: float  # per worker
    minimum: int = 0
    maximum: int = 64

    @property
    def key(self) -> tuple[str, Role]:
        """Name of the pool in every mapping."""
        return self.tier, self.role


@dataclass(frozen=True, slots=True)
class Operating:
    """One point of the routing curve: where a threshold leads, cheapest tier first."""

    threshold: float
    shares: Mapping[str, float]  # of requests per tier, sum 1
    quality_ratio: float  # of the best tier's quality


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What may be spent; None means no ceiling."""

    gpus: int | None = None
    usd_per_hour: float | None = None

    def allow(self, pools: Sequence[PoolSpec], workers: Mapping[tuple[str, Role], int]) -> bool:
        """Whether so many workers of these pools fit."""
        gpus = sum(pool.gpus * workers[pool.key] for pool in pools)
        usd = sum(pool.usd_per_hour * workers[pool.key] for pool in pools)
        return (self.gpus is None or gpus <= self.gpus) and (
            self.usd_per_hour is None or usd <= self.usd_per_hour + 1e-9
        )

    def beside(self, kept: Sequence[PoolSpec], workers: Mapping[tuple[str, Role], int]) -> Ceilings:
        """What is left beside pools whose size stays as it is."""
        gpus, usd = self.gpus, self.usd_per_hour
        if gpus is not None:
            gpus = max(0, gpus - sum(pool.gpus * workers[pool.key] for pool in kept))
        if usd is not None:
            usd = max(0.0, usd - sum(pool.usd_per_hour * workers[pool.key] for pool in kept))
        return Ceilings(gpus, usd)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Workers per pool, what they cost and what latency they are predicted to give."""

    workers: Mapping[tuple[str, Role], int]
    threshold: float
    quality_ratio: float
    gpus: int
    usd_per_hour: float
    ttft_s: Mapping[str, float]
    tpot_s: Mapping[str, float]
    slo_met: bool
    notes: tuple[str, ...] = field(default=())
    # Pools whose bounds keep them from meeting the SLO.
    short: frozenset[tuple[str, Role]] = field(default=frozenset())
    # What the SLO would have needed, where that was over a ceiling; else the same as above.
    wanted_gpus: int = 0
    wanted_usd_per_hour: float = 0.0


def workers_for_slo(
    pool: PoolSpec, load: Load, profile: PerformanceProfile, slo: Slo
) -> tuple[int, bool]:
    """Fewest workers within the pool's bounds that meet the SLO, and whether they do.

    Latency never rises with workers, so bisection finds them. A promise that no number of workers
    can meet (one prompt alone takes longer) is sized to the point of no return: twice the workers
    would gain less than 5 %.
    """
    if load.requests_per_s <= 0.0:
        return pool.minimum, True
    low, high = max(1, pool.minimum), max(1, min(pool.maximum, MAX_WORKERS))
    if _meets(pool.role, load, profile, low, slo):
        return low, True
    if not _meets(pool.role, load, profile, high, slo):
        return _knee(pool.role, load, profile, low, high, slo), False
    while high - low > 1:
        middle = (low + high) // 2
        if _meets(pool.role, load, profile, middle, slo):
            high = middle
        else:
            low = middle
    return high, True


def _latency(role: Role, load: Load, profile: PerformanceProfile, n: int, slo: Slo) -> float:
    """Worst latency of the role as a share of its target; a stable queue is the least asked."""
    found = 0.0
    if role != "decode":
        value = _ttft_s(role, load, profile, n, slo)
        found = max(
            found, value / slo.ttft_s if slo.ttft_s else (0.0 if value < math.inf else value)
        )
    if role != "prefill":
        value = _tpot_s(role, load, profile, n, slo)
        found = max(
            found, value / slo.tpot_s if slo.tpot_s else (0.0 if value < math.inf else value)
        )
    return found


def _ttft_s(role: Role, load: Load, profile: PerformanceProfile, n: int, slo: Slo) -> float:
    found = shared_ttft_s if role == "unified" else ttft_s
    return found(load, profile, n, slo.ttft_percentile)


def _tpot_s(role: Role, load: Load, profile: PerformanceProfile, n: int, slo: Slo) -> float:
    found = shared_tpot_s if role == "unified" else tpot_s
    return found(load, profile, n, slo.tpot_percentile)


def _meets(role: Role, load: Load, profile: PerformanceProfile, n: int, slo: Slo) -> bool:
    return _latency(role, load, profile, n, slo) <= 1.0


def _knee(
    role: Role, load: Load, profile: PerformanceProfile, low: int, high: int, slo: Slo
) -> int:
    best = _latency(role, load, profile, high, slo)
    if math.isinf(best):
        return high
    while high > low and _latency(role, load, profile, max(low, high // 2), slo) <= 1.05 * best:
        high = max(low, high // 2)
    return high


def size(
    pools: Sequence[PoolSpec],
    load: Load,
    curve: Sequence[Operating],
    profiles: Mapping[str, PerformanceProfile],
    slo: Slo,
    quality_floor: float | None,
    ceilings: Ceilings,
    base_threshold: float = 0.0,
    extra: Mapping[str, float] | None = None,
    stuck: Collection[tuple[str, Role]] = (),
    current: Mapping[tuple[str, Role], int] | None = None,
) -> Sizes:
    """Choose threshold and workers together.

    Args:
        pools: every pool that may be sized; tiers without a pool cost nothing here.
        load: all requests of the router.
        curve: operating points, at least one; searched from the lowest that meets the floor
            downwards.
        profiles: per tier.
        slo: applied to every tier.
        quality_floor: share of the best tier's quality; None: nothing measures quality, and
            the search begins at base_threshold.
        ceilings: GPUs and dollars.
        base_threshold: where the threshold is while no floor moves it and no ceiling is short.
        extra: requests per second of a tier beside its share: what waits and has to be drained.
        stuck: pools that cannot grow now; a threshold at which they meet the SLO is looked for.
        current: workers there are; where a budget is too small they stay as they are shared out
            unless another way saves much.

    Raises:
        ValueError: no curve, or a pool whose tier has no profile.
    """
    if not curve:
        raise ValueError("sizing needs at least one operating point of the routing curve")
    missing = sorted({pool.tier for pool in pools} - set(profiles))
    if missing:
        raise ValueError(
            f"no performance profile for {', '.join(missing)}; their workers report one after "
            "some steps of real work"
        )
    points = _towards_cheaper(curve, quality_floor, base_threshold)
    demand = _Demand(load, extra or {})
    notes: list[str] = []
    if quality_floor is not None and points[0].quality_ratio < quality_floor:
        notes.append(
            f"no threshold reaches the quality floor {quality_floor:.3g}; the best measured is "
            f"{points[0].quality_ratio:.3g}"
        )
    first: Sizes | None = None
    for point in points:
        sizes = _sizes_at(pools, demand, point, profiles, slo)
        held_up = sizes.short.intersection(stuck)
        if _fits(sizes, ceilings) and (not held_up or point is points[-1]):
            if first is not None:
                why = f"the pools would need {_bill(first)}, over {_limits(ceilings)}"
                if _fits(first, ceilings):
                    names = ", ".join("/".join(key) for key in sorted(first.short & set(stuck)))
                    why = f"{names} would need workers that cannot be placed"
                notes.append(
                    f"threshold moved to {point.threshold:.3g}: at {first.threshold:.3g} {why}"
                )
            return replace(sizes, notes=tuple(notes))
        first = first or sizes
    filled = _water_fill(pools, demand, points[-1], profiles, slo, sizes, ceilings, current or {})
    notes.append(
        f"even the cheapest mix needs {_bill(sizes)}, over {_limits(ceilings)}; workers go "
        "where they save most SLO misses"
    )
    return replace(
        filled,
        notes=tuple(notes),
        short=sizes.short,
        wanted_gpus=sizes.gpus,
        wanted_usd_per_hour=sizes.usd_per_hour,
    )


def _towards_cheaper(
    curve: Sequence[Operating], quality_floor: float | None, base_threshold: float
) -> Sequence[Operating]:
    """Where the floor is just met, between two known points, then every lower one, best first.

    Without a floor the first is the one at the base threshold. Ordered by quality and not by
    today's bill: bills are whole workers, and a threshold that followed their rounding would move
    with every breath of the load.
    """
    if quality_floor is None:
        by_threshold = sorted(curve, key=lambda point: point.threshold)
        base = at_threshold(by_threshold, base_threshold) or min(
            by_threshold, key=lambda point: abs(point.threshold - base_threshold)
        )
        return [base, *(p for p in by_threshold if p.threshold > base.threshold)]
    ordered = sorted(curve, key=lambda point: -point.quality_ratio)
    meeting = sum(point.quality_ratio >= quality_floor for point in ordered)
    if 0 < meeting < len(ordered):
        # Known points are a tenth of the requests apart: the next worse may be far below.
        good, bad = ordered[meeting - 1], ordered[meeting]
        return [_between(good, bad, quality_floor), *ordered[meeting:]]
    return ordered[max(0, meeting - 1) :]


def _between(good: Operating, bad: Operating, quality: float) -> Operating:
    """The point of that quality on the line between a better and a worse one."""
    width = good.quality_ratio - bad.quality_ratio
    part = (good.quality_ratio - quality) / width if width > 0.0 else 0.0
    tiers = {*good.shares, *bad.shares}
    shares = {
        tier: (1.0 - part) * good.shares.get(tier, 0.0) + part * bad.shares.get(tier, 0.0)
        for tier in tiers
    }
    threshold = good.threshold + part * (bad.threshold - good.threshold)
    return Operating(threshold, shares, quality if part > 0.0 else good.quality_ratio)


def at_threshold(curve: Sequence[Operating], threshold: float) -> Operating | None:
    """The operating point of a threshold between two known ones; None outside them."""
    points = sorted(curve, key=lambda point: point.threshold)
    for low, high in zip(points, points[1:], strict=False):
        if low.threshold <= threshold <= high.threshold:
            width = high.threshold - low.threshold
            part = (threshold - low.threshold) / width if width > 0.0 else 0.0
            tiers = {*low.shares, *high.shares}
            shares = {
                tier: (1.0 - part) * low.shares.get(tier, 0.0) + part * high.shares.get(tier, 0.0)
                for tier in tiers
            }
            quality = (1.0 - part) * low.quality_ratio + part * high.quality_ratio
            return Operating(threshold, shares, quality)
    return None


def up_to(curve: Sequence[Operating], limit: float | None) -> Sequence[Operating]:
    """The points that a router which lets no threshold over `limit` through can be at."""
    if limit is None or all(point.threshold <= limit for point in curve):
        return curve
    last = at_threshold(curve, limit)
    if last is None:  # under every known point
        last = replace(min(curve, key=lambda point: point.threshold), threshold=limit)
    return (*(point for point in curve if point.threshold < limit), last)


@dataclass(frozen=True, slots=True)
class _Demand:
    """All requests of a router, and what a tier has to serve beside its share of them."""

    load: Load
    extra: Mapping[str, float]

    def of(self, tier: str, point: Operating) -> Load:
        """The tier's load at an operating point."""
        part = self.load.scaled(point.shares.get(tier, 0.0))
        more = self.extra.get(tier, 0.0)
        return replace(part, requests_per_s=part.requests_per_s + more) if more > 0.0 else part


def _sizes_at(
    pools: Sequence[PoolSpec],
    demand: _Demand,
    point: Operating,
    profiles: Mapping[str, PerformanceProfile],
    slo: Slo,
) -> Sizes:
    workers: dict[tuple[str, Role], int] = {}
    short = set()
    for pool in pools:
        part = demand.of(pool.tier, point)
        workers[pool.key], good = workers_for_slo(pool, part, profiles[pool.tier], slo)
        if not good:
            short.add(pool.key)
    found = _described(pools, workers, demand, point, profiles, slo, not short)
    return replace(
        found,
        short=frozenset(short),
        wanted_gpus=found.gpus,
        wanted_usd_per_hour=found.usd_per_hour,
    )


def _described(
    pools: Sequence[PoolSpec],
    workers: Mapping[tuple[str, Role], int],
    demand: _Demand,
    point: Operating,
    profiles: Mapping[str, PerformanceProfile],
    slo: Slo,
    met: bool,
) -> Sizes:
    ttft: dict[str, float] = {}
    tpot: dict[str, float] = {}
    for pool in pools:
        part = demand.of(pool.tier, point)
        count, profile = workers[pool.key], profiles[pool.tier]
        if pool.role != "decode":
            ttft[pool.tier] = _ttft_s(pool.role, part, profile, count, slo)
        if pool.role != "prefill":
            tpot[pool.tier] = _tpot_s(pool.role, part, profile, count, slo)
    return Sizes(
        workers=dict(workers),
        threshold=point.threshold,
        quality_ratio=point.quality_ratio,
        gpus=sum(pool.gpus * workers[pool.key] for pool in pools),
        usd_per_hour=sum(pool.usd_per_hour * workers[pool.key] for pool in pools),
        ttft_s=ttft,
        tpot_s=tpot,
        slo_met=met,
    )


def _fits(sizes: Sizes, ceilings: Ceilings) -> bool:
    if ceilings.gpus is not None and sizes.gpus > ceilings.gpus:
        return False
    return ceilings.usd_per_hour is None or sizes.usd_per_hour <= ceilings.usd_per_hour + 1e-9


def _water_fill(
    pools: Sequence[PoolSpec],
    demand: _Demand,
    point: Operating,
    profiles: Mapping[str, PerformanceProfile],
    slo: Slo,
    wanted: Sizes,
    ceilings: Ceilings,
    current: Mapping[tuple[str, Role], int],
) -> Sizes:
    """Start from the minimum that serves at all, then add one worker at a time.

    The minimum itself is given even when it is over the budget: it is what the user asked to
    keep running. What there is stays where it spends the budget and misses hardly more, for with
    every breath of the load another pool is the neediest by a little.
    """
    parts = {pool.key: demand.of(pool.tier, point) for pool in pools}
    total = sum(demand.of(tier, point).requests_per_s for tier in {p.tier for p in pools})
    workers = {pool.key: pool.minimum for pool in pools}

    def misses(pool: PoolSpec, count: int) -> float:
        """Traffic-weighted misses: 1 a request while saturated, falling as latency nears target."""
        part = parts[pool.key]
        if part.requests_per_s <= 0.0:
            return 0.0
        share = part.requests_per_s / total
        ratio = _latency(pool.role, part, profiles[pool.tier], count, slo) if count else math.inf
        if ratio <= 1.0:
            return 0.0
        if math.isinf(ratio):
            need = max(1, wanted.workers[pool.key])
            return share * (2.0 - min(1.0, count / need))
        return share * (1.0 - 1.0 / ratio)

    while True:
        best: tuple[float, PoolSpec] | None = None
        for pool in pools:
            count = workers[pool.key]
            if count >= min(pool.maximum, wanted.workers[pool.key]):
                continue
            after = dict(workers) | {pool.key: count + 1}
            if not ceilings.allow(pools, after):
                continue
            price = _price(pool, ceilings)
            value = (misses(pool, count) - misses(pool, count + 1)) / price
            if best is None or value > best[0]:
                best = value, pool
        if best is None or best[0] <= 0.0:
            break
        workers[best[1].key] += 1
    here = {pool.key: current.get(pool.key, -1) for pool in pools}

    def gain(pool: PoolSpec) -> float:
        """What one more than there are would save, and the ceilings allow."""
        count = here[pool.key]
        after = here | {pool.key: count + 1}
        if count >= pool.maximum or not ceilings.allow(pools, after):
            return 0.0
        return misses(pool, count) - misses(pool, count + 1)

    if (
        all(pool.minimum <= here[pool.key] <= pool.maximum for pool in pools)
        and ceilings.allow(pools, here)
        and sum(misses(pool, here[pool.key]) for pool in pools)
        <= sum(misses(pool, workers[pool.key]) for pool in pools) + WORTH_MOVING
        and not any(gain(pool) > 0.0 for pool in pools)
    ):
        workers = here
    return _described(pools, workers, demand, point, profiles, slo, met=False)


def _price(pool: PoolSpec, ceilings: Ceilings) -> float:
    """Share of the scarcest budget that one worker takes."""
    parts = [1e-9]
    if ceilings.gpus:
        parts.append(pool.gpus / ceilings.gpus)
    if ceilings.usd_per_hour:
        parts.append(pool.usd_per_hour / ceilings.usd_per_hour)
    return max(parts)


def _bill(sizes: Sizes) -> str:
    return f"{sizes.gpus} GPUs and {sizes.usd_per_hour:.4g} USD/h"


def _limits(ceilings: Ceilings) -> str:
    parts = []
    if ceilings.gpus is not None:
        parts.append(f"{ceilings.gpus} GPUs")
    if ceilings.usd_per_hour is not None:
        parts.append(f"{ceilings.usd_per_hour:.4g} USD/h")
    return " and ".join(parts) or "no ceiling"
