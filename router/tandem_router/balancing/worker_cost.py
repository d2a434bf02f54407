"""What it costs to send a request to each of some workers, and which of them costs least.

The cost is the work that would stand before the request, in tokens: prompt tokens that the worker's
prefix cache does not cover, prefill pending on it, and what its answers are expected to grow by
(or, where it does not say, its requests in flight). Two things bound how far a prefix decides:

* what many requests under way have in common costs each of them its part only
  (`shared_prefixes`), so that a hot prefix spreads over several workers;
* to wait for as much prefill as would have to be done elsewhere is no reason to do it elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tandem_router.balancing.shared_prefixes import SharedPrefixes
from tandem_router.balancing.worker import Worker

# Per token that the decode worker has not: its block is sent; and what one that it has is worth.
TRANSFER_COST = 0.05
DECODE_PREFIX_WORTH = 0.5


Pair = tuple[Worker, Worker | None]  # of decode and prefill; None: the decode worker prefills


def least_cost(
    pairs: Sequence[Pair],
    chain: Sequence[int],
    num_tokens: float,
    block_tokens: float,
    shared: SharedPrefixes | None,
    tier: Sequence[Worker],
) -> tuple[Pair, float]:
    """The pair of least cost, the first of equals, and the tokens that its decode worker has not.

    num_tokens: of the prompt. tier: all workers that may hold a copy of the prefix.
    """
    # Blocks that whoever prefills has already.
    has = [(pair[1] or pair[0]).prefixes.num_covered(chain) for pair in pairs]
    most, least = max(has), min(has)
    worth: Callable[[int], float] = float
    if shared is not None and most > least:
        worth = shared.worth(
            chain, most, lambda block: sum([block in each.prefixes for each in tier])
        )
    rest = max(0.0, num_tokens - most * block_tokens)
    best = nearest = 0
    costs: list[float] = []
    for at, (decode, prefill) in enumerate(pairs):
        cost, own = decode.queued_tokens() + rest, has[at]
        if own < most:
            cost += min(num_tokens, (worth(most) - worth(own)) * block_tokens)
        if prefill is not None:
            own = decode.prefixes.num_covered(chain)
            cost += prefill.queued_tokens()
            # Blocks the decode worker has need no transfer; nor does the same host.
            if prefill.host != decode.host:
                cost += TRANSFER_COST * max(0.0, num_tokens - own * block_tokens)
            cost -= DECODE_PREFIX_WORTH * min(num_tokens, worth(own) * block_tokens)
        costs.append(cost)
        if cost < costs[best]:
            best = at
        if has[nearest] < has[at] or (has[nearest] == has[at] and cost < costs[nearest]):
            nearest = at
    if best != nearest and has[best] < most:
        again = min(num_tokens, (most - has[best]) * block_tokens)
        waits = (pairs[nearest][1] or pairs[nearest][0]).pending()
        if costs[nearest] - min(waits, again) <= costs[best]:
            best = nearest
    decode = pairs[best][0]
    own = has[best] if pairs[best][1] is None else decode.prefixes.num_covered(chain)
    return pairs[best], max(0.0, num_tokens - own * block_tokens)
