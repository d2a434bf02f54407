"""Two tenants, one hostile: what the other waits for, in virtual time and by the same ledger."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.api.api_keys import key_hash
from tandem_router.engines import Told, engine_of
from tandem_router.errors import ApiError
from tandem_router.limits.ledger import Hold, Ledger, Used
from tandem_router.limits.turns import REQUESTS_PER_TURN, turn
from tandem_router.openai.body import Bodies
from tandem_router.openai.request import parse_inference
from tandem_router.proxy.upstream_request import tenant_id
from tandem_router.testing.two_tiers import TIERS

SECRET = b"0123456789abcdef"
BODY = b'{"model": "large", "messages": [{"role": "user", "content": "hello"}]}'
SLOTS, SERVICE_S, SPAN_S = 4, 0.4, 60.0


Priority = Callable[[int], int | None]
"""Requests that a tenant has under way -> the number by which the worker orders its queue."""


def ours(num_inflight: int) -> int | None:
    """As our workers get it."""
    return turn(None, num_inflight)


def waits(config: Any, hostile_per_s: float, priority: Priority = ours) -> list[float]:
    """Latencies of a polite tenant, one request a second, at a worker of four slots.

    The worker orders its queue by priority, then arrival, as ours does. hostile_per_s: requests of
    the other one. priority: as the router gives it.
    """
    now = 0.0
    ledger = Ledger(config, lambda: now)
    arrivals = [(float(at), 0, "polite") for at in range(int(SPAN_S))]
    if hostile_per_s:
        number = int(SPAN_S * hostile_per_s)
        arrivals += [(at / hostile_per_s, 1, "hostile") for at in range(number)]
    events: list[Any] = [(at, order, name, None) for at, order, name in sorted(arrivals)]
    heapq.heapify(events)
    queue: list[tuple[int, float, int, str, Hold]] = []
    busy, num_asked = 0, 0
    found: list[float] = []

    def start() -> None:
        nonlocal busy
        while queue and busy < SLOTS:
            busy += 1
            begun = heapq.heappop(queue)
            heapq.heappush(events, (now + SERVICE_S, 2 + begun[2], begun[3], begun))

    while events:
        now, _, name, begun = heapq.heappop(events)
        if begun is not None:
            busy -= 1
            _, came, _, _, hold = begun
            ledger.settle(hold, Used(10.0))
            if name == "polite":
                found.append(now - came)
        else:
            try:
                hold = ledger.hold(name, 10.0)
            except ApiError:
                if name == "polite":
                    raise
            else:
                num_asked += 1
                first = priority(hold.accounts[-1].num_inflight)
                heapq.heappush(queue, (first or 0, now, num_asked, name, hold))
        start()
    return sorted(found)


def p99(values: list[float]) -> float:
    return values[int(0.99 * (len(values) - 1))]


def tenants(**hostile: Any) -> list[dict[str, Any]]:
    return [{"name": "polite"}, {"name": "hostile", **hostile}]


@pytest.mark.parametrize(
    "limits", [{}, {"max_concurrency": 3}, {"requests_per_minute": 300}], ids=str
)
def test_a_hostile_tenant_at_most_doubles_the_others_p99(
    make_config: Any, limits: dict[str, Any]
) -> None:
    """A hundred requests a second of one, with limits or without; one of the other."""
    config = make_config(tiers=TIERS, tenants=tenants(**limits), limits={"max_inflight": 10**6})

    alone, beside = waits(config, 0.0), waits(config, 100.0)

    assert len(beside) == len(alone) == int(SPAN_S)
    assert p99(beside) <= 2.0 * p99(alone)


def test_in_the_order_of_arrival_it_would_be_far_more(make_config: Any) -> None:
    """So the test above can fail."""
    config = make_config(tiers=TIERS, tenants=tenants(), limits={"max_inflight": 10**6})

    assert p99(waits(config, 100.0, lambda _: None)) > 10.0 * p99(waits(config, 0.0))


@pytest.mark.parametrize("order", ["Arrival", "Length", "Deadline"])
def test_a_flood_of_vllm_at_most_doubles_the_others_p99(make_config: Any, order: str) -> None:
    """In each order that the operator asks for; by the number in the body that vLLM gets."""
    config = make_config(tiers=TIERS, tenants=tenants(), limits={"max_inflight": 10**6})
    request = parse_inference("chat", BODY, Bodies(config.limits))

    def priority(num_inflight: int) -> int | None:
        own_turn = turn(None, num_inflight)
        told = Told("r", 1, 1, "m", turn=own_turn, order=order, expected_tokens=9.0)
        found = engine_of("VLLM").fields(request, request.fields, told).get("priority")
        assert found is None or isinstance(found, int)
        return found

    assert p99(waits(config, 100.0, priority)) <= 2.0 * p99(waits(config, 0.0))


@given(st.none() | st.integers(-100, 100), st.integers(0, 100_000))
def test_more_requests_never_go_before_fewer_and_few_change_nothing(
    asked: int | None, number: int
) -> None:
    given_turn, later = turn(asked, number), turn(asked, number + REQUESTS_PER_TURN)

    assert (later or 0) >= (given_turn or 0)
    assert turn(asked, REQUESTS_PER_TURN) == asked
    assert -100 <= (given_turn or 0) <= 100


async def test_workers_are_told_the_tenant_and_what_its_client_asked(
    run_router: Any, make_worker: Any
) -> None:
    """A worker shares itself by it: same name at every router, and nobody's own."""
    worker = await make_worker()
    hostile = {"name": "hostile", "key_hashes": [key_hash(SECRET, "h")]}
    polite = {"name": "polite", "key_hashes": [key_hash(SECRET, "p")]}
    options = {"tenants": [hostile, polite], "key_secret": SECRET}

    async with run_router({"large": {"decode": [worker]}}, **options) as (client, app):
        for _ in range(40):
            app.services.ledger.hold("hostile", 1.0)
        flood = {"authorization": "Bearer h"}
        await client.chat(model="large", headers=flood)
        await client.chat(model="large", headers={**flood, "x-tandem-priority": "0"})
        await client.chat(
            model="large", headers={"authorization": "Bearer p", "x-tandem-tenant": "hostile"}
        )

    priorities = [seen.headers.get("x-tandem-priority") for seen in worker.inference]
    tenants = [seen.headers["x-tandem-tenant"] for seen in worker.inference]
    assert priorities == [None, "0", None]
    assert tenants == [tenant_id("hostile")] * 2 + [tenant_id("polite")]
    assert len(set(tenants)) == 2
    assert "hostile" not in tenants[0]


