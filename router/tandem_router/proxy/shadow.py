"""Offers what was answered to the learner, and asks another tier what it would have said.

Nobody waits for a shadow request: it goes behind all others, is asked once, has no tenant, and is
in no share, latency or record of what was served.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from tandem_router.config import TenantConfig
from tandem_router.errors import ApiError, UpstreamError
from tandem_router.limits.ledger import Hold
from tandem_router.openai.answer import NotAnAnswer, answer_of, unpacked
from tandem_router.openai.usage import NOTHING_USED, Usage, read_usage, reply_chars, text_tokens
from tandem_router.proxy.arrival import Arrival
from tandem_router.proxy.context import Services
from tandem_router.proxy.faults import Fault, RequestRefused
from tandem_router.proxy.first_answer import asked_whole
from tandem_router.proxy.retries import Retries
from tandem_router.proxy.tier_assignment import Replaced, TierAssignment
from tandem_router.quality.learner import Answered, Lesson, NoAnswer, Shadow, Unseen
from tandem_router.quality.shadow_gate import Explored
from tandem_router.routing.answer_reading import text_of
from tandem_router.routing.new_tiers import EXPLORED_SHARE

LOWEST_PRIORITY = 100
# What such requests are answered with is no text, or rests on more than text.
UNCOMPARED = frozenset({"tools", "images"})


def offer(services: Services, assignment: TierAssignment, answer: Callable[[], str | None]) -> None:
    """Let the learner look at an answered request; answer: its text, None where it has no other.

    Costs a few microseconds unless the request is drawn.
    """
    learner, arrival = services.learner, assignment.arrival
    request = arrival.request
    if assignment.counted is None or arrival.forced or not arrival.hold.tenant.learning:
        return
    record = assignment.record
    services.quality.served(record.tenant, record.tier, record.quality)
    if not learner.on or request.num_choices != 1 or request.prompt is None:
        return
    if request.needs.features & UNCOMPARED:
        return
    prices = services.prices
    replaced = assignment.replaced if record.tier == prices.dearest else None
    if replaced is not None:
        draw = learner.draw_replaced(replaced.tier)
    else:
        explored = services.steering.new_tiers.to_explore
        draw = learner.draw(
            record.tier,
            prices.cheapest,
            prices.dearest,
            Explored(explored, EXPLORED_SHARE, not learner.compares_any)
            if explored is not None
            else None,
        )
    if draw is None:
        return
    text = answer()
    if text is None:
        return
    answered = Answered(
        record.request_id, record.tenant, record.tier, request.prompt, text, dict(record.quality)
    )
    shadow = _known(replaced) if replaced else _shadow(services, assignment, draw.tier)
    beside = _shadow(services, assignment, draw.beside) if draw.beside is not None else None
    learner.start(Lesson(draw, answered, prices.dearest, shadow, beside))


def _known(replaced: Replaced) -> Shadow:
    """The first answer of an escalation: paid by the request, and here already."""

    async def known() -> Unseen:
        return Unseen(replaced.text, 0, 0, 0.0)

    return Shadow(0.0, known, source="cascade")


def _shadow(services: Services, served: TierAssignment, tier: str) -> Shadow:
    arrival = served.arrival
    arrival = asked_whole(services, arrival)
    request = arrival.request
    most_tokens = request.max_tokens or services.config.budget.max_paid_tokens
    nobody = Hold(TenantConfig(name="learning"), (), 0.0)
    unseen = replace(
        arrival,
        overrides=replace(arrival.overrides, tier=tier),
        priority=LOWEST_PRIORITY,
        turn=LOWEST_PRIORITY,
        hold=nobody,
        started_at=services.clock(),
        deadline=services.clock() + services.config.failover.wait_s,
        cache_key=None,
    )
    most_usd = services.prices.cost_usd(tier, request.most_prompt_tokens, most_tokens)

    async def ask() -> Unseen:
        return await _ask(services, _Unseen(services, unseen, served, tier, most_tokens))

    return Shadow(most_usd, ask)


class _Unseen(TierAssignment):
    """A request that no client waits for: one tier, nobody's money, in no record."""

    def __init__(
        self,
        services: Services,
        arrival: Arrival,
        served: TierAssignment,
        tier: str,
        max_tokens: int,
    ) -> None:
        external = services.config.tier(tier).kind == "external"
        bound = max_tokens if external else served.decision.max_tokens
        decision = replace(served.decision, tier=tier, max_tokens=bound)
        super().__init__(services, arrival, served.scored, decision, None, None, recorded=False)
        self.lost_usd = 0.0

    def others(self, last_resort: bool = False) -> bool:
        return False

    def change(self, last_resort: bool = False, spent: bool = True) -> bool:
        return False

    def gave_up(self, fault: Fault) -> bool:
        """A try that failed may have been billed; there is no second one."""
        if fault.reached:
            self.lost_usd += self.cost_usd(self.unseen())
        return False


async def _ask(services: Services, assignment: _Unseen) -> Unseen:
    """Raises NoAnswer."""
    retries = Retries(services, assignment)
    request = assignment.arrival.request
    usage: Usage = NOTHING_USED
    try:
        response = await retries.open(request.body)
        body = unpacked(await response.read_all(), response.headers.get(b"content-encoding"))
        reply = answer_of(body, request.kind)
        seen = text_tokens(reply_chars(reply))
        usage = read_usage(reply.get("usage"), request.num_prompt_tokens, seen)
        retries.answered()
        text = text_of(reply, request.kind)
        cost_usd = assignment.lost_usd + assignment.cost_usd(usage)
        if text is None:
            raise NoAnswer("its answer has no text", cost_usd)
        return Unseen(text, usage.prompt_tokens, usage.output_tokens, cost_usd)
    except (ApiError, RequestRefused) as error:
        raise NoAnswer(str(error), assignment.lost_usd) from error
    except (UpstreamError, NotAnAnswer) as error:
        raise NoAnswer(str(error), assignment.cost_usd(assignment.unseen())) from error
    finally:
        retries.release(close=True)
