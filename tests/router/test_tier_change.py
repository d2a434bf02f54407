"""A request that has to leave its tier counts once, where it was served in the end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tandem_router.policy import PlainScore
from tandem_router.testing.two_tiers import TIERS, Scores

CAPPED = [TIERS[0], {**TIERS[1], "max_share": 0.5}]
FAILOVER = {"wait_s": 5.0, "wake_s": 5.0, "tier_wait_s": 0.05}


class Asked(Scores):
    """Tells when a prompt is scored; the router goes on from there until it has to wait."""

    def __init__(self, small: float, large: float) -> None:
        super().__init__(small, large)
        self.asked = asyncio.Event()

    def score(self, prompt: str) -> PlainScore:
        if prompt == "hello":
            self.asked.set()
        return super().score(prompt)


class ByPrompt(Scores):
    """Hard prompts gain from the large tier, others lose by it."""

    def score(self, prompt: str) -> PlainScore:
        self.prompts.append(prompt)
        return PlainScore(self.quality if prompt == "hard" else {"small": 0.9, "large": 0.8})


async def decisions_total(client: Any) -> dict[tuple[str, str], float]:
    text = (await client.get("/metrics")).body.decode()
    return {
        (sample.labels["tier"], sample.labels["reason"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "tandem_decisions_total"
    }


async def a_dead_large(make_worker: Any) -> dict[str, Any]:
    dead = await make_worker()
    await dead.stop()
    return {"small": {"unified": [await make_worker()]}, "large": {"decode": [dead]}}


async def assert_counted_once_on_small(client: Any, app: Any, reply: Any) -> None:
    steering = app.services.steering
    state = (await client.get("/admin/state")).json
    shares = {tier["name"]: tier["recent_share"] for tier in state["tiers"]}
    totals = {tier["name"]: tier["num_requests"] for tier in state["tiers"]}
    (record,) = (await client.get("/admin/decisions")).json["decisions"]

    assert (reply.status, reply.headers["x-tandem-tier"]) == (200, "small")
    assert reply.headers["x-tandem-reason"] == "unavailable"
    assert await decisions_total(client) == {("small", "unavailable"): 1.0}
    assert shares == {"small": 1.0, "large": 0.0}
    assert totals == {"small": 1, "large": 0}
    assert (record["tier"], record["reason"]) == ("small", "unavailable")
    assert record["gain"] == pytest.approx(0.7)
    assert steering.expected_quality_ratio == pytest.approx(0.2 / 0.9)
    # The large tier has answered nothing of its half: its ceiling asks for no higher gain.
    assert steering.set_points.gain_threshold == pytest.approx(0.1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_whose_tier_fails_counts_once_where_it_was_served(
    run_router: Any, make_worker: Any, stream: bool
) -> None:
    scores = Scores(0.2, 0.9)
    async with run_router(
        await a_dead_large(make_worker),
        predictor=scores,
        threshold=0.1,
        tiers=CAPPED,
        failover=FAILOVER,
    ) as (client, app):
        reply = await client.chat(stream=stream)

        await assert_counted_once_on_small(client, app, reply)
    assert len(scores.prompts[scores.prompts.index("hello") :]) == 1


async def test_a_request_held_for_a_tier_without_a_worker_counts_once_where_it_was_served(
    run_router: Any, make_worker: Any
) -> None:
    worker, scores = await make_worker(), Asked(0.2, 0.9)
    async with run_router({}, predictor=scores, threshold=0.1, tiers=CAPPED, failover=FAILOVER) as (
        client,
        app,
    ):
        held = asyncio.ensure_future(client.chat())
        await scores.asked.wait()
        app.set_table({"small": {"unified": (worker.url,)}})
        reply = await held

        await assert_counted_once_on_small(client, app, reply)


async def test_under_a_budget_a_request_counts_once_and_only_its_last_tier_is_paid(
    run_router: Any, make_worker: Any
) -> None:
    gone = await make_worker()
    await gone.stop()
    external = {**CAPPED[1], "kind": "external", "url": f"{gone.url}/v1"}
    table = {"small": {"unified": [await make_worker()]}}
    async with run_router(
        table,
        predictor=ByPrompt(0.2, 0.9),
        threshold=0.1,
        tiers=[CAPPED[0], external],
        failover=FAILOVER,
        budget={"usd_per_hour": 36.0},
    ) as (client, app):
        control = app.services.steering.control
        before_usd = control.pacer.bucket.balance(app.services.clock())
        hard = await client.chat("hard")
        easy = await client.chat("easy")

        now = app.services.clock()
        assert [reply.headers["x-tandem-tier"] for reply in (hard, easy)] == ["small", "small"]
        assert await decisions_total(client) == {
            ("small", "unavailable"): 1.0,
            ("small", "sufficient"): 1.0,
        }
        # Half of the requests gain from the large tier; a request counted twice says two thirds.
        middle = control.curve.points(3)[1]
        assert middle.shares == {"small": 0.5, "large": 0.5}
        assert control.pacer.bucket.balance(now) >= before_usd
        assert control.pacer.bucket.held == 0.0
