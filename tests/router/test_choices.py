"""Which tier answers: the predicted gain, what a client asks for, what is there and in time."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tandem_router.balancing.worker import Load
from tandem_router.policy import PlainScore
from tandem_router.testing.two_tiers import Scores, both


async def test_the_router_chooses_by_gain_and_says_so(run_router: Any, make_worker: Any) -> None:
    table = await both(make_worker)

    for scores, tier, reason in (
        (Scores(0.2, 0.9), "large", "gain"),
        (Scores(0.9, 0.92), "small", "sufficient"),
    ):
        async with run_router(table, predictor=scores, threshold=0.1) as (client, _):
            reply = await client.chat("What is 2 + 3?")

        assert reply.headers["x-tandem-tier"] == tier
        assert reply.headers["x-tandem-reason"] == reason
        assert float(reply.headers["x-tandem-gain"]) == pytest.approx(
            scores.quality["large"] - scores.quality["small"], abs=1e-4
        )
        assert float(reply.headers["x-tandem-difficulty"]) == pytest.approx(
            1 - scores.quality["small"], abs=1e-4
        )
        assert reply.json["model"] == f"{tier}-model"
        assert scores.prompts[-1] == "What is 2 + 3?"


@pytest.mark.parametrize("model", ["small", "small-model"])
async def test_naming_a_tier_or_its_model_forces_it(
    run_router: Any, make_worker: Any, model: str
) -> None:
    async with run_router(await both(make_worker), predictor=Scores(0.0, 1.0)) as (client, _):
        reply = await client.chat(model=model)

    assert (reply.headers["x-tandem-tier"], reply.headers["x-tandem-reason"]) == ("small", "forced")


async def test_the_last_user_message_is_scored_after_what_it_follows(
    run_router: Any, make_worker: Any
) -> None:
    scores = Scores(0.5, 0.5)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "text", "text": "second"}]},
    ]

    async with run_router(await both(make_worker), predictor=scores) as (client, _):
        await client.chat(messages=messages)

    scored = scores.prompts[-1]
    assert scored.endswith("second")
    assert "be brief" in scored
    assert "first" in scored


async def test_a_quality_floor_in_a_header_moves_the_request_to_the_large_tier(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(await both(make_worker), predictor=Scores(0.8, 0.85), threshold=0.1) as (
        client,
        _,
    ):
        plain = await client.chat()
        demanding = await client.chat(headers={"x-tandem-quality": "0.99"})

    assert plain.headers["x-tandem-tier"] == "small"
    assert demanding.headers["x-tandem-tier"] == "large"
    assert demanding.headers["x-tandem-reason"] == "quality-floor"


async def test_a_cost_ceiling_in_a_header_moves_the_request_to_the_small_tier(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(await both(make_worker), predictor=Scores(0.1, 0.9)) as (client, _):
        reply = await client.chat(max_tokens=100, headers={"x-tandem-max-cost-usd": "0.0005"})

    assert reply.headers["x-tandem-tier"] == "small"
    assert reply.headers["x-tandem-reason"] == "max-cost"


async def test_a_late_predictor_means_the_fallback_tier(run_router: Any, make_worker: Any) -> None:
    class Slow:
        def score(self, prompt: str) -> PlainScore:
            time.sleep(0.1)
            return PlainScore({"small": 1.0, "large": 1.0})

    async with run_router(await both(make_worker), predictor=Slow()) as (client, app):
        reply = await client.chat()

    assert not app.services.routing.scorer.inline
    assert reply.headers["x-tandem-tier"] == "large"
    assert reply.headers["x-tandem-reason"] == "predictor-late"


async def test_a_broken_predictor_means_the_fallback_tier(
    run_router: Any, make_worker: Any
) -> None:
    class Broken:
        def score(self, prompt: str) -> PlainScore:
            raise ValueError("no")

    class Silly:
        def score(self, prompt: str) -> PlainScore:
            return PlainScore({"small": float("nan"), "large": float("nan")})

    for predictor in (Broken(), Silly()):
        async with run_router(await both(make_worker), predictor=predictor) as (client, _):
            reply = await client.chat()

        assert reply.headers["x-tandem-tier"] == "large"
        assert reply.headers["x-tandem-reason"] == "predictor-failed"


async def test_a_missed_slo_moves_requests_or_sheds_them_as_the_router_says(
    run_router: Any, make_worker: Any
) -> None:
    scores = Scores(0.75, 0.9)
    slow = await make_worker(pause_s=0.1, write_size=300)
    table = {"small": {"unified": [await make_worker()]}, "large": {"decode": [slow]}}

    async with run_router(table, predictor=scores, threshold=0.1, slo={"ttft_ms": 60}) as (
        client,
        _,
    ):
        await client.chat(model="large", stream=True)
        one_known = await client.chat()
        await client.chat(model="small", stream=True)
        both_known = await client.chat()

        async with run_router(
            {"large": {"decode": [slow]}}, slo={"ttft_ms": 5}, budget={"on_exhausted": "Reject"}
        ) as (rejecting, _):
            await rejecting.chat(model="large", stream=True)
            shed = await rejecting.chat()

    assert shed.status == 429
    assert shed.error["code"] == "slo"
    assert shed.headers["retry-after"]
    assert one_known.headers["x-tandem-tier"] == "large"
    assert both_known.headers["x-tandem-tier"] == "small"
    assert both_known.headers["x-tandem-reason"] == "slo"


@pytest.mark.parametrize("fallback", ["small", "large"])
async def test_a_fixed_predictor_sends_everything_to_the_fallback_tier(
    run_router: Any, make_worker: Any, fallback: str
) -> None:
    """The dearest too; prompt length sends a short question to the small one."""
    table, told = await both(make_worker), {}
    for kind in ("Fixed", "Length", "Learned"):  # nothing learned yet: by length
        config = {"predictor": {"type": kind}, "fallback_tier": fallback}
        async with run_router(table, **config) as (client, _):
            replies = [await client.chat("x" * size) for size in (1, 2000)]
        told[kind] = [reply.headers["x-tandem-tier"] for reply in replies]

    assert told == {
        "Fixed": [fallback, fallback],
        "Length": ["small", "large"],
        "Learned": ["small", "large"],
    }


async def test_tokens_that_wait_at_a_tiers_workers_move_a_request_to_another(
    run_router: Any, make_worker: Any, reported: Any
) -> None:
    """What workers report is the queue wait of the SLO's penalty."""
    found = {}
    for waiting in (0, 10_000):
        async with run_router(
            await both(make_worker),
            predictor=Scores(0.75, 0.9),
            threshold=0.1,
            slo={"ttft_ms": 500},
        ) as (client, app):
            await reported(app)
            for tier in ("small", "large"):
                await client.chat(model=tier, stream=True)
            for worker in app.picker.workers:
                tokens = waiting if worker.tier == "large" else 0
                profile = (0.0, 0.001, 0.0)
                worker.load = Load(pending_prefill_tokens=tokens, prefill_profile=profile)
            reply = await client.chat()
        found[waiting] = (reply.headers["x-tandem-tier"], reply.headers["x-tandem-reason"])

    assert found == {0: ("large", "gain"), 10_000: ("small", "slo")}
