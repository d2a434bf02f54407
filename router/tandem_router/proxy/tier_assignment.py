"""Which tier has a request: decided before anything is dispatched, perhaps changed once it is.

A request is decided once, counted once and recorded once. Where its tier cannot serve it, the
same decision is made again without that tier, and count and record move along.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from msgspec import Struct
from msgspec.structs import replace

from tandem_router.cache import CachedAnswer
from tandem_router.config import TierConfig
from tandem_router.errors import ApiError, overloaded
from tandem_router.limits.ledger import Used
from tandem_router.openai.request import DEFAULT_OUTPUT_TOKENS
from tandem_router.openai.usage import NOTHING_USED, Usage
from tandem_router.policy import Decision, PolicySetPoints, Reason
from tandem_router.proxy.arrival import Arrival
from tandem_router.proxy.context import Services
from tandem_router.proxy.faults import Fault
from tandem_router.proxy.prefix_chain import chain_of
from tandem_router.proxy.token_prompts import text_of_ids
from tandem_router.routing.answer_reading import Middle
from tandem_router.routing.decision_log import Attempt, DecisionRecord
from tandem_router.routing.scorer import UNSCORED, Scored
from tandem_router.routing.set_points import Counted

# A request whose latency SLO is this likely to be missed is shed where the Router says so.
SHED_ABOVE = 0.95
SHED_RETRY_AFTER_S = 2.0


class NotNow(Exception):
    """The answer is in the cache, or its tier has no worker that may be asked at once."""


async def assign(
    services: Services,
    arrival: Arrival,
    now: Callable[[TierConfig], bool] | None = None,
    found: Unassigned | None = None,
) -> TierAssignment:
    """Decide for a tier, or find a cached answer; waits for budget where the Router queues.

    now: given by who can only hand the request to a worker, and at once: whether the tier has one.
    found: what `assign_now` came to, a moment ago.

    Raises ApiError when the policy refuses, NotNow (nothing is counted) where `now` does not do.
    """
    look: TierAssignment | Unassigned | None = found
    if look is None:
        scored = UNSCORED
        if not arrival.forced:
            request = arrival.request
            text = request.prompt
            if text is None and request.token_ids is not None:
                text = await text_of_ids(services, request.token_ids)
            scored = await services.routing.score(text)
        look = _look(services, arrival, Unassigned(scored), now)
    while isinstance(look, Unassigned):
        decision = look.decision
        assert decision is not None
        if decision.tier is not None:
            # Concurrent requests took the money in between: ask again, soon.
            await asyncio.sleep(0.01)
        if decision.tier is None or services.clock() >= arrival.deadline:
            if decision.queue and services.clock() >= arrival.deadline and not look.given_up:
                look.given_up = True  # a shorter answer is better than none
            elif not decision.queue or services.clock() >= arrival.deadline:
                raise _refusal(services, arrival, decision)
            else:
                await asyncio.sleep(min(1.0, max(0.05, decision.retry_after_s or 0.5)))
        look = _look(services, arrival, look, now)
    return look


def assign_now(services: Services, arrival: Arrival) -> TierAssignment | Unassigned | None:
    """As `assign`, at once; what `assign` goes on from where something has to be waited for.

    Raises ApiError where a latency SLO would be missed.
    """
    if arrival.forced:
        return _look(services, arrival, Unassigned(UNSCORED))
    text = arrival.request.prompt
    scored = services.routing.scorer.score_now(text) if text is not None else None
    return None if scored is None else _look(services, arrival, Unassigned(scored))


class Unassigned(Struct):
    """A request that could not be assigned so far, as it was decided last."""

    scored: Scored
    decision: Decision | None = None
    arrived: bool = False  # counted among the arrivals
    given_up: bool = False  # to wait for money
    chain: Sequence[int] | None = None  # of its prompt; None: nobody has made it yet


def _look(
    services: Services,
    arrival: Arrival,
    known: Unassigned,
    now: Callable[[TierConfig], bool] | None = None,
) -> TierAssignment | Unassigned:
    """Decide once."""
    request, cache_key, scored = arrival.request, arrival.cache_key, known.scored
    routing, set_points = services.routing, services.steering.set_points_now()
    if known.given_up:
        set_points = replace(set_points, on_exhausted="reject")
    if known.chain is None and not arrival.forced and routing.weighs_prefixes:
        known.chain = chain_of(services, arrival)
    decision = known.decision = routing.choose(
        request,
        arrival.overrides,
        arrival.hold,
        scored,
        set_points,
        1.0 if cache_key is None else services.reuse.expected_uses(cache_key),
        chain=known.chain or (),
    )
    tier = decision.tier
    if tier is None:
        if now is not None and decision.queue:
            raise NotNow
        return known
    cached = None
    if cache_key is not None:
        cached = _find_cached(services, arrival, cache_key, decision, set_points.lambda_per_usd)
    if now is not None and (cached is not None or decision.queue or not now(routing.tiers[tier])):
        raise NotNow
    if cached is not None:
        decision = replace(decision, tier=cached.tier)
        return TierAssignment(services, arrival, scored, decision, cached, None)
    if not known.arrived:
        services.arrivals.arrived(decision, request.num_prompt_tokens)
        known.arrived = True
    if decision.slo_miss_probability >= SHED_ABOVE:
        _shed_if_late(services, decision)
    middle, chosen = None, decision
    if routing.reads_answers and not known.given_up and not arrival.forced:
        middle = routing.middle(request, arrival.overrides.ttft_slo_s, decision)
        if middle is not None:
            chosen = _as_read(services, arrival, scored, set_points, middle, decision)
            middle = middle if chosen is not decision else None
            assert chosen.tier is not None
            tier = chosen.tier
    if not services.ledger.move(arrival.hold, tier, chosen.reserve_cost_usd):
        return known
    counted = services.steering.count(chosen, request, set_points, middle is not None)
    return TierAssignment(
        services, arrival, scored, chosen, None, counted, middle, chain=known.chain
    )


def _as_read(
    services: Services,
    arrival: Arrival,
    scored: Scored,
    set_points: PolicySetPoints,
    middle: Middle,
    decision: Decision,
) -> Decision:
    """The decision for the tier whose answer will be read, with what was decided for the prompt."""
    forced = services.routing.choose(
        arrival.request,
        replace(arrival.overrides, tier=middle.first),
        arrival.hold,
        scored,
        set_points,
        services.reuse.expected_uses(arrival.cache_key),
    )
    if forced.tier is None:
        return decision
    return replace(
        forced,
        reason=Reason.VERIFIED,
        gain=decision.gain,
        threshold=decision.threshold,
        difficulty=decision.difficulty,
    )


class Replaced(Struct, frozen=True):
    """The words of a first answer that was read and not sent."""

    tier: str
    text: str


class TierAssignment:
    """The tier that a request has now, why, and what earlier tries have used.

    cached: the answer to serve instead of asking a worker; it is not counted. middle: set where
    the first answer is to be read before anything is sent. recorded: whether people see it.
    """

    # What most requests leave as it is, so that making one costs little.
    _failed_tiers: frozenset[str] = frozenset()
    _spent_tiers: frozenset[str] = frozenset()  # of them: nobody is left to be asked
    committed = False  # once the client has headers, the tier they name stays
    # Of a first answer that was read: it may still be sent, and it is booked already.
    has_answer = False
    first_cost_usd = 0.0
    _first: Decision | None = None
    replaced: Replaced | None = None
    _priced: tuple[Usage, str, float] | None = None  # what was asked of `cost_usd` last

    def __init__(
        self,
        services: Services,
        arrival: Arrival,
        scored: Scored,
        decision: Decision,
        cached: CachedAnswer | None,
        counted: Counted | None,
        middle: Middle | None = None,
        recorded: bool = True,
        chain: Sequence[int] | None = None,
    ) -> None:
        assert decision.tier is not None
        self._services = services
        self.arrival = arrival
        self.scored = scored
        self.chain = chain  # of its prompt; None: nobody has made it yet
        self.decision = decision
        self.cached = cached
        self.counted = counted
        self.middle = middle
        self._at(decision.tier)
        self.reason = str(decision.reason) if cached is None else "cached"
        request = arrival.request
        # By place: names would cost as much as the record itself.
        self.record = DecisionRecord(
            services.decisions.next_sequence() if recorded else 0,
            arrival.request_id,
            services.wall_clock(),
            arrival.hold.tenant.name,
            request.model,
            request.kind,
            request.stream,
            decision.tier,
            self.reason,
            decision.gain,
            decision.threshold,
            decision.difficulty,
            scored.score.quality if scored.score is not None else {},
            decision.expected_cost_usd,
            max_tokens=decision.max_tokens,
            advised=decision.advised,
            verdicts=decision.verdicts,
        )
        if recorded:
            services.decisions.add(self.record)

    def _reason(self) -> str:
        """As the client and the decision log are told."""
        return "cached" if self.cached is not None else str(self.decision.reason)

    @property
    def reads_answer(self) -> bool:
        """Whether the answer asked for now is to be read before it is sent."""
        return self.middle is not None and not self.has_answer

    def expected_tokens(self) -> float | None:
        """Predicted length of this tier's answer; None where nothing predicts one."""
        lengths: Mapping[str, float] | None = getattr(self.scored.score, "mean_tokens", None)
        return None if lengths is None else lengths.get(self.name)

    def _at(self, name: str) -> None:
        """Take a tier, and what of it every station asks for.

        queue_wait_s: what stood before the request when it was chosen; latencies are net of it.
        """
        routing = self._services.routing
        tier = self.tier = routing.tiers[name]
        self.name = name
        external = self.is_external = tier.kind == "external"
        self.queue_wait_s = 0.0 if external else routing.queue_wait_s(name)

    def others(self, last_resort: bool = False) -> bool:
        """Whether the router may choose and some other tier could take the request now.

        last_resort: or has workers that failed other requests lately, which is better than none.
        """
        if self.arrival.forced or self.counted is None or self.committed or self.has_answer:
            return False  # an answer that was read takes the place of another tier's
        services, own = self._services, self.name
        failed = self._spent_tiers if last_resort else self._failed_tiers
        now, picker = services.clock(), services.picker
        for name in services.routing.tiers:
            if name == own or name in failed:
                continue
            if picker.ready(name, now) or (last_resort and picker.resting(name)):
                return True
        return False

    def change(self, last_resort: bool = False, spent: bool = True) -> bool:
        """Leave a tier that cannot serve, where the router may choose; False where it may not.

        Every ceiling holds for the new tier, too. Count, money and record move along. spent: nobody
        of it is left; else it may be come back to as a last resort.
        """
        services, arrival, counted = self._services, self.arrival, self.counted
        if counted is None or not self.others(last_resort):
            return False
        here = frozenset({self.name})
        spent_tiers = self._spent_tiers | here if spent else self._spent_tiers
        failed = here | (spent_tiers if last_resort else self._failed_tiers)
        decision = services.routing.choose(
            arrival.request,
            arrival.overrides,
            arrival.hold,
            self.scored,
            counted.set_points,
            services.reuse.expected_uses(arrival.cache_key),
            failed,
            self.chain or (),
        )
        if decision.tier is None or decision.tier in failed:
            return False
        if not services.ledger.move(arrival.hold, decision.tier, decision.reserve_cost_usd):
            return False
        self._failed_tiers, self._spent_tiers = self._failed_tiers | here, spent_tiers
        services.steering.move(counted, decision)
        self.middle = None  # whoever takes over answers directly
        self._take(decision, Reason.UNAVAILABLE)
        return True

    def _take(self, decision: Decision, reason: Reason) -> None:
        assert decision.tier is not None
        if decision.tier != self.name:
            self._services.metrics.tier_changes[(self.name, decision.tier)].inc()
        self.decision = replace(decision, reason=reason)
        self._at(decision.tier)
        self.record.tier = decision.tier
        self.reason = self.record.reason = self._reason()
        self.record.threshold = decision.threshold
        self.record.max_tokens = decision.max_tokens
        self.record.verdicts = decision.verdicts
        self.record.expected_cost_usd = decision.expected_cost_usd

    def escalate(self, usage: Usage, text: str) -> bool:
        """Ask the dearer tier, the first answer's `usage` booked; False where it may not be asked.

        Whether or not, the first answer is booked from here on.
        """
        services, arrival, counted, middle = self._services, self.arrival, self.counted, self.middle
        assert counted is not None
        assert middle is not None
        if not services.picker.num_usable(middle.second):
            return False
        decision = services.routing.choose(
            arrival.request,
            replace(arrival.overrides, tier=middle.second),
            arrival.hold,
            self.scored,
            counted.set_points,
            services.reuse.expected_uses(arrival.cache_key),
        )
        found = next((v for v in decision.verdicts if v.tier == middle.second), None)
        if decision.tier is None or found is None or found.excluded is not None:
            return False
        cost_usd = self.cost_usd(usage)
        used = Used(float(usage.prompt_tokens + usage.output_tokens), cost_usd)
        self.has_answer, self.first_cost_usd = True, cost_usd
        bound = services.metrics.tiers[self.tier.name]
        bound.prompt_tokens.inc(usage.prompt_tokens)
        bound.output_tokens.inc(usage.output_tokens)
        bound.cost.inc(cost_usd)
        if not services.ledger.move(arrival.hold, middle.second, decision.reserve_cost_usd, used):
            return False
        self._first = self.decision
        services.steering.move(counted, decision)
        self.replaced = Replaced(middle.first, text)
        self._take(replace(decision, gain=self.decision.gain), Reason.ESCALATED)
        return True

    def go_back(self) -> None:
        """The dearer tier gave no answer: the first one is sent, and nothing more is held."""
        counted = self.counted
        first = self._first
        assert counted is not None
        assert first is not None
        assert first.tier is not None
        self._services.ledger.move(self.arrival.hold, first.tier, 0.0)
        self._services.steering.move(counted, first)
        self.replaced = None
        self._take(first, Reason.UNVERIFIED)

    def was_read(self, reason: Reason) -> None:
        """What is told of an answer that is sent after reading."""
        self.decision = replace(self.decision, reason=reason)
        self.reason = self.record.reason = self._reason()

    def cost_usd(self, usage: Usage) -> float:
        """Price of an answer of this tier; asked again for the one that was asked for last."""
        priced = self._priced
        if priced is not None and priced[0] is usage and priced[1] == self.name:
            return priced[2]
        cost_usd = self._services.prices.cost_usd(
            self.name,
            usage.prompt_tokens,
            usage.output_tokens,
            usage.cached_tokens,
            usage.reasoning_tokens,
        )
        self._priced = (usage, self.name, cost_usd)
        return cost_usd

    def unseen(self, whole: bool = False) -> Usage:
        """An answer that was asked for and never read: ours stops with us, a provider bills it.

        whole: all of it, though a stream was asked for.
        """
        if not self.is_external:
            return NOTHING_USED
        request, output = self.arrival.request, 0
        if whole or not request.stream:
            bounds = (self.decision.max_tokens, request.max_tokens, DEFAULT_OUTPUT_TOKENS)
            output = min(each for each in bounds if each is not None) * request.num_choices
        return Usage(request.num_prompt_tokens, output, estimated=True)

    def gave_up(self, fault: Fault) -> bool:
        """Note a try that gave no answer, and book it where its provider has had the request.

        The tier's money is held anew for another try; False where it is not there.
        """
        services, tier = self._services, self.tier.name
        usage = self.unseen(fault.whole) if fault.reached and not self.committed else NOTHING_USED
        cost_usd = self.cost_usd(usage)
        self.record.attempts += (Attempt(tier, str(fault.kind), cost_usd),)
        if usage is NOTHING_USED:
            return True
        bound = services.metrics.tiers[tier]
        bound.prompt_tokens.inc(usage.prompt_tokens)
        bound.output_tokens.inc(usage.output_tokens)
        bound.cost.inc(cost_usd)
        used = Used(float(usage.prompt_tokens + usage.output_tokens), cost_usd)
        held = self.decision.reserve_cost_usd
        return services.ledger.move(self.arrival.hold, tier, held, used)

    def reply_lines(self, cost_usd: float) -> bytes:
        """`reply_headers` as they are written."""
        decision = self.decision
        gain, difficulty = decision.gain, decision.difficulty
        if gain is None or difficulty is None or decision.max_tokens is not None:
            return b"".join([b"%b: %b\r\n" % header for header in self.reply_headers(cost_usd)])
        return (
            b"x-request-id: %b\r\n%bx-tandem-cost-usd: %.9f\r\nx-tandem-difficulty: %.4f\r\n"
            b"x-tandem-gain: %.4f\r\n"
        ) % (
            self.arrival.request_id.encode(),
            _choice_lines(self.name, self.reason),
            cost_usd,
            difficulty,
            gain,
        )

    def reply_headers(self, cost_usd: float) -> list[tuple[bytes, bytes]]:
        """What the client is told of the choice."""
        decision = self.decision
        headers = [
            (b"x-request-id", self.arrival.request_id.encode()),
            (b"x-tandem-tier", self.tier.name.encode()),
            (b"x-tandem-reason", self.reason.encode()),
            (b"x-tandem-cost-usd", b"%.9f" % cost_usd),
        ]
        if decision.difficulty is not None:
            headers.append((b"x-tandem-difficulty", b"%.4f" % decision.difficulty))
        if decision.max_tokens is not None and self.cached is None:
            headers.append((b"x-tandem-max-tokens", b"%d" % decision.max_tokens))
        if decision.gain is not None:
            headers.append((b"x-tandem-gain", b"%.4f" % decision.gain))
        return headers


