"""What a request's prompt has in common with others: a chain of hashes, made once per request."""

from __future__ import annotations

from collections.abc import Sequence

from tandem_router.engines import engine_of
from tandem_router.proxy.arrival import Arrival
from tandem_router.proxy.context import Services


def chain_of(services: Services, arrival: Arrival) -> Sequence[int]:
    """The chain of a prompt; another one for each tenant where workers keep tenants apart."""
    apart = ""
    if arrival.tenant is not None:
        engines = [tier.engine for tier in services.config.tiers if tier.kind == "pool"]
        if any(engine_of(engine).salted for engine in engines):
            apart = arrival.tenant
    return services.picker.chain(arrival.request.prefix_bytes, apart)
