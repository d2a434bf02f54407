"""Tiers without a worker: replaced, waited for, woken, and what /ready says meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

from clock import Clock
from eventually import eventually
from tandem_router.testing.two_tiers import Scores


async def test_a_tier_without_workers_is_replaced_with_a_reason_unless_it_was_named(
    run_router: Any, make_worker: Any
) -> None:
    table = {"small": {"unified": [await make_worker()]}}

    async with run_router(
        table,
        predictor=Scores(0.1, 0.9),
        failover={"wait_s": 0.2, "wake_s": 0.2, "tier_wait_s": 0.05},
    ) as (client, _):
        routed = await client.chat()
        forced = await client.chat(model="large")

    assert routed.headers["x-tandem-tier"] == "small"
    assert routed.headers["x-tandem-reason"] == "unavailable"
    assert forced.status == 503
    assert forced.headers["retry-after"]
    assert "large" in forced.error["message"]


def num_held(app: Any) -> int:
    tiers = app.services.arrivals.report()["tiers"]
    return sum(tier["num_held"] for tier in tiers.values())


async def held_until(app: Any, clock: Clock, client: Any, seconds: float, **asked: Any) -> Any:
    """The reply to a request that is held for so long and no longer."""
    task = asyncio.ensure_future(client.chat(**asked))
    await eventually(lambda: num_held(app))
    for part, done in ((0.9, False), (1.1, True)):
        clock.now = 100.0 + part * seconds
        app.services.workers_changed.set()
        if done:
            return await task
        await eventually(lambda: not app.services.workers_changed.is_set())
        assert not task.done()
    return None


async def test_a_tier_is_waited_for_as_long_as_its_settings_say(
    run_router: Any, make_worker: Any
) -> None:
    clock, gone = Clock(100.0), await make_worker()
    await gone.stop()
    table = {"small": {"unified": [await make_worker()]}, "large": {"decode": [gone]}}
    failover = {"wait_s": 50.0, "wake_s": 30.0, "tier_wait_s": 5.0}

    async with run_router(
        table, predictor=Scores(0.1, 0.9), failover=failover, clock=clock, background=False
    ) as (client, app):
        routed = await held_until(app, clock, client, 5.0)
        clock.now = 100.0
        named = await held_until(app, clock, client, 50.0, model="large")

    assert (routed.status, routed.headers["x-tandem-reason"]) == (200, "unavailable")
    assert named.status == 503


async def test_a_request_is_tried_as_often_as_max_attempts_says(
    run_router: Any, make_worker: Any
) -> None:
    broken = (500, {}, b'{"error": {"message": "no"}}')
    workers = [await make_worker(refuse=[broken] * 9) for _ in range(4)]

    async with run_router({"large": {"decode": workers}}, failover={"max_attempts": 3}) as (
        client,
        _,
    ):
        reply = await client.chat(model="large")

    assert reply.status == 503
    assert sum(len(worker.inference) for worker in workers) == 3


async def test_a_request_is_held_until_a_worker_appears(run_router: Any, make_worker: Any) -> None:
    worker = await make_worker()

    async with run_router({}) as (client, app):
        task = asyncio.ensure_future(client.chat(model="large"))
        await eventually(lambda: app.services.ledger.num_inflight)
        assert not task.done()
        app.set_table({"large": {"decode": (worker.url,)}})
        reply = await task

    assert reply.status == 200


async def test_ready_needs_a_usable_worker_or_tiers_that_sleep(
    run_router: Any, make_worker: Any
) -> None:
    """Scaled to zero it takes requests and holds them; without any table it knows nothing yet."""
    worker = await make_worker()
    gone = await make_worker()
    await gone.stop()
    async with run_router({}) as (client, app):
        asleep = await client.get("/ready")
        app.workers.are_told = False
        unknown = await client.get("/ready")
        app.set_table({"large": {"decode": (gone.url,)}})
        app.picker.failed(app.picker.worker("large", gone.url), "gone")
        unreachable = await client.get("/ready")
        app.set_table({"large": {"decode": (worker.url,)}})
        usable = await client.get("/ready")
        health = await client.get("/health")

    statuses = [reply.status for reply in (asleep, unknown, unreachable, usable, health)]
    assert statuses == [200, 503, 503, 200, 200]


async def test_a_tier_that_sleeps_is_waited_for_as_long_as_a_worker_takes_to_start(
    run_router: Any, make_worker: Any
) -> None:
    worker = await make_worker()
    failover = {"wait_s": 0.2, "wake_s": 30.0, "tier_wait_s": 0.1}
    async with run_router({}, failover=failover) as (client, app):
        held = asyncio.create_task(client.chat(model="large"))
        done, _ = await asyncio.wait({held}, timeout=0.5)
        app.set_table({"large": {"decode": (worker.url,)}})
        answer = await held

    assert not done
    assert answer.status == 200


async def test_a_deleted_tier_is_not_found_at_once_and_who_waits_for_it_is_told(
    run_router: Any, make_worker: Any
) -> None:
    worker = await make_worker()
    async with run_router({}, failover={"wake_s": 600.0}) as (client, app):
        held = asyncio.ensure_future(client.chat(model="large"))
        await asyncio.sleep(0)
        app.set_table({"small": {"unified": (worker.url,)}})
        waited = await held
        named = await client.chat(model="large")
        routed = await client.chat()

    assert [waited.status, named.status] == [404, 404]
    assert named.error["code"] == "model_not_found"
    assert (routed.status, routed.headers["x-tandem-tier"]) == (200, "small")


async def test_a_tier_that_never_wakes_is_refused_with_a_time_to_come_back(
    run_router: Any,
) -> None:
    async with run_router({}, failover={"wait_s": 0.1, "wake_s": 0.2}) as (client, _):
        answer = await client.chat(model="large")

    assert answer.status == 503
    assert answer.headers["retry-after"]
    assert "no worker" in answer.error["message"]
