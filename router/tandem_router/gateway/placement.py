"""Where a request goes: the tier by the router's policy, the worker by its picker, both at once.

A gateway can hand a request to a worker and nothing more. What needs more than that (an outside
provider, a cached answer, an answer that is read first, a tier that has to be woken or waited for,
a prefill that the router itself orders) goes to the router's own address, which serves it whole.
"""

from __future__ import annotations

import msgspec

from tandem_router.balancing.endpoint_picker import Pick
from tandem_router.balancing.worker import Worker
from tandem_router.config import TierConfig
from tandem_router.engines import engine_of
from tandem_router.engines.ticket import HEADER as TICKET
from tandem_router.engines.ticket import ticket
from tandem_router.limits.ledger import NOTHING
from tandem_router.openai.request import InferenceRequest
from tandem_router.openai.sse import decode_json, encode_json
from tandem_router.proxy.arrival import Arrival
from tandem_router.proxy.context import Services
from tandem_router.proxy.retries import NOBODY, Retries
from tandem_router.proxy.tier_assignment import NotNow, TierAssignment, assign
from tandem_router.proxy.upstream_request import told, upstream_body, upstream_headers

# Endpoints that a gateway may try after the first one.
NUM_FALLBACKS = 2


class Placed(msgspec.Struct, frozen=True):
    """A request on its way to a worker."""

    assignment: TierAssignment
    retries: Retries
    endpoints: str  # host:port of the worker, then of those that may stand in, with commas
    headers: list[tuple[bytes, bytes]]
    body: bytes


async def place(
    services: Services, arrival: Arrival, subset: frozenset[str] | None
) -> Placed | None:
    """None: for the router's own address, and as if it had not come yet.

    subset: the only endpoints that the gateway can reach; None: any.

    Raises ApiError where the policy refuses.
    """
    request = arrival.request

    def now(tier: TierConfig) -> bool:
        if tier.kind != "pool" or _router_orders_prefill(services, tier, request):
            return False
        return any(_in(subset, worker) for worker in services.picker.usable(tier.name))

    cascade = services.config.cascade
    if cascade is not None and not arrival.forced and (cascade.streams or not request.stream):
        services.ledger.withdraw(arrival.hold)
        return None
    try:
        assignment = await assign(services, arrival, now)
    except NotNow:
        services.ledger.withdraw(arrival.hold)
        return None
    except BaseException:
        services.ledger.settle(arrival.hold, NOTHING)
        raise
    retries = Retries(services, assignment)
    outside = NOBODY
    if subset is not None:
        workers = services.picker.usable(assignment.tier.name)
        outside = frozenset(worker.url for worker in workers if not _in(subset, worker))
    pick = retries.take(outside)
    assert pick is not None  # `now` has seen a worker, and nothing was awaited since
    headers, body = _outgoing(services, assignment, pick)
    return Placed(assignment, retries, _endpoints(services, pick, outside), headers, body)


def endpoint(worker: Worker) -> str:
    """host:port as a gateway names it."""
    return worker.url.partition("://")[2].rstrip("/")


def _in(subset: frozenset[str] | None, worker: Worker) -> bool:
    """A subset names endpoints, or hosts with all their ports."""
    if subset is None:
        return True
    named = endpoint(worker)
    host = named.rpartition(":")[0]
    return not subset.isdisjoint((named, host, host.strip("[]")))


def _router_orders_prefill(services: Services, tier: TierConfig, request: InferenceRequest) -> bool:
    if not services.picker.has_prefill(tier.name):
        return False
    return engine_of(tier.engine).prefill_order(request, request.body) is not None


def _endpoints(services: Services, pick: Pick, outside: frozenset[str]) -> str:
    first = pick.decode
    others = [
        worker
        for worker in services.picker.usable(first.tier)
        if worker is not first
        and worker.url not in outside
        and (pick.prefill is None or _revision(worker) == _revision(first))
    ]
    others.sort(key=Worker.queued_tokens)
    return ",".join(endpoint(worker) for worker in (first, *others[:NUM_FALLBACKS]))


def _revision(worker: Worker) -> str | None:
    return worker.load.revision if worker.load is not None else None


def _outgoing(
    services: Services, assignment: TierAssignment, pick: Pick
) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """What the router's own HTTP client would send, with a ticket in place of the peer token."""
    arrival, tier = assignment.arrival, assignment.tier
    known = msgspec.structs.replace(told(services, assignment, pick), peer_token=None)
    headers = upstream_headers(services, tier, arrival, known)
    limit = assignment.decision.max_tokens
    body = upstream_body(tier, arrival, arrival.request.body, limit, known)
    if arrival.request.model != known.served_model:
        body = encode_json({**decode_json(body), "model": known.served_model})
    token = services.peer_token
    if token is not None and engine_of(tier.engine).auth(token):
        path, now = arrival.request.path, services.wall_clock()
        headers.append((TICKET, ticket(token.encode(), path, headers, body, now)))
    return headers, body
