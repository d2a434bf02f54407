"""What ceilings of money leave of an answer: how long it may get, and which ceiling is short.

A ceiling is an upper bound because the answer's length is bounded: what is forwarded asks for at
most the tokens that the tightest ceiling can pay, and that much is held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from tandem_router.policy.cost import expected_output_tokens, usable_price
from tandem_router.policy.terms import PolicySetPoints, Reason, RouteRequest, TierOption


class Ceiling(Struct, frozen=True):
    """One bound of what a request may cost, and whose it is."""

    reason: Reason
    usd: float
    whose: Literal["request", "hour", "header", "budget"]

    def words(self, tenant: str, tier: str, refill_usd_per_s: float) -> str:
        """The sum that is short, such as "the budget has 0.01 USD left"; made for refusals only."""
        who, amount = f"tenant {tenant!r}" if tenant else "this tenant", f"{self.usd:.6g} USD"
        if self.whose == "request":
            return f"{who} may spend {amount} on one request"
        if self.whose == "hour":
            return f"{who} has {amount} left of its hourly ceiling"
        if self.whose == "header":
            return f"x-tandem-max-cost-usd allows {amount}"
        if refill_usd_per_s == 0.0 and not self.usd > 0.0:
            return f"workers use the whole budget, none is left for external tier {tier!r}"
        return f"the budget has {amount} left"


class Grant(Struct, frozen=True):
    """What the ceilings pay of one tier's answer.

    cost_usd is expected, reserve_usd the most that it can get. max_tokens: to be forwarded per
    choice; None leaves what the client said. tight: the ceiling that cannot pay a usual answer;
    pays_some: whether it pays at least the least worth having.
    """

    cost_usd: float
    reserve_usd: float
    max_tokens: int | None
    tight: Ceiling | None = None
    pays_some: bool = True
    wanted_usd: float = 0.0  # what a usual answer may cost
    least_usd: float = 0.0  # what the shortest one worth having may cost


NOTHING_GRANTED = Grant(0.0, 0.0, None)


def ceilings_of(
    request: RouteRequest, tier: TierOption, set_points: PolicySetPoints
) -> list[Ceiling]:
    """Every ceiling that an answer of `tier` is under, the hardest first."""
    tenant = request.tenant
    found: list[Ceiling] = []
    if tenant.max_cost_usd is not None:
        found.append(Ceiling(Reason.TENANT, tenant.max_cost_usd, "request"))
    if tenant.remaining_usd is not None:
        found.append(Ceiling(Reason.TENANT, tenant.remaining_usd, "hour"))
    if request.overrides.max_cost_usd is not None:
        found.append(Ceiling(Reason.MAX_COST, request.overrides.max_cost_usd, "header"))
    if set_points.budget_remaining_usd is not None and tier.name not in set_points.unbilled:
        found.append(Ceiling(Reason.BUDGET, set_points.budget_remaining_usd, "budget"))
    return found


def granted(request: RouteRequest, tier: TierOption, set_points: PolicySetPoints) -> Grant:
    """What the request may take from `tier`; finite and not negative whatever the inputs."""
    mean, high = expected_output_tokens(request, tier)
    price_in = usable_price(tier.usd_per_1m_input_tokens)
    price_out = usable_price(tier.usd_per_1m_output_tokens)
    if request.num_choices > 1:
        price_out *= request.num_choices
    prompt = request.prompt_tokens if request.prompt_tokens > 0 else 0
    expected = prompt * price_in
    ceilings = ceilings_of(request, tier, set_points)
    if not ceilings:
        return Grant(expected + mean * price_out, expected + high * price_out, None)
    most_prompt_usd = max(prompt, request.most_prompt_tokens) * price_in
    client = None if request.max_tokens is None else max(0, request.max_tokens)
    wanted = client if client is not None else _unbounded(request, tier, set_points)
    usual = min(wanted, math.ceil(high))
    least = min(wanted, max(0, set_points.min_paid_tokens))
    affordable, tight = _affordable(ceilings, most_prompt_usd, price_out, wanted, usual)
    length = max(0, min(wanted, affordable))
    wanted_usd = most_prompt_usd + usual * price_out
    reserve = most_prompt_usd + length * price_out
    return Grant(
        cost_usd=min(reserve, expected + min(mean, length) * price_out),
        reserve_usd=reserve,
        max_tokens=None if length == client else length,
        tight=tight,
        pays_some=affordable >= least,
        wanted_usd=wanted_usd,
        least_usd=most_prompt_usd + least * price_out,
    )


def _unbounded(request: RouteRequest, tier: TierOption, set_points: PolicySetPoints) -> int:
    """How long an answer may get whose client sets no bound: what is forwarded has to fit into the
    tier's context, or its worker refuses a request that it would have served without a ceiling."""
    most, context = max(1, set_points.max_paid_tokens), tier.capabilities.context_length
    if context is None:
        return most
    room = context - max(request.prompt_tokens, request.most_prompt_tokens)
    if room < set_points.min_paid_tokens:  # by its longest reading; by the likely one there is more
        room = context - request.prompt_tokens
    return max(1, min(most, room))


def _affordable(
    ceilings: Sequence[Ceiling], prompt_usd: float, price_out: float, wanted: int, usual: int
) -> tuple[int, Ceiling | None]:
    """(tokens of a choice that all ceilings pay, -1 for not even the prompt; the tightest)."""
    least, tight = wanted, None
    for ceiling in ceilings:
        left = ceiling.usd - prompt_usd
        if not left >= 0.0:  # a NaN ceiling forbids
            tokens = -1
        elif price_out <= 0.0 or left / price_out >= wanted:
            tokens = wanted
        else:
            # The last token is not worth a rounding error above the ceiling.
            tokens = math.floor(left / price_out * (1.0 - 1e-12))
        if tokens < usual and (tight is None or tokens < least):
            tight = ceiling
        least = min(least, tokens)
    return least, tight
