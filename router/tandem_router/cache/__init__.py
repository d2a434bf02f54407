"""Exact-response cache, jointly with tier choice. Pure: bytes in, bytes out, clock passed in.

    key = cache_key(salt, tenant, body)                  # None: do not cache this request
    demand = Demand(exact_tier=forced) if forced else Demand(min_rank=...)
    answer = cache.get(key, now, demand)
    request = RouteRequest(..., num_expected_uses=cache.expected_uses(key))
    decision = decide(request, tiers, points, state)
    if answer is not None and not worth_upgrading(answer, rank, gain, priced_cost, uses): serve it
    else: ask decision.tier, then cache.put(key, CachedAnswer(body, tier, rank, cost_usd, now))

The demand of a quality floor header is the dearest tier's rank when the decision for it is that
tier; so an answer of the small tier never serves a request that demanded the large one.
"""

from tandem_router.cache.frequency import FrequencySketch
from tandem_router.cache.keys import cache_key
from tandem_router.cache.store import (
    ENTRY_OVERHEAD_BYTES,
    CachedAnswer,
    CacheStats,
    Demand,
    Eviction,
    ResponseCache,
    worth_upgrading,
)

__all__ = [
    "ENTRY_OVERHEAD_BYTES",
    "CacheStats",
    "CachedAnswer",
    "Demand",
    "Eviction",
    "FrequencySketch",
    "ResponseCache",
    "cache_key",
    "worth_upgrading",
]
