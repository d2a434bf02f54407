"""One tenant's flood at a worker: what the other waits for, by the real scheduler in virtual time.

The other one asks for less than its share of the worker: short and long prompts, answers of one
token and of many, one request at a time and five at once. What it waits for is compared with what
it waits for alone, at the 99th percentile.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import httpx
import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from eventually import eventually
from tandem_worker.engine.profile import StepProfile
from tandem_worker.errors import RequestError
from tandem_worker.scheduling.kv_blocks import BlockManager
from tandem_worker.scheduling.places import FairGate, Places
from tandem_worker.scheduling.scheduler import Scheduler, SchedulerLimits
from tandem_worker.scheduling.sequence import Sequence
from tandem_worker.scheduling.tenants import StepCosts, Turns
from tenant_world import CPU, GPU, Ask, World, latencies, p99


def every(gap_s: float, num_prompt: int, num_answer: int, num: int, at_once: int = 1) -> list[Ask]:
    """Requests of the other one."""
    return [
        Ask(number // at_once * gap_s, "polite", num_prompt, num_answer) for number in range(num)
    ]


POLITE = every(0.1, 60, 24, 40)
MODEST = {
    "a few words": POLITE,
    "one token": every(0.05, 60, 1, 80),
    "one token after a page": every(0.15, 600, 1, 30),
    "one token after a long prompt": every(0.25, 1800, 1, 24),
    "two tokens after a page": every(0.15, 600, 2, 30),
    "a long prompt": every(0.7, 1800, 24, 10),
    "five at once": every(0.2, 60, 1, 80, at_once=5),
}
FLOODS = {
    "many short": [Ask(number * 0.004, "hostile", 20, 16) for number in range(900)],
    "few huge": [Ask(0.0, "hostile", 1900, 100) for _ in range(40)],
    "sixteen choices": [Ask(number * 0.02, "hostile", 30, 100, 16) for number in range(100)],
    "long prompts": [Ask(number * 0.02, "hostile", 1800, 2) for number in range(150)],
    "one token of long prompts": [Ask(number * 0.02, "hostile", 1800, 1) for number in range(150)],
    "long answers": [Ask(number * 0.005, "hostile", 20, 700) for number in range(80)],
    "bursts": [Ask(number // 100 * 1.0, "hostile", 200, 50) for number in range(300)],
    "a burst at the start": [Ask(0.0, "hostile", 400, 60) for _ in range(200)],
    "one token": [Ask(number * 0.002, "hostile", 60, 1) for number in range(1500)],
    "one token of a word": [Ask(number * 0.01, "hostile", 5, 1) for number in range(600)],
    "a word twice a second": [Ask(number * 0.5, "hostile", 5, 1) for number in range(12)],
    "clients that leave at once": [
        Ask(number * 0.002, "hostile", 300, 100, 4, stays_s=0.01) for number in range(1000)
    ],
    "clients that leave in the middle": [
        Ask(number * 0.01, "hostile", 900, 400, stays_s=0.3) for number in range(300)
    ],
    "the same page": [Ask(number * 0.01, "hostile", 1800, 1, text=7) for number in range(300)],
    "just before each of the others": [
        Ask(number * 0.05 - 1e-4, "hostile", 1900, 1) for number in range(1, 120)
    ],
    "all of it": [
        Ask(number * 0.01, "hostile", *kind)
        for number in range(200)
        for kind in [((20, 16), (1900, 1), (30, 100, 8), (60, 1))[number % 4]]
    ],
    "one answer that never ends": [Ask(0.0, "hostile", 20, 1900)],
}


@pytest.mark.parametrize("costs", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("modest", MODEST)
def test_no_flood_more_than_doubles_the_others_p99(modest: str, costs: StepCosts) -> None:
    alone = p99(latencies(World(costs), MODEST[modest], "polite"))

    beside = {
        kind: p99(latencies(World(costs), MODEST[modest] + flood, "polite")) / alone
        for kind, flood in FLOODS.items()
    }

    assert {kind: ratio for kind, ratio in beside.items() if ratio > 2.0} == {}


def every_cached(gap_s: float, num_answer: int, num: int, at_once: int = 1) -> list[Ask]:
    """As `every`, after a page that is computed long before them."""
    page = Ask(0.0, "polite", 1800, 1, text=9)
    asks = every(gap_s, 1800, num_answer, num, at_once)
    return [page] + [replace(ask, at_s=ask.at_s + 1.0, text=9) for ask in asks]


@pytest.mark.parametrize("costs", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    "modest",
    [every_cached(0.1, 24, 40), every_cached(0.2, 1, 80, at_once=5)],
    ids=["a few words", "five at once"],
)
@pytest.mark.parametrize(
    "kind",
    ["many short", "sixteen choices", "long answers", "the same page", "one token of a word"],
)
def test_nor_where_the_others_prompts_are_cached(
    modest: list[Ask], kind: str, costs: StepCosts
) -> None:
    """They are as short as what is left of them: neither a flood nor more than a share."""

    def slowest(asks: list[Ask]) -> float:
        answered = World(costs).run(asks)
        return p99([s for ask, s in answered if ask.tenant == "polite" and ask.at_s >= 1.0])

    flood = [replace(ask, at_s=ask.at_s + 1.0) for ask in FLOODS[kind]]

    assert slowest(modest + flood) <= 2.0 * slowest(modest)


def test_two_who_ask_for_all_get_half_each_and_batch_together() -> None:
    """Turns are not steps of one tenant alone: those would take almost twice as long in all."""
    asks = [Ask(0.0, name, 60, 200) for name in ("a", "b") for _ in range(32)]
    world, one = World(GPU), World(GPU)
    ends = [latency for _, latency in world.run(asks)]
    list(one.run([Ask(0.0, "a", 60, 200) for _ in range(64)]))

    assert max(ends) <= 1.1 * one.now_s


@pytest.mark.parametrize("order", ["mlfq", "sjf", "edf"])
def test_it_does_so_in_every_order(order: Any) -> None:
    alone = latencies(World(order=order), POLITE, "polite")
    for kind in ("sixteen choices", "long prompts"):
        beside = latencies(World(order=order), POLITE + FLOODS[kind], "polite")

        assert p99(beside) <= 2.0 * p99(alone)


def test_pushes_of_a_prefill_worker_cannot_be_preempted_and_leave_room() -> None:
    polite = [Ask(number * 0.1, "polite", 600, 1) for number in range(40)]
    flood = [Ask(number * 0.01, "hostile", 1800, 1) for number in range(200)]
    alone = latencies(World(GPU, pinned=True), polite, "polite")
    beside = latencies(World(GPU, pinned=True), polite + flood, "polite")

    # One step each: what is left of the step that runs comes on top.
    assert p99(beside) <= 4.0 * p99(alone)


def test_in_the_order_of_arrival_it_would_be_far_more() -> None:
    """So the tests above can fail."""
    alone = latencies(World(), POLITE, "polite")
    world = World(shared=False)
    asks = POLITE + FLOODS["few huge"]
    beside = [latency for ask, latency in world.run(asks) if ask.tenant == "polite"]

    assert p99(beside) > 10.0 * p99(alone)


def test_two_tenants_of_the_same_appetite_get_the_same() -> None:
    asks = [Ask(0.0, name, 100, 100) for name in ("a", "b") for _ in range(64)]
    ends: dict[str, list[float]] = {"a": [], "b": []}
    for ask, latency in World(max_num_seqs=16).run(asks):
        ends[ask.tenant].append(latency)

    mean = {name: sum(values) / len(values) for name, values in ends.items()}
    assert mean["a"] == pytest.approx(mean["b"], rel=0.1)


def test_one_tenant_alone_is_not_slowed() -> None:
    """Shares cost nothing where nobody shares."""
    steps = {}
    for shared in (True, False):
        world = World(GPU, shared=shared)
        list(world.run(FLOODS["long prompts"]))
        steps[shared] = world.num_steps

    assert steps[True] == steps[False]


def test_a_flood_of_prompts_leaves_anothers_prefix_in_the_cache() -> None:
    """By tenant, whatever the salts: a client of a tenant may send as many as it likes."""
    scheduler = Scheduler(BlockManager(32), SchedulerLimits(8, 4096))

    def compute(tenant: str, salt: bytes, tokens: list[int]) -> Sequence:
        sequence = Sequence(str(tokens[0]), tokens, len(tokens), tenant=tenant, salt=salt)
        scheduler.add(sequence, 0.0)
        scheduler.advance(scheduler.schedule(0.0))
        scheduler.finish(sequence)
        return sequence

    prompt = list(range(10_000, 10_000 + 8 * 64 + 1))
    compute("polite", b"p", prompt)
    for number in range(100):
        compute("hostile", b"%d" % number, [number] * 257)

    assert compute("polite", b"p", prompt).num_cached_tokens == 8 * 64


ASKS = st.lists(
    st.builds(
        Ask,
        st.floats(0.0, 2.0),
        st.sampled_from(["a", "b", "c", ""]),
        st.integers(3, 400),
        st.integers(1, 40),
        st.sampled_from([1, 1, 3]),
    ),
    min_size=1,
    max_size=30,
)


@given(asks=ASKS, order=st.sampled_from(["fcfs", "mlfq", "sjf", "edf"]), blocks=st.integers(8, 24))
@settings(max_examples=60, deadline=None)
def test_everybody_who_is_taken_in_is_answered(asks: list[Ask], order: Any, blocks: int) -> None:
    """Whatever is preempted for whom: no request is lost and no block."""
    world = World(order=order, num_blocks=blocks, max_num_seqs=4, max_batched_tokens=64)

    answered = [ask for ask, _ in world.run(asks)]

    assert len(answered) + sum(world.num_refused.values()) == len(asks)
    assert world.scheduler.blocks.num_used == 0
    assert not world.scheduler.turns.here
    assert world.places.num_taken == 0
    world.scheduler.blocks.check()


def test_who_comes_back_saves_nothing_up_and_owes_nothing() -> None:
    turns = Turns()
    turns.came("busy", 0.0, 0.0)
    turns.charge("busy", 3.0, 0.0)
    turns.left("busy", None)
    turns.came("new", 0.0, 1.0)

    assert turns.used("new") == turns.used("busy")  # or `busy` would wait until it had as much
    turns.came("busy", 0.0, 60.0)
    assert turns.used("busy") < 1e-4


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", ""]), st.integers(1, 40)), max_size=80),
    st.integers(1, 20),
    st.integers(1, 60),
)
def test_no_tenant_takes_the_last_place(
    takes: list[tuple[str, int]], slots: int, waiting: int
) -> None:
    places = Places(slots, waiting)
    with contextlib.ExitStack() as held:
        for tenant, number in takes:
            own = places.of_tenant[tenant]
            with contextlib.suppress(RequestError):
                held.enter_context(places.hold(tenant, number))
                if tenant and own and own + number > slots:
                    assert own + number - slots <= slots + waiting - places.num_taken
    assert places.num_taken == 0
    assert not +places.of_tenant


async def test_a_gate_lets_tenants_pass_in_rounds() -> None:
    gate, passed = FairGate(1), []

    async def go(tenant: str) -> None:
        async with gate.turn(tenant):
            await asyncio.sleep(0)
            passed.append(tenant)

    async with asyncio.TaskGroup() as tasks:
        flood = [tasks.create_task(go("hostile")) for _ in range(10)]
        await asyncio.sleep(0)
        tasks.create_task(go("polite"))
        flood[3].cancel()

    assert passed.index("polite") <= 3
    assert passed.count("hostile") == 9
    async with gate.turn("after"):
        pass


def test_what_is_taken_for_a_tenant_is_never_anothers_own_share() -> None:
    """Growth of one preempts its own sequences first."""
    scheduler = Scheduler(BlockManager(4), SchedulerLimits(8, 512))
    for name, tenant, length in (("h1", "hostile", 64), ("h2", "hostile", 64), ("p", "polite", 30)):
        scheduler.add(Sequence(name, [len(name)] * length, length, tenant=tenant), 0.0)
    preempted: list[str] = []
    for _ in range(80):
        step = scheduler.schedule(0.0)
        preempted += [sequence.tenant for sequence in step.preempted]
        scheduler.advance(step)
        for chunk in step.chunks:
            if not chunk.sequence.num_uncomputed_tokens:
                chunk.sequence.token_ids.append(1)

    assert "hostile" in preempted
    assert "polite" not in preempted


def test_costs_of_a_mixed_step_are_those_of_the_fits() -> None:
    profile = StepProfile()
    assert profile.step_costs() is None
    for number in range(1, 40):
        profile.observe(0.01 + 1e-4 * number, decode_contexts=[10] * number, prefills=())
        profile.observe(0.02 + 2e-5 * number * 10, decode_contexts=(), prefills=[(0, number * 10)])

    costs = profile.step_costs()

    assert costs is not None
    assert costs.chunk_s(10, 1, is_decode=True) == pytest.approx(1e-4, rel=0.2)
    assert costs.tokens_in(costs.chunk_s(0, 100, is_decode=False), 0) in range(80, 121)


async def test_the_header_names_the_tenant_and_a_flood_leaves_the_other_a_place(
    start_worker: Any,
) -> None:
    worker = await start_worker(max_num_seqs=1, max_waiting=4)
    body = {"prompt": "the quick brown fox", "max_tokens": 60, "ignore_eos": True}

    async def ask(tenant: str) -> int:
        async with httpx.AsyncClient(base_url=worker.url, timeout=60) as client:
            named = {"x-tandem-tenant": tenant}
            return (await client.post("/v1/completions", json=body, headers=named)).status_code

    flood = [asyncio.create_task(ask("hostile")) for _ in range(8)]
    await eventually(lambda: worker.places.num_taken == 3)

    assert await ask("polite") == 200
    assert sorted([await task for task in flood]) == [200] * 3 + [429] * 5
    assert await ask("x" * 65) == 400
