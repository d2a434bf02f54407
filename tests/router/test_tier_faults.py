"""A tier fails, the request does not: every fault, streamed and whole, routed and named."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eventually import eventually
from tandem_router.balancing.worker import Load
from tandem_router.testing.fake_provider import PROVIDER_TEXT, WORDS, FakeProvider, Fault
from tandem_router.testing.fake_server import Seen, plain_reply
from tandem_router.testing.fake_worker import FakeWorker
from tandem_router.testing.two_tiers import TIERS, Scores

LATER = [Fault.CUT_LATER, Fault.CUT_IN_TOOL_CALL, Fault.CUT_IN_THOUGHT, Fault.ERROR_LATER]
BEFORE = [fault for fault in Fault if fault not in LATER and fault is not Fault.NONE]
HANGS = {Fault.HANG, Fault.HANG_AFTER_HEADERS}


def patience(*faults: Fault) -> dict[str, Any]:
    """Short where something hangs, so that it is left soon; what the defaults do is below."""
    hangs = bool(HANGS & set(faults))
    return {
        "wait_s": 1.0 if hangs else 20.0,
        "tier_wait_s": 0.05,
        "tier_patience_s": 0.3 if hangs else 20.0,
        "answer_s_per_token": 0.0,
    }


def external(url: str, name: str = "large") -> dict[str, Any]:
    (tier,) = (tier for tier in TIERS if tier["name"] == name)
    return {**tier, "kind": "external", "url": f"{url}/v1"}


def said(reply: Any, stream: bool) -> str:
    if stream:
        return reply.text()
    return reply.json["choices"][0]["message"]["content"]


@pytest.fixture
async def provider() -> Any:
    server = await FakeProvider().start()
    yield server
    await server.stop()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", BEFORE)
async def test_a_routed_request_is_answered_by_the_other_tier(
    run_router: Any, make_worker: Any, provider: Any, fault: Fault, stream: bool
) -> None:
    provider.always = fault
    table = {"small": {"unified": [await make_worker()]}}
    tiers = [TIERS[0], external(provider.url)]

    async with run_router(
        table, tiers=tiers, predictor=Scores(0.1, 0.9), failover=patience(fault), background=False
    ) as (client, app):
        reply = await client.chat(stream=stream)
        (record,) = app.services.decisions.last(1)

    assert reply.status == 200, reply.body
    assert (reply.headers["x-tandem-tier"], reply.headers["x-tandem-reason"]) == (
        "small",
        "unavailable",
    )
    assert said(reply, stream)
    assert PROVIDER_TEXT.encode() not in reply.body
    assert len(provider.seen) == 1
    assert [attempt["tier"] for attempt in record["attempts"]] == ["large"]
    assert app.services.ledger.num_inflight == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", BEFORE)
async def test_a_named_tier_that_fails_is_named_and_its_provider_is_not_quoted(
    run_router: Any, make_worker: Any, provider: Any, fault: Fault, stream: bool
) -> None:
    provider.always = fault
    table = {"small": {"unified": [await make_worker()]}}
    tiers = [TIERS[0], external(provider.url)]

    async with run_router(table, tiers=tiers, failover=patience(fault), background=False) as (
        client,
        _,
    ):
        reply = await client.chat(model="large", stream=stream)

    kept = {Fault.STATUS_429: 429, Fault.STATUS_503: 503}
    assert reply.status == kept.get(fault, 502)
    assert "'large'" in reply.error["message"]
    assert b"provider-internals" not in reply.body
    assert b"sk-live" not in reply.body
    if fault in kept:
        assert reply.headers["retry-after"] == "7"
    assert len(provider.seen) <= 3


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("fault", LATER)
async def test_after_the_first_token_a_providers_stream_ends_with_an_error_and_is_not_repeated(
    run_router: Any, make_worker: Any, provider: Any, fault: Fault, named: bool
) -> None:
    provider.always = fault
    table = {"small": {"unified": [await make_worker()]}}
    tiers = [TIERS[0], external(provider.url)]

    async with run_router(
        table, tiers=tiers, predictor=Scores(0.1, 0.9), failover=patience(), background=False
    ) as (client, app):
        reply = await client.chat(model="large" if named else "chat", stream=True)
        (record,) = app.services.decisions.last(1)

    last = reply.body.decode().rstrip("\n").split("\n\n")[-1].removeprefix("data: ")
    assert reply.status == 200
    assert "'large'" in json.loads(last)["error"]["message"]
    assert b"[DONE]" not in reply.body
    assert b"provider-internals" not in reply.body
    assert len(provider.seen) == 1
    assert record["cost_usd"] > 0.0


@pytest.mark.parametrize(
    "options", [{"say_done": False}, {"null_error": True}, {"with_usage": False}]
)
async def test_a_whole_answer_is_whole_however_the_provider_ends_it(
    run_router: Any, provider: Any, options: dict[str, bool]
) -> None:
    for name, value in options.items():
        setattr(provider, name, value)

    async with run_router(
        {}, tiers=[TIERS[0], external(provider.url)], failover=patience(), background=False
    ) as (client, app):
        reply = await client.chat(model="large", stream=True)
        whole = await client.chat(model="large")

    assert reply.text() == whole.json["choices"][0]["message"]["content"] == "".join(WORDS)
    assert len(provider.seen) == 2
    for record in app.services.decisions.last(2):
        assert record["output_tokens"] in (5, 4)
        assert record["cost_usd"] > 0.0


def free_port_url() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["refused", "unknown host"])
async def test_with_default_time_outs_a_provider_that_is_not_there_costs_a_moment(
    run_router: Any, make_worker: Any, where: str, stream: bool
) -> None:
    url = free_port_url() if where == "refused" else "http://no-such-host.invalid"
    table = {"small": {"unified": [await make_worker()]}}
    tiers = [TIERS[0], external(url)]

    async with run_router(table, tiers=tiers, predictor=Scores(0.1, 0.9), failover={}) as (
        client,
        app,
    ):
        routed = await client.chat(stream=stream)
        again = await client.chat(stream=stream)
        named = await client.chat(model="large", stream=stream)

    for reply in (routed, again):
        assert (reply.status, reply.headers["x-tandem-tier"]) == (200, "small")
        assert reply.headers["x-tandem-reason"] == "unavailable"
    assert named.status == 502
    assert app.services.config.failover.wait_s == 60.0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_provider_that_hangs_is_left_within_the_default_patience(
    run_router: Any, make_worker: Any, provider: Any, stream: bool, monkeypatch: Any
) -> None:
    """In the loop's time; the default is 15 s, and a whole reply's length is added to it."""
    provider.always = Fault.HANG
    table = {"small": {"unified": [await make_worker()]}}
    tiers = [TIERS[0], external(provider.url)]
    loop = asyncio.get_running_loop()
    passed = [0.0]
    monkeypatch.setattr(loop, "time", lambda: time.monotonic() + passed[0])

    async with run_router(
        table, tiers=tiers, predictor=Scores(0.1, 0.9), failover={}, background=False
    ) as (client, _):
        asked = asyncio.ensure_future(client.chat(stream=stream, max_tokens=20))
        await provider.asked.wait()
        passed[0] = 14.5
        done, _ = await asyncio.wait({asked}, timeout=0.0)
        waiting = not done
        passed[0] = 17.0
        reply = await asked

    assert waiting
    assert (reply.status, reply.headers["x-tandem-tier"]) == (200, "small")


async def test_two_tiers_of_one_provider_are_two(run_router: Any, provider: Any) -> None:
    tiers = [external(provider.url, "small"), external(provider.url)]

    async with run_router({}, tiers=tiers, failover={}, background=False) as (client, app):
        small = await client.chat(model="small")
        large = await client.chat(model="large")
        counts = [app.picker.num_usable(tier) for tier in ("small", "large")]

    assert [small.headers["x-tandem-tier"], large.headers["x-tandem-tier"]] == ["small", "large"]
    assert [seen.json["model"] for seen in provider.seen] == ["small-model", "large-model"]
    assert counts == [1, 1]


async def test_a_worker_that_fails_every_request_is_left_out_whatever_it_reports(
    run_router: Any, make_worker: Any
) -> None:
    crash = (500, {}, b'{"error": {"message": "boom"}}')
    bad = await make_worker(refuse=[crash] * 1000)
    workers = [bad, await make_worker(), await make_worker()]

    async with run_router({"large": {"unified": workers}}, background=False) as (client, app):
        replies = []
        for number in range(60):
            replies.append(await client.chat(f"question {number}", model="large"))
            for known in app.picker.workers:
                app.picker.observed(known, Load())  # it reports that it is well
        metrics = (await client.get("/metrics")).body.decode()

    assert {reply.status for reply in replies} == {200}
    assert len(bad.inference) == 5
    assert 'tandem_ejections_total{tier="large"} 1.0' in metrics


async def test_who_failed_others_lately_is_asked_before_a_request_is_lost(
    run_router: Any, make_worker: Any, provider: Any
) -> None:
    """A provider that is back before its ejection ends, beside a pool that has just broken."""
    crash = (500, {}, b'{"error": {"message": "boom"}}')
    pool = await make_worker()
    tiers = [TIERS[0], external(provider.url)]

    async with run_router(
        {"small": {"unified": [pool]}},
        tiers=tiers,
        predictor=Scores(0.1, 0.9),
        failover={},
        background=False,
    ) as (client, app):
        provider.always = Fault.STATUS_502
        first = [await client.chat(f"question {number}") for number in range(8)]
        out = app.picker.num_usable("large") == 0
        provider.always = Fault.NONE
        pool.refuse = [crash] * 10
        replies = [await client.chat(f"again {number}", stream=number % 2 > 0) for number in (1, 2)]

    assert {reply.headers["x-tandem-tier"] for reply in first} == {"small"}
    assert out
    for reply in replies:
        assert (reply.status, reply.headers["x-tandem-tier"]) == (200, "large")


async def test_the_one_worker_that_is_well_is_found_among_those_that_were_left_out(
    run_router: Any, make_worker: Any
) -> None:
    crash = (500, {}, b'{"error": {"message": "boom"}}')
    workers = [await make_worker(refuse=[crash] * 5), await make_worker(), await make_worker()]

    async with run_router({"large": {"unified": workers}}, background=False) as (client, app):

        async def ask(text: str) -> int:
            for known in app.picker.workers:
                app.picker.observed(known, Load())  # it reports that it is well
            return int((await client.chat(text, model="large")).status)

        before = [await ask(f"question {number}") for number in range(60)]
        out = app.picker.num_usable("large")
        for broken in workers[1:]:
            broken.refuse = [crash] * 100
        after = [await ask(f"again {number}") for number in range(4)]

    assert (set(before), out, len(workers[0].inference)) == ({200}, 2, 9)
    assert set(after) == {200}


@pytest.mark.parametrize("status", [429, 500])
async def test_a_pool_is_come_back_to_where_one_of_it_was_not_asked(
    run_router: Any, make_worker: Any, provider: Any, status: int
) -> None:
    """Left while its good worker was out, for a provider that then failed, too."""
    crash = (500, {}, b'{"error": {"message": "boom"}}')
    bad, good = await make_worker(), await make_worker(refuse=[crash] * 5)
    tiers = [TIERS[0], external(provider.url)]

    async with run_router(
        {"small": {"unified": [bad, good]}},
        tiers=tiers,
        predictor=Scores(0.9, 0.1),
        failover={},
        background=False,
    ) as (client, app):

        async def ask(text: str) -> Any:
            for known in app.picker.workers:
                if known.tier == "small":
                    app.picker.observed(known, Load())
            return await client.chat(text)

        before = [await ask(f"question {number}") for number in range(40)]
        out = app.picker.num_usable("small")
        bad.refuse = [(status, {}, b'{"error": {"message": "no"}}')] * 100
        provider.always = Fault.STATUS_401
        reply = await ask("again")
        (record,) = app.services.decisions.last(1)

    assert ({each.status for each in before}, out) == ({200}, 1)
    assert (reply.status, reply.headers["x-tandem-tier"]) == (200, "small")
    assert {attempt["tier"] for attempt in record["attempts"]} >= {"small"}


async def test_tiers_that_all_say_a_prompt_is_too_long_are_asked_once_each(
    run_router: Any, make_worker: Any
) -> None:
    error = {"message": "too long", "type": "invalid_request_error"}
    error["code"] = "context_length_exceeded"
    full = (400, {}, json.dumps({"error": error}).encode())
    workers = [await make_worker(refuse=[full] * 9) for _ in range(3)]
    names = ["small", "middle", "large"]
    tiers = [{**TIERS[0], "name": name, "served_model": name} for name in names]
    pools = {name: {"unified": [each]} for name, each in zip(names, workers, strict=True)}

    async with run_router(pools, tiers=tiers, predictor=None, background=False) as (client, _):
        reply = await client.chat("much")

    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert [len(each.inference) for each in workers] == [1, 1, 1]


async def test_a_retry_that_is_answered_leaves_its_place_in_the_budget(
    run_router: Any, make_worker: Any
) -> None:
    """A stream that was retried goes on for seconds, and others may be retried meanwhile."""
    crash = (500, {}, b'{"error": {"message": "boom"}}')
    bad = await make_worker(refuse=[crash] * 100)
    slow = await make_worker(num_tokens=400, pause_s=0.01, write_size=400)
    failover = {"min_retries": 1, "retry_share": 0.0, "outliers": {"consecutive_failures": 99}}

    async with run_router(
        {"large": {"unified": [bad, slow]}}, failover=failover, background=False
    ) as (client, app):

        async def ask(stream: bool) -> Any:
            for known in app.picker.workers:
                load = Load(num_requests=0 if known.url == bad.url else 50)
                app.picker.observed(known, load)  # the bad one looks idle and well
            return await client.chat(model="large", stream=stream)

        streamed = asyncio.ensure_future(ask(stream=True))
        retries = app.services.picker.retries("large")
        await eventually(lambda: slow.inference and not retries.num_retries)
        replies = [await ask(stream=False) for _ in range(3)]
        under_way = not streamed.done()
        await streamed

    assert under_way
    assert [reply.status for reply in replies] == [200] * 3


@dataclass(eq=False)
class Failing(FakeWorker):
    """Answers 500: at once to who asks for the first time, else once it is `over`."""

    over: asyncio.Event = field(default_factory=asyncio.Event)
    known: set[str] = field(default_factory=set)  # requests that somebody has refused
    num_held: int = 0

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        request_id = seen.headers["x-request-id"]
        if request_id in self.known:
            self.num_held += 1
            await self.over.wait()
        self.known.add(request_id)
        return await plain_reply(writer, 500, {}, b'{"error": {"message": "boom"}}')


@pytest.mark.parametrize(("number", "most"), [(12, 10), (100, 20)])
async def test_a_pool_that_fails_every_request_gets_few_of_them_again(
    run_router: Any, number: int, most: int
) -> None:
    """With the defaults: ten at once, or a fifth of what is in flight; the others are refused."""
    over, known = asyncio.Event(), set[str]()
    workers = [await Failing(over=over, known=known).start() for _ in range(3)]
    lasting = {"consecutive_failures": 1000}  # else who fails is left out, and gets fewer still

    async with run_router(
        {"large": {"unified": workers}}, failover={"outliers": lasting}, background=False
    ) as (client, app):
        asked = [
            asyncio.ensure_future(client.chat(f"question {each}", model="large"))
            for each in range(number)
        ]
        budget = app.services.picker.retries("large")

        def settled() -> bool:
            held = sum(worker.num_held for worker in workers)
            return sum(task.done() for task in asked) + held == number

        await eventually(settled)
        under_way = budget.num_retries
        over.set()
        replies = await asyncio.gather(*asked)

    for worker in workers:
        await worker.stop()
    assert 0 < under_way <= most
    assert {reply.status for reply in replies} == {502}
    assert sum(len(worker.inference) for worker in workers) <= number + 2 * most
    assert budget.num_retries == 0


async def test_a_pool_that_fails_is_left_for_the_other_tier(
    run_router: Any, make_worker: Any
) -> None:
    crash = (500, {}, b'{"error": {"message": "boom"}}')
    large = await make_worker(refuse=[crash] * 3)
    table = {"small": {"unified": [await make_worker()]}, "large": {"unified": [large]}}

    async with run_router(table, predictor=Scores(0.1, 0.9), background=False) as (client, _):
        reply = await client.chat()

    assert (reply.status, reply.headers["x-tandem-tier"]) == (200, "small")
    assert len(large.inference) == 1


async def test_every_try_that_reached_a_provider_is_booked(
    run_router: Any, make_worker: Any, provider: Any
) -> None:
    provider.always = Fault.CUT
    table = {"small": {"unified": [await make_worker()]}}
    tiers = [TIERS[0], external(provider.url)]

    async with run_router(
        table,
        tiers=tiers,
        predictor=Scores(0.1, 0.9),
        failover=patience(),
        budget={"usd_per_hour": 36.0},
        background=False,
    ) as (client, app):
        before = app.services.ledger.budget.left(app.services.clock())
        await client.chat()
        (record,) = app.services.decisions.last(1)
        after = app.services.ledger.budget.left(app.services.clock())

    (attempt,) = record["attempts"]
    assert attempt["cost_usd"] > 0.0
    assert record["cost_usd"] > attempt["cost_usd"]
    assert after < before


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_is_repeated_on_a_new_connection_is_booked_twice(
    run_router: Any, provider: Any, stream: bool
) -> None:
    """A provider that closes a kept connection unanswered may have read the request."""
    tiers = [TIERS[0], external(provider.url)]

    async with run_router({}, tiers=tiers, failover=patience(), background=False) as (client, app):
        await client.chat(model="large")
        provider.faults = [Fault.RESET]
        reply = await client.chat(model="large", stream=stream, max_tokens=100)
        (record,) = app.services.decisions.last(1)

    assert reply.status == 200
    assert len(provider.seen) == 3
    (attempt,) = record["attempts"]
    assert attempt["cost_usd"] > (0.0 if stream else 100 * 20e-6)
    assert record["cost_usd"] > attempt["cost_usd"]


async def test_a_whole_answer_to_a_stream_is_booked_as_a_whole(
    run_router: Any, make_worker: Any, provider: Any
) -> None:
    provider.always = Fault.WRONG_FORM
    table = {"small": {"unified": [await make_worker()]}}
    tiers = [TIERS[0], external(provider.url)]

    async with run_router(
        table, tiers=tiers, predictor=Scores(0.1, 0.9), failover=patience(), background=False
    ) as (client, app):
        reply = await client.chat(stream=True, max_tokens=100)
        (record,) = app.services.decisions.last(1)

    assert (reply.status, reply.headers["x-tandem-tier"]) == (200, "small")
    (attempt,) = record["attempts"]
    assert attempt["cost_usd"] > 100 * 20e-6


@given(
    faults=st.lists(st.sampled_from([*BEFORE, *LATER, Fault.NONE]), max_size=4),
    stream=st.booleans(),
    named=st.booleans(),
    pool_refuses=st.sampled_from([None, 500, 429, 503, 404]),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_sequence_of_faults_ends_in_an_answer_or_in_our_words(
    run_router: Any,
    faults: list[Fault],
    stream: bool,
    named: bool,
    pool_refuses: int | None,
) -> None:
    """Whatever the dear provider and the pool's worker do: no request is lost for which a tier
    could answer, none is answered twice over, nothing is held or in flight afterwards."""

    async def run() -> None:
        provider = await FakeProvider(faults=list(faults)).start()
        refusal = (pool_refuses, {}, b'{"error": {"message": "no"}}') if pool_refuses else None
        pool = await FakeWorker(refuse=[refusal] * 50 if refusal else []).start()
        failover = patience(*faults)
        if HANGS & set(faults):
            failover |= {"wait_s": 0.5, "tier_patience_s": 0.15}
        elif pool_refuses == 503:
            failover |= {"wait_s": 0.5}  # it may be starting, and is waited for
        try:
            async with run_router(
                {"small": {"unified": [pool]}},
                tiers=[TIERS[0], external(provider.url)],
                predictor=Scores(0.1, 0.9),
                failover=failover,
                background=False,
            ) as (client, app):
                reply = await client.chat(model="large" if named else "chat", stream=stream)
                inflight = [worker.num_inflight for worker in app.picker.workers]
        finally:
            await provider.stop()
            await pool.stop()

        assert b"provider-internals" not in reply.body
        assert app.services.ledger.num_inflight == 0
        assert inflight == [0, 0]
        first = faults[0] if faults else Fault.NONE
        broke_off = stream and first in LATER
        good = first is Fault.NONE or (not stream and first in LATER)
        if not named and pool_refuses is None and not broke_off:
            assert reply.status == 200
        if good and failover["tier_patience_s"] > 1.0:
            assert (reply.status, reply.headers["x-tandem-tier"]) == (200, "large")
        if reply.status == 200 and not broke_off and b'"error": {' not in reply.body:
            assert said(reply, stream)
        if reply.status != 200:
            assert "tier '" in reply.error["message"]

    asyncio.run(run())
