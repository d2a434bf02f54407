"""Which tier has a request: decided before anything is dispatched, perhaps changed once it is.

A request is decided once, counted once and recorded once. Where its tier cannot serve it, the
same decision is made again without that tier, and count and record move along.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from tandem_router.cache import CachedAnswer
from tandem_router.errors import ApiError, overloaded
from tandem_router.limits.ledger import Hold, Used
from tandem_router.openai.request import InferenceRequest, RequestHeaders
from tandem_router.openai.usage import Usage
from tandem_router.policy import Decision, Reason
from tandem_router.proxy.context import Services
from tandem_router.routing.decision_log import DecisionRecord
from tandem_router.routing.scorer import Scored
from tandem_router.routing.set_points import Counted

# A request whose latency SLO is this likely to be missed is shed where the Router says so.
SHED_ABOVE = 0.95
SHED_RETRY_AFTER_S = 2.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """An admitted request."""

    request: InferenceRequest
    headers: RequestHeaders
    hold: Hold
    request_id: str
    seed: int
    started_at: float  # of the router's clock
    created: int  # Unix time
    forced: str | None  # the tier that the client named
    cache_key: bytes | None  # None where the answer must not be reused


async def place(services: Services, arrival: Arrival) -> Placement:
    """Decide for a tier, or find a cached answer; waits for budget where the Router queues.

    Raises ApiError when the policy refuses.
    """
    request = arrival.request
    deadline = services.clock() + services.config.failover.wait_s
    scored = await services.routing.score(request)
    given_up = False
    while True:
        set_points = services.steering.set_points
        if given_up:
            set_points = replace(set_points, on_exhausted="reject")
        decision = services.routing.choose(
            request,
            arrival.headers.overrides,
            arrival.hold,
            scored,
            set_points,
            services.reuse.expected_uses(arrival.cache_key),
        )
        tier = decision.tier
        if tier is not None:
            cached = _find_cached(services, arrival, decision, set_points.lambda_per_usd)
            if cached is not None:
                decision = replace(decision, tier=cached.tier)
                return Placement(services, arrival, scored, decision, cached, None)
            _shed_if_late(services, decision)
            if services.ledger.move(arrival.hold, tier, decision.reserve_cost_usd):
                counted = services.steering.count(decision, request, set_points)
                return Placement(services, arrival, scored, decision, None, counted)
            # Concurrent requests took the money in between: ask again, soon.
            await asyncio.sleep(0.01)
            if services.clock() < deadline:
                continue
        if decision.queue and services.clock() >= deadline and not given_up:
            given_up = True  # a shorter answer is better than none
            continue
        if not decision.queue or services.clock() >= deadline:
            raise _refusal(services, arrival, decision)
        await asyncio.sleep(min(1.0, max(0.05, decision.retry_after_s or 0.5)))


class Placement:
    """The tier that a request has now, and why.

    cached: the answer to serve instead of asking a worker; it is not counted.
    """

    def __init__(
        self,
        services: Services,
        arrival: Arrival,
        scored: Scored,
        decision: Decision,
        cached: CachedAnswer | None,
        counted: Counted | None,
    ) -> None:
        assert decision.tier is not None
        self._services = services
        self.arrival = arrival
        self._failed_tiers: frozenset[str] = frozenset()
        self.scored = scored
        self.decision = decision
        self.cached = cached
        self.counted = counted
        self.tier = services.config.tier(decision.tier)
        request = arrival.request
        self.record = DecisionRecord(
            sequence=services.decisions.next_sequence(),
            request_id=arrival.request_id,
            time=services.wall_clock(),
            tenant=arrival.hold.tenant.name,
            model=request.model,
            kind=request.kind,
            stream=request.stream,
            tier=decision.tier,
            reason=self.reason,
            gain=decision.gain,
            threshold=decision.threshold,
            difficulty=decision.difficulty,
            quality=dict(scored.score.quality) if scored.score is not None else {},
            expected_cost_usd=decision.expected_cost_usd,
            max_tokens=decision.max_tokens,
            advised=decision.advised,
            verdicts=decision.verdicts,
        )
        services.decisions.add(self.record)

    @property
    def reason(self) -> str:
        """As the client and the decision log are told."""
        return "cached" if self.cached is not None else str(self.decision.reason)

    def change(self) -> bool:
        """Leave a tier that cannot serve, where the router may choose; False where it may not."""
        services, arrival, counted = self._services, self.arrival, self.counted
        if arrival.forced is not None or counted is None:
            return False
        failed = self._failed_tiers | {self.tier.name}
        others = [
            tier.name
            for tier in services.config.tiers
            if tier.name not in failed and services.picker.num_usable(tier.name)
        ]
        if not others:
            return False
        self._failed_tiers = failed
        decision = services.routing.choose(
            arrival.request,
            arrival.headers.overrides,
            arrival.hold,
            self.scored,
            counted.set_points,
            services.reuse.expected_uses(arrival.cache_key),
            failed,
        )
        if decision.tier is None or decision.tier in failed:
            return False
        if not services.ledger.move(arrival.hold, decision.tier, decision.reserve_cost_usd):
            return False
        services.steering.move(counted, decision)
        self.decision = decision
        self.tier = services.config.tier(decision.tier)
        self.record.tier = decision.tier
        self.record.reason = self.reason
        self.record.threshold = decision.threshold
        self.record.max_tokens = decision.max_tokens
        self.record.verdicts = decision.verdicts
        self.record.expected_cost_usd = decision.expected_cost_usd
        return True

    def cost_usd(self, usage: Usage) -> float:
        """Price of an answer of this tier."""
        return self._services.prices.cost_usd(
            self.tier.name,
            usage.prompt_tokens,
            usage.output_tokens,
            usage.cached_tokens,
            usage.reasoning_tokens,
        )

    def lost(self, usage: Usage) -> None:
        """Book an attempt that the provider was asked for and whose answer was lost.

        The tier's money is held anew for the next attempt. Raises ApiError where it is not there.
        """
        services, decision = self._services, self.decision
        usd = self.cost_usd(usage)
        bound = services.metrics.tiers[self.tier.name]
        bound.prompt_tokens.inc(usage.prompt_tokens)
        bound.output_tokens.inc(usage.output_tokens)
        bound.cost.inc(usd)
        used = Used(float(usage.prompt_tokens + usage.output_tokens), usd)
        held = decision.reserve_cost_usd
        if not services.ledger.move(self.arrival.hold, self.tier.name, held, used):
            raise overloaded(
                f"an answer of tier {self.tier.name!r} was lost, and what it cost leaves no "
                f"{held:.6g} USD for another try",
                code="budget",
                retry_after_s=1.0,
            )

    def reply_headers(self, cost_usd: float) -> list[tuple[bytes, bytes]]:
        """What the client is told of the choice."""
        decision = self.decision
        headers = [
            (b"x-request-id", self.arrival.request_id.encode()),
            (b"x-tandem-tier", self.tier.name.encode()),
            (b"x-tandem-reason", self.reason.encode()),
            (b"x-tandem-cost-usd", f"{cost_usd:.9f}".encode()),
        ]
        if decision.difficulty is not None:
            headers.append((b"x-tandem-difficulty", f"{decision.difficulty:.4f}".encode()))
        if decision.max_tokens is not None and self.cached is None:
            headers.append((b"x-tandem-max-tokens", str(decision.max_tokens).encode()))
        if decision.gain is not None:
            headers.append((b"x-tandem-gain", f"{decision.gain:.4f}".encode()))
        return headers


def _find_cached(
    services: Services, arrival: Arrival, decision: Decision, lambda_per_usd: float
) -> CachedAnswer | None:
    if arrival.cache_key is None or arrival.headers.no_cache:
        return None
    return services.reuse.find(
        arrival.cache_key,
        decision,
        arrival.forced,
        arrival.headers.overrides.quality is not None,
        lambda_per_usd,
    )


def _shed_if_late(services: Services, decision: Decision) -> None:
    """429 where the Router prefers refusing to being late (`on_exhausted: Reject`).

    Predictions rest on the last seconds of traffic, so a router that sheds everything soon knows
    nothing of its latency and tries again.
    """
    rejects = services.config.budget.on_exhausted == "Reject"
    if rejects and decision.slo_miss_probability >= SHED_ABOVE:
        raise overloaded(
            f"tier {decision.tier!r} is too loaded to meet the latency SLO; retry later",
            code="slo",
            retry_after_s=SHED_RETRY_AFTER_S,
        )


def _refusal(services: Services, arrival: Arrival, decision: Decision) -> ApiError:
    code, account = str(decision.reason), arrival.hold.tenant
    allowed, forced = account.allowed_tiers, arrival.forced
    if decision.reason is Reason.TENANT and not decision.message:
        which = f"tier {forced!r}" if forced is not None else "any tier that is ready"
        names = ", ".join(allowed or ()) or "none"
        message = f"tenant {account.name!r} may not use {which}; allowed: {names}"
        return ApiError(403, message, type="permission_error", code=code)
    if decision.reason is Reason.MAX_COST:
        return ApiError(400, decision.message, param="x-tandem-max-cost-usd", code=code)
    if decision.reason in (Reason.TENANT, Reason.BUDGET):
        wait_s = services.ledger.wait_until(
            arrival.hold, decision.reason is Reason.BUDGET, decision.wanted_usd
        )
        if wait_s is None:
            # No waiting helps: more is wanted than ever piles up.
            return ApiError(
                429, decision.message, type="insufficient_quota", code=code, retry=False
            )
        return overloaded(
            decision.message or "the budget was taken by other requests; retry later",
            code=code,
            retry_after_s=wait_s,
        )
    return overloaded(
        decision.message, code=code, retry_after_s=decision.retry_after_s or 1.0, status=429
    )
