"""How much of the threshold counts against a tier, by what it costs more than the cheapest.

A threshold on the gain asks the same of every request. What the dearer tier costs more is not the
same: a long prompt is dearer than a short one, and a conversation whose prefix a tier holds costs
there what is new, elsewhere all of it. Two cases:

* where the usual saving is known, the threshold is what is asked for that, and of each request in
  proportion to its own: the least cost at a quality that is kept on average;
* else only what is held is weighed: the threshold is asked in proportion to what the dearer tier
  costs more now over what it would if all tiers held as much. A conversation stays where it is,
  unless the gain is worth the move.
"""

from __future__ import annotations

from collections.abc import Sequence

from tandem_router.policy.cost import usable_price
from tandem_router.policy.terms import PolicySetPoints, RouteRequest, TierOption, finite

# By how much: nobody knows how long the answer gets, or whether another turn follows.
WORTH_OF_A_MOVE = 0.15


def held_tokens(request: RouteRequest, tier: TierOption) -> float:
    """Tokens of the prompt that `tier` has already, at most all of them."""
    held = finite(request.held_tokens.get(tier.name, 0.0)) if request.held_tokens else 0.0
    return min(max(0.0, held), max(0.0, float(request.prompt_tokens)))


def held_usd(request: RouteRequest, tier: TierOption, booked: bool = False) -> float:
    """What of the prompt's price need not be paid again at `tier`.

    A worker computes nothing of what it has; booked: unless a price says so, the books do.
    """
    if not request.held_tokens:
        return 0.0
    return held_tokens(request, tier) * _price_of_held(tier, booked)


def _price_of_held(tier: TierOption, booked: bool = False) -> float:
    """Dollars by which a token that a tier holds is cheaper there."""
    cached = tier.usd_per_1m_cached_input_tokens
    if cached is None:
        if booked or not tier.is_pool:
            return 0.0
        cached = 0.0
    return max(0.0, usable_price(tier.usd_per_1m_input_tokens) - usable_price(cached))


def heights(
    request: RouteRequest,
    tiers: Sequence[TierOption],
    costs: Sequence[float],
    set_points: PolicySetPoints,
) -> list[float]:
    """How many times the threshold counts against each tier, cheapest first: 0 for the first.

    costs: expected, of what is new. By rank where neither case holds, where the threshold asks for
    no gain, and where money has a price of its own.
    """
    top = max(1, len(costs) - 1)
    by_rank = [rank / top for rank in range(len(costs))]
    if not set_points.gain_threshold > 0.0 or set_points.lambda_per_usd > 0.0:
        return by_rank
    usual, most = finite(set_points.usual_saving_usd), max(0.0, finite(set_points.most_stake))
    if not request.held_tokens:
        return [in_proportion(cost - costs[0], usual, most) for cost in costs] if usual else by_rank
    held = [held_tokens(request, tier) for tier in tiers]
    least, stay = min(held), _stay(held)
    if usual > 0.0:
        return [stay * in_proportion(cost - costs[0], usual, most) for cost in costs]
    even = [
        cost + held_usd(request, tier) - least * _price_of_held(tier)
        for tier, cost in zip(tiers, costs, strict=True)
    ]
    return [
        stay * rank * in_proportion(cost - costs[0], same - even[0], most)
        for rank, cost, same in zip(by_rank, costs, even, strict=True)
    ]


def _stay(held: Sequence[float]) -> float:
    """What makes a move worth more than it is expected to cost, whichever way it goes."""
    if held[0] > held[-1]:
        return 1.0 + WORTH_OF_A_MOVE
    return 1.0 - WORTH_OF_A_MOVE if held[0] < held[-1] else 1.0


def in_proportion(saving_usd: float, usual_usd: float, most: float) -> float:
    """A saving in units of the usual one, at most `most` times it, either way."""
    if not usual_usd > 0.0:
        return 1.0 if saving_usd > 0.0 else 0.0
    return min(most, max(-most, saving_usd / usual_usd))