async def test_an_engine_without_tenants_is_given_turns(run_router: Any, make_config: Any) -> None:
    """vLLM's queue by priority: a flood goes behind, also where it asks to go first."""
    request = parse_inference("chat", BODY, Bodies(make_config().limits))
    told = [
        Told("r", 1, 1, "m", priority=0, turn=turn(0, number), order="Length", expected_tokens=9.0)
        for number in (1, 40)
    ]
    first, flood = (engine_of("VLLM").fields(request, request.fields, each) for each in told)

    assert first["priority"] < flood["priority"]


async def test_a_flood_leaves_another_tenant_room_in_the_router(make_config: Any) -> None:
    """Without any limit of its own: half of `max_inflight`, and all of it where nobody shares."""
    for tenants, most in ((("hostile", "polite"), 5), (("hostile",), 10)):
        config = make_config(
            tiers=TIERS, tenants=[{"name": name} for name in tenants], limits={"max_inflight": 10}
        )
        ledger = Ledger(config, lambda: 0.0)
        for _ in range(most):
            ledger.hold("hostile", 1.0)
        with pytest.raises(ApiError) as refused:
            ledger.hold("hostile", 1.0)
        if "polite" in tenants:
            ledger.hold("polite", 1.0)

        assert refused.value.status == 429
        assert "in flight" in str(refused.value)