@lru_cache(maxsize=256)
def _choice_lines(tier: str, reason: str) -> bytes:
    return f"x-tandem-tier: {tier}\r\nx-tandem-reason: {reason}\r\n".encode()


def _find_cached(
    services: Services, arrival: Arrival, key: bytes, decision: Decision, lambda_per_usd: float
) -> CachedAnswer | None:
    if arrival.no_cache:
        return None
    return services.reuse.find(
        key,
        decision,
        arrival.overrides.tier,
        arrival.overrides.quality is not None,
        lambda_per_usd,
    )


def _shed_if_late(services: Services, decision: Decision) -> None:
    """429 where the Router prefers refusing to being late (`on_exhausted: Reject`).

    Predictions rest on the last seconds of traffic, so a router that sheds everything soon knows
    nothing of its latency and tries again.
    """
    if not services.routing.allows_late:
        services.arrivals.refused()
        raise overloaded(
            f"tier {decision.tier!r} is too loaded to meet the latency SLO; retry later",
            code="slo",
            retry_after_s=SHED_RETRY_AFTER_S,
        )


def _lack(services: Services, arrival: Arrival) -> str:
    """The code of a 400 for what no tier can: clients fall back on another model by it."""
    needs, tiers = arrival.request.needs, services.config.tiers
    asked = [tier.name for tier in tiers if arrival.overrides.tier in (None, tier.name)]
    able = [services.routing.capabilities(name) for name in asked]
    features = all(getattr(each, name) for each in able for name in needs.features)
    return "context_length_exceeded" if features else "unsupported_by_tier"


