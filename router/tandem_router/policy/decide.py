"""Choose the tier of one request: gain against cost, inside everybody's ceilings.

Utility of tier t: `p_t - lambda*c_t - theta*r_t - mu*P(late)`, where r_t is 0 for the cheapest
and 1 for the dearest tier by list price. With two tiers and no latency term this is the gain
rule: the large tier iff `p_large - p_small > theta + lambda*(c_large - c_small)`. Costs are those
of what a tier does not hold already; `held_prefix` says where r_t is a share of them.

By construction:
* a tie goes to the lower expected cost, then to the lower list price, then to the tier declared
  first, so the result never depends on iteration order;
* a NaN or missing number is never compared: a tier whose quality is unusable has no utility;
* the quality floor is relative to the dearest tier, which is never excluded by it, so a higher
  floor can only move requests towards the dearest tier;
* a smaller lambda never lowers the predicted quality (net of the latency term) of a request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from tandem_router.policy.ceilings import NOTHING_GRANTED, Grant, granted
from tandem_router.policy.cost import slo_miss_probability
from tandem_router.policy.gain_rule import decide_plainly, list_price
from tandem_router.policy.held_prefix import heights, held_tokens, held_usd
from tandem_router.policy.terms import (
    BEYOND_ANY_GAIN,
    Decision,
    PolicySetPoints,
    PolicyState,
    Reason,
    RouteRequest,
    ScoreStatus,
    TierOption,
    TierVerdict,
    finite,
)

_STATUS_REASON = {
    ScoreStatus.OK: Reason.NO_PREDICTOR,
    ScoreStatus.ABSENT: Reason.NO_PREDICTOR,
    ScoreStatus.LATE: Reason.PREDICTOR_LATE,
    ScoreStatus.FAILED: Reason.PREDICTOR_FAILED,
}


class _Candidate(Struct):
    tier: TierOption
    name: str
    rank: int  # 0 is the cheapest by list price
    grant: Grant
    cost: float
    late: float
    quality: float | None
    against: float  # what counts against the tier, in quality points: money, threshold, latency
    height: float = 0.0  # how many times the threshold counts against it
    unheld: float | None = None  # its utility if no tier held anything
    value: float | None = None
    utility: float | None = None
    excluded: Reason | None = None
    lacks: tuple[str, ...] = ()


def decide(
    request: RouteRequest,
    tiers: Sequence[TierOption],
    set_points: PolicySetPoints,
    state: PolicyState | None = None,
) -> Decision:
    """Choose a tier for `request`; total over any numbers, NaN included; about 10 us.

    Reads `state` (recent shares) and never changes it: call
    `state.record(decision.tier)` once the request is dispatched.

    Raises:
        ValueError: `tiers` is empty or names a tier twice, or the request forces a tier that is
            not among them (answer 404 for an unknown model before asking).
    """
    plain = decide_plainly(request, tiers, set_points)
    if plain is not None:
        return plain
    return decide_fully(request, tiers, set_points, state)


def decide_fully(
    request: RouteRequest,
    tiers: Sequence[TierOption],
    set_points: PolicySetPoints,
    state: PolicyState | None = None,
) -> Decision:
    """As `decide`, whatever there is to be weighed."""
    candidates = _candidates(request, tiers, set_points)
    dearest, cheapest = candidates[-1], candidates[0]
    gain = difficulty = threshold = None
    if cheapest.quality is not None:
        difficulty = 1.0 - cheapest.quality
        if dearest.quality is not None and len(candidates) > 1:
            gain = dearest.quality - cheapest.quality
    if len(candidates) > 1:
        threshold = dearest.against - cheapest.against

    _apply_hard_limits(candidates, request, set_points, state)
    preferred, why = _preferred(candidates, request, set_points)
    chosen, reason = _within_limits(candidates, preferred, why, request, set_points)
    waits = reason is Reason.BUDGET and set_points.on_exhausted == "queue"
    if chosen is None and not waits and _accept_shorter(candidates):
        chosen, reason = _within_limits(candidates, preferred, why, request, set_points)
        if chosen is not None and chosen.grant.tight is not None:
            reason = chosen.grant.tight.reason

    def outcome(tier: _Candidate | None, because: Reason, **extra: object) -> Decision:
        grant = tier.grant if tier is not None else NOTHING_GRANTED
        return Decision(
            tier.name if tier is not None else None,
            because,
            gain,
            threshold,
            difficulty,
            0.0 if tier is None else grant.cost_usd - held_usd(request, tier.tier, booked=True),
            grant.reserve_usd,
            tier.late if tier is not None else 0.0,
            tuple([_verdict(candidate, request) for candidate in candidates]),
            max_tokens=grant.max_tokens,
            stake=dearest.height if len(candidates) > 1 else 1.0,
            **extra,  # type: ignore[arg-type]
        )

    if chosen is not None:
        return outcome(chosen, reason)
    told = [preferred] if why is Reason.FORCED else candidates
    if reason is Reason.CAPABILITY:
        message = _lacking(told)
    else:
        message = _refusal(
            reason, preferred, told, request.tenant.name, set_points.budget_refill_usd_per_s
        )
    short = [c for c in candidates if c.excluded is reason and c.grant.tight is not None]
    if set_points.on_exhausted != "downgrade" or why is Reason.FORCED:
        short = [c for c in short if c is preferred]
    wanted = min((c.grant.wanted_usd for c in short), default=0.0)
    return outcome(
        None,
        reason,
        message=message,
        wanted_usd=wanted,
        least_usd=min((c.grant.least_usd for c in short), default=0.0),
        queue=reason is Reason.BUDGET and set_points.on_exhausted == "queue",
        retry_after_s=_refill_time(wanted, set_points) if reason is Reason.BUDGET else None,
    )


def _candidates(
    request: RouteRequest, tiers: Sequence[TierOption], set_points: PolicySetPoints
) -> list[_Candidate]:
    """Tiers from cheapest to dearest, each with its cost, latency and utility."""
    if not tiers:
        raise ValueError("tiers is empty; a router needs at least one tier")
    if len({tier.name for tier in tiers}) < len(tiers):
        raise ValueError(f"tiers {[tier.name for tier in tiers]} repeat a name; make them unique")
    price_of_money = finite(set_points.lambda_per_usd)
    threshold = min(BEYOND_ANY_GAIN, max(-BEYOND_ANY_GAIN, finite(set_points.gain_threshold)))
    miss_penalty = finite(set_points.slo.miss_penalty)
    # An answer that will be served again costs each serving its part.
    if request.num_expected_uses > 1.0:
        price_of_money /= request.num_expected_uses
    qualities = None
    if request.score is not None and request.score_status is ScoreStatus.OK:
        qualities = request.score.quality
    unbilled = set_points.unbilled
    ordered = sorted(tiers, key=list_price)
    grants = [granted(request, tier, set_points) for tier in ordered]
    costs = [
        grant.cost_usd - held_usd(request, tier)
        for grant, tier in zip(grants, ordered, strict=True)
    ]
    asked = heights(request, ordered, costs, set_points)
    if request.held_tokens:
        unheld_costs = [grant.cost_usd for grant in grants]
        bare = replace(request, held_tokens=None)
        asked_unheld = heights(bare, ordered, unheld_costs, set_points)
    found = []
    for rank, tier in enumerate(ordered):
        name, grant, height, cost = tier.name, grants[rank], asked[rank], costs[rank]
        late = slo_miss_probability(request, tier, set_points.slo)
        money = 0.0 if name in unbilled else price_of_money * cost
        against = money + threshold * height + miss_penalty * late
        unheld = None
        quality = value = utility = None
        stated = qualities.get(name) if qualities is not None else None
        if stated is not None and math.isfinite(stated):
            quality = min(1.0, max(0.0, float(stated)))
            utility = quality - against
            value = utility + money
            if request.held_tokens:
                unheld = utility + threshold * (height - asked_unheld[rank])
                if name not in unbilled:
                    unheld -= price_of_money * (grant.cost_usd - cost)
        found.append(
            _Candidate(
                tier,
                name,
                rank,
                grant,
                cost,
                late,
                quality,
                against,
                height,
                unheld,
                value,
                utility,
            )
        )
    return found


def _apply_hard_limits(
    candidates: list[_Candidate],
    request: RouteRequest,
    set_points: PolicySetPoints,
    state: PolicyState | None,
) -> None:
    """Mark each tier that this request must not use, with the first rule that forbids it."""
    needs, allowed = request.needs, request.tenant.allowed_tiers
    # Estimates choose among tiers and refuse nobody.
    fitting = [c for c in candidates if needs.fits(c.tier.capabilities)]
    choosy = request.overrides.tier is None and 0 < len(fitting) < len(candidates)
    for candidate in candidates:
        tier, tight = candidate.tier, candidate.grant.tight
        capabilities = tier.capabilities
        candidate.lacks = needs.unmet(capabilities)
        if candidate.lacks or (choosy and not needs.fits(capabilities)):
            candidate.excluded = Reason.CAPABILITY
        elif not tier.available:
            candidate.excluded = Reason.UNAVAILABLE
        elif allowed is not None and candidate.name not in allowed:
            candidate.excluded = Reason.TENANT
        elif tight is not None:
            candidate.excluded = tight.reason
    if state is None:
        return
    for candidate in candidates:
        cap = candidate.tier.max_share
        if cap is None or candidate.excluded is not None or state.admits(candidate.name, cap):
            continue
        # A share is a wish about the mix, not a reason to refuse: the last tier stays.
        if any(c is not candidate and c.excluded is None for c in candidates):
            candidate.excluded = Reason.MAX_SHARE


def _accept_shorter(candidates: list[_Candidate]) -> bool:
    """Where no tier can pay a usual answer, those that pay a shorter one will do; whether any."""
    short = [
        c
        for c in candidates
        if c.grant.tight is not None and c.excluded is c.grant.tight.reason and c.grant.pays_some
    ]
    for candidate in short:
        candidate.excluded = None
    return bool(short)


def _preferred(
    candidates: list[_Candidate],
    request: RouteRequest,
    set_points: PolicySetPoints,
) -> tuple[_Candidate, Reason]:
    """The tier we would take if no ceiling were in the way, and why."""
    forced = request.overrides.tier
    if forced is not None:
        for candidate in candidates:
            if candidate.name == forced:
                return candidate, Reason.FORCED
        names = ", ".join(candidate.name for candidate in candidates)
        raise ValueError(f"tier {forced!r} does not exist; this router has {names}")
    if len(candidates) == 1:
        return candidates[0], Reason.ONLY_TIER
    scored = [candidate for candidate in candidates if candidate.utility is not None]
    if request.score is None or request.score_status is not ScoreStatus.OK:
        return _fallback(candidates, set_points), _STATUS_REASON[request.score_status]
    if request.score.out_of_distribution:
        return _fallback(candidates, set_points), Reason.OUT_OF_DISTRIBUTION
    if len(scored) < 2:
        return _fallback(candidates, set_points), Reason.PREDICTOR_FAILED
    best = _best(scored)
    floor = _floor(request)
    if floor is not None:
        floored = _best(_above_floor(scored, floor, scored[-1]))
        if floored is not best:
            return floored, Reason.QUALITY_FLOOR
    if request.held_tokens and best is not max(scored, key=_if_nothing_were_held):
        return best, Reason.PREFIX
    late = [candidate for candidate in scored if candidate.late]
    if late and best is not _best(scored, set_points=set_points):
        return best, Reason.SLO
    return best, Reason.SUFFICIENT if best.rank == 0 else Reason.GAIN


def _fallback(candidates: list[_Candidate], set_points: PolicySetPoints) -> _Candidate:
    """The fallback tier, else the dearest."""
    named = (c for c in candidates if c.name == set_points.fallback_tier)
    return next(named, candidates[-1])


def _if_nothing_were_held(candidate: _Candidate) -> tuple[float, float, int]:
    unheld = candidate.unheld if candidate.unheld is not None else -math.inf
    return unheld, -candidate.grant.cost_usd, -candidate.rank


def _best(scored: Sequence[_Candidate], set_points: PolicySetPoints | None = None) -> _Candidate:
    """Highest utility, ties to the cheaper; with `set_points`, utility without its SLO term."""
    give_back = finite(set_points.slo.miss_penalty) if set_points else 0.0
    best, best_key = scored[0], (-math.inf, -math.inf, -math.inf)
    for candidate in scored:
        utility = candidate.utility if candidate.utility is not None else -math.inf
        key = (utility + give_back * candidate.late, -candidate.cost, -candidate.rank)
        if key > best_key:
            best, best_key = candidate, key
    return best


def _floor(request: RouteRequest) -> float | None:
    floor = request.overrides.quality
    return min(1.0, floor) if floor is not None and math.isfinite(floor) else None


def _above_floor(
    scored: list[_Candidate], floor: float | None, reference: _Candidate
) -> list[_Candidate]:
    """Tiers whose predicted quality is at least `floor` times that of `reference`, the dearest
    scored tier; where ceilings leave none of these, the best of what they leave."""
    if floor is None:
        return scored
    assert reference.quality is not None
    bar = floor * reference.quality
    found = [c for c in scored if c is reference or (c.quality is not None and c.quality >= bar)]
    return found or [max(scored, key=lambda c: (c.quality or 0.0, -c.cost, -c.rank))]


def _within_limits(
    candidates: list[_Candidate],
    preferred: _Candidate,
    why: Reason,
    request: RouteRequest,
    set_points: PolicySetPoints,
) -> tuple[_Candidate | None, Reason]:
    """The preferred tier, or the best one that the ceilings leave; None to refuse."""
    if preferred.excluded is None:
        return preferred, why
    if preferred.excluded is Reason.MAX_SHARE and why is Reason.FORCED:
        return preferred, why  # who names a tier gets it
    blocked = preferred.excluded
    if why is Reason.FORCED:
        return None, blocked
    if blocked is Reason.BUDGET and set_points.on_exhausted != "downgrade":
        return None, blocked
    left = [candidate for candidate in candidates if candidate.excluded is None]
    if not left:
        # A tier that was only over its share is better than a refusal.
        spare = [c for c in candidates if c.excluded is Reason.MAX_SHARE]
        if spare:
            return spare[0], Reason.MAX_SHARE
        # A tier that could, but may not now, says more than one that never can.
        able = [c.excluded for c in candidates if c.excluded not in (None, Reason.CAPABILITY)]
        return None, (able[0] or blocked) if able and blocked is Reason.CAPABILITY else blocked
    scored = [candidate for candidate in left if candidate.utility is not None]
    if scored:
        dearest = [candidate for candidate in candidates if candidate.utility is not None][-1]
        return _best(_above_floor(scored, _floor(request), dearest)), blocked
    # Without scores: the nearest tier below the preferred one in price, else the cheapest left.
    below = [candidate for candidate in left if candidate.rank < preferred.rank]
    return (below[-1] if below else left[0]), blocked


def _refill_time(price: float, set_points: PolicySetPoints) -> float | None:
    missing = price - max(0.0, set_points.budget_remaining_usd or 0.0)
    rate = set_points.budget_refill_usd_per_s
    wait_s = missing / rate if rate > 0.0 and missing > 0.0 else math.nan
    return wait_s if math.isfinite(wait_s) else None


def _refusal(
    reason: Reason,
    preferred: _Candidate,
    candidates: list[_Candidate],
    tenant: str,
    refill_usd_per_s: float,
) -> str:
    """Which sum is short of which, or which tier may not be used; with the next step."""
    name, tight = preferred.name, preferred.grant.tight
    if reason is Reason.UNAVAILABLE:
        states = ", ".join(f"{c.name}: {c.excluded or 'ready'}" for c in candidates)
        return f"tier {name!r} has no ready endpoint and no other may serve ({states}); retry later"
    if tight is None or tight.reason is not reason:
        return ""  # the tenant may not use the tier: the caller knows both by name
    step = {
        Reason.MAX_COST: "raise it or shorten the prompt",
        Reason.TENANT: "ask for a cheaper tier or have the ceiling raised",
    }.get(reason, "raise budget.usdPerHour")
    usual = f"a usual answer of tier {name!r} may cost {preferred.grant.wanted_usd:.6g} USD"
    return f"{tight.words(tenant, name, refill_usd_per_s)}; {usual}; {step}"


def _lacking(candidates: list[_Candidate]) -> str:
    """Which tier lacks what."""
    lacking = "; ".join(
        f"tier {c.name!r} lacks {', '.join(c.lacks) or 'room in its context'}" for c in candidates
    )
    return f"no tier can do what this request asks: {lacking}"


def _verdict(candidate: _Candidate, request: RouteRequest) -> TierVerdict:
    tier = candidate.tier
    return TierVerdict(
        candidate.name,
        candidate.quality,
        candidate.cost,
        candidate.grant.reserve_usd,
        candidate.late,
        None if tier.ttft_s is None else max(0.0, tier.queue_wait_s) + tier.ttft_s,
        candidate.value,
        candidate.utility,
        candidate.excluded,
        round(held_tokens(request, tier)) if request.held_tokens else 0,
    )
