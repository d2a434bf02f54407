"""A worker that hangs behind load reports that are fine is left for one that is well."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventually import eventually
from tandem_router.balancing.prefix_index import PrefixIndex
from tandem_router.balancing.silence import longest_silence_s
from tandem_router.balancing.worker import Load, Worker
from tandem_router.config import FailoverConfig
from tandem_router.proxy.tier_assignment import TierAssignment

DEFAULTS = FailoverConfig()
SPEEDS = {"prefill_profile": (0.01, 1e-4, 0.0), "decode_profile": (0.02, 1e-7, 1e-4)}


def worker(load: Load | None, longest_answer: int = 100, num_inflight: int = 1) -> Worker:
    known = Worker("http://w", "large", "unified", PrefixIndex(10), load=load)
    known.longest_answer, known.num_inflight = longest_answer, num_inflight
    return known


# -- how long a worker may be silent --------------------------------------------------------------


def test_a_worker_without_speeds_may_be_silent_as_long_as_a_stream_and_the_longest_answer() -> None:
    for load in (None, Load()):
        assert longest_silence_s(worker(load), 50.0, DEFAULTS) == 120.0 + 100 * 0.05


def test_one_that_says_it_is_not_well_has_the_least() -> None:
    assert longest_silence_s(worker(Load(ready=False)), 50.0, DEFAULTS) == 30.0 + 100 * 0.05
    leaving = Load(ready=False, draining=True)
    assert longest_silence_s(worker(leaving), 50.0, DEFAULTS) == 120.0 + 100 * 0.05


def test_speeds_decide_where_they_are_known() -> None:
    quick, slow = Load(**SPEEDS), Load(**SPEEDS, step_time_s=2.0)

    assert longest_silence_s(worker(quick), 50.0, DEFAULTS) == 30.0 + 100 * 0.05
    assert longest_silence_s(worker(slow), 50.0, DEFAULTS) == pytest.approx(600.0, rel=0.01)


@given(
    st.integers(1, 20_000),
    st.integers(1, 64),
    st.floats(0.0, 1e5),
    st.floats(0.001, 5.0),
)
def test_no_worker_hangs_that_keeps_to_its_speeds(
    num_tokens: int, num_inflight: int, num_prompt_tokens: float, step_s: float
) -> None:
    """Twice as slow as it says, and all its answers begun at once: it is waited for."""
    load = Load(**SPEEDS, step_time_s=step_s)
    takes_s = 0.01 + 1e-4 * num_prompt_tokens + step_s * num_tokens

    silence_s = longest_silence_s(
        worker(load, num_tokens, num_inflight), num_prompt_tokens, DEFAULTS
    )

    assert silence_s > 2.0 * takes_s


# -- requests -------------------------------------------------------------------------------------

ASKED = {"model": "large", "max_tokens": 20}
# Shares of the defaults: 4 s of silence where no speed is known, 2 s where it is.
HURRIED = {"wait_s": 2.0, "stall_timeout_s": 3.0}


@pytest.fixture
async def passed(monkeypatch: Any) -> list[float]:
    """How many seconds of the loop's time have passed."""
    seconds = [0.0]
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "time", lambda: time.monotonic() + seconds[0])
    return seconds


async def turns(number: int = 100) -> None:
    """What is due happens."""
    for _ in range(number):
        await asyncio.sleep(0)


async def asked_of(workers: list[Any], number: int = 1) -> None:
    await eventually(lambda: sum(len(each.inference) for each in workers) >= number)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_leaves_a_worker_that_hangs_while_it_reports_its_load(
    run_router: Any, make_worker: Any, passed: list[float], stream: bool
) -> None:
    workers = [await make_worker(mute=True), await make_worker(mute=True)]

    async with run_router({"large": {"unified": workers}}, failover=HURRIED, background=False) as (
        client,
        app,
    ):
        for known in app.picker.workers:
            app.picker.observed(known, Load(**SPEEDS))
        task = asyncio.ensure_future(client.chat(stream=stream, **ASKED))
        await asked_of(workers)
        (bad,) = (each for each in workers if each.inference)
        (good,) = (each for each in workers if each is not bad)
        good.mute = False
        passed[0] = 0.5 if stream else 1.5
        await turns()
        waiting = not task.done()
        for known in app.picker.workers:
            app.picker.observed(known, Load(**SPEEDS))  # it reports that it is well
        passed[0] = 2.2
        reply = await asyncio.wait_for(task, 20)
        after = [await client.chat(f"question {number}", **ASKED) for number in range(4)]
        *_, record = app.services.decisions.last(9)
        metrics = (await client.get("/metrics")).body.decode()

    assert waiting
    assert [each.status for each in (reply, *after)] == [200] * 5
    assert (len(bad.inference), len(good.inference)) == (1, 5)
    assert [each["fault"] for each in record["attempts"]] == ["timed-out"]
    assert 'tandem_ejections_total{tier="large"} 1.0' in metrics
    assert app.services.ledger.num_inflight == 0