def _refusal(services: Services, arrival: Arrival, decision: Decision) -> ApiError:
    code, account = str(decision.reason), arrival.hold.tenant
    allowed, forced = account.allowed_tiers, arrival.overrides.tier
    if decision.reason is Reason.TENANT and not decision.message:
        which = f"tier {forced!r}" if forced is not None else "any tier that is ready"
        names = ", ".join(allowed or ()) or "none"
        message = f"tenant {account.name!r} may not use {which}; allowed: {names}"
        return ApiError(403, message, type="permission_error", code=code)
    if decision.reason is Reason.CAPABILITY:
        return ApiError(400, decision.message, code=_lack(services, arrival))
    if decision.reason is Reason.MAX_COST:
        return ApiError(400, decision.message, param="x-tandem-max-cost-usd", code=code)
    if decision.reason in (Reason.TENANT, Reason.BUDGET):
        budget = decision.reason is Reason.BUDGET
        wait_s = services.ledger.wait_until(arrival.hold, budget, decision.wanted_usd)
        if wait_s is None:
            # A usual answer is more than ever piles up; a short one may not be.
            wait_s = services.ledger.wait_until(arrival.hold, budget, decision.least_usd)
        if wait_s is None:
            return ApiError(
                429, decision.message, type="insufficient_quota", code=code, retry=False
            )
        said = decision.message or "the budget was taken by other requests"
        return overloaded(
            f"{said}; or retry in {max(1, math.ceil(wait_s))} s", code=code, retry_after_s=wait_s
        )
    return overloaded(
        decision.message, code=code, retry_after_s=decision.retry_after_s or 1.0, status=429
    )