async def test_a_worker_that_answers_others_is_waited_for(
    run_router: Any, make_worker: Any, passed: list[float]
) -> None:
    workers = [await make_worker(mute=True), await make_worker(mute=True)]

    async with run_router({"large": {"unified": workers}}, failover=HURRIED, background=False) as (
        client,
        app,
    ):
        slow = asyncio.ensure_future(client.chat(**ASKED))
        await asked_of(workers)
        (busy,) = (each for each in workers if each.inference)
        busy.mute, spare = False, next(each for each in workers if each is not busy)
        spare.mute = False
        known = app.picker.worker("large", spare.url)
        waiting = []
        for at in (3.0, 6.0, 9.0):
            passed[0] = at
            known.draining = True  # the next one goes to the same worker
            assert (await client.chat(f"at {at}", **ASKED)).status == 200
            known.draining = False
            await turns()
            waiting.append(not slow.done())
        passed[0] = 13.5
        reply = await asyncio.wait_for(slow, 20)

    assert waiting == [True] * 3
    assert (len(busy.inference), len(spare.inference), reply.status) == (4, 1, 200)


async def test_a_stream_that_goes_on_shows_that_its_worker_is_well(
    run_router: Any, make_worker: Any, passed: list[float]
) -> None:
    workers = [await make_worker(mute=True), await make_worker(mute=True)]

    async with run_router({"large": {"unified": workers}}, failover=HURRIED, background=False) as (
        client,
        app,
    ):
        slow = asyncio.ensure_future(client.chat(**ASKED))
        await asked_of(workers)
        (busy,) = (each for each in workers if each.inference)
        busy.mute, busy.pause_s, busy.write_size, busy.num_tokens = False, 0.005, 64, 300
        spare = next(each for each in workers if each is not busy)
        known = app.picker.worker("large", spare.url)
        known.draining = True
        talks = asyncio.ensure_future(client.chat("talk", model="large", stream=True))
        await asked_of(workers, 2)
        known.draining = False
        heard_at, url, now = app.services.client.heard_at, busy.url, asyncio.get_running_loop().time
        for passed[0] in (1.5, 3.0, 4.5, 6.0):
            later = now()
            await eventually(lambda later=later: heard_at(url) > later)
            await turns()
        waiting = not slow.done() and not talks.done()
        for task in (slow, talks):
            task.cancel()
        await asyncio.gather(slow, talks, return_exceptions=True)

    assert waiting
    assert not spare.inference


async def test_all_that_a_worker_that_hangs_holds_moves_whatever_the_retries(
    run_router: Any, make_worker: Any, passed: list[float]
) -> None:
    """As what a worker that died held: none of it was answered."""
    bad, good = await make_worker(mute=True), await make_worker()
    failover = {**HURRIED, "min_retries": 0, "retry_share": 0.0}

    async with run_router(
        {"large": {"unified": [bad, good]}}, failover=failover, background=False
    ) as (client, app):
        known = app.picker.worker("large", good.url)
        known.draining = True
        tasks = [
            asyncio.ensure_future(client.chat(f"question {number}", **ASKED))
            for number in range(12)
        ]
        await asked_of([bad], 12)
        known.draining = False
        passed[0] = 4.5
        replies = await asyncio.wait_for(asyncio.gather(*tasks), 20)

    assert {reply.status for reply in replies} == {200}
    assert len(good.inference) == 12


async def test_what_may_be_asked_for_once_is_not_moved(
    run_router: Any, make_worker: Any, passed: list[float], monkeypatch: Any
) -> None:
    """A ceiling, or a shadow: there is no money for another try."""
    monkeypatch.setattr(TierAssignment, "gave_up", lambda self, fault: False)
    workers = [await make_worker(mute=True), await make_worker(mute=True)]

    async with run_router({"large": {"unified": workers}}, failover=HURRIED, background=False) as (
        client,
        _,
    ):
        task = asyncio.ensure_future(client.chat(**ASKED))
        await asked_of(workers)
        for each in workers:
            each.mute = False
        passed[0] = 4.5
        reply = await asyncio.wait_for(task, 20)

    assert reply.status == 502
    assert sum(len(each.inference) for each in workers) == 1


async def test_a_request_that_all_are_silent_about_is_slow_itself(
    run_router: Any, make_worker: Any, passed: list[float]
) -> None:
    """It is begun anew three times at most, and then waited for."""
    workers = [await make_worker(mute=True) for _ in range(6)]

    async with run_router({"large": {"unified": workers}}, failover=HURRIED, background=False) as (
        client,
        _,
    ):
        task = asyncio.ensure_future(client.chat(**ASKED))
        for number in (1, 2, 3, 4):
            await asked_of(workers, number)
            passed[0] += 4.1
            await turns()
        waiting = not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    assert waiting
    assert sum(len(each.inference) for each in workers) == 4
