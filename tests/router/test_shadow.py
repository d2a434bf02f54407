"""A share of answered requests is answered by another tier too, unseen, judged and paid for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from quality_world import World
from tandem_router.policy import PlainScore
from tandem_router.quality.learner import LEARNING
from tandem_router.testing.asgi_client import Client
from tandem_router.testing.planted_quality import FakeJudge, PlantedProvider, uniform


class Knowing:
    """A predictor: small is worth it on even questions."""

    def __init__(self, small: float = 0.5, large: float = 0.9) -> None:
        self.small, self.large = small, large

    def score(self, prompt: str) -> PlainScore:
        gain = 0.05 if uniform("gain", prompt) < 0.5 else self.large - self.small
        return PlainScore({"small": self.large - gain, "large": self.large})


@pytest.fixture
async def world() -> AsyncIterator[World]:
    small = await PlantedProvider(quality=lambda _: 0.6).start()
    large = await PlantedProvider(quality=lambda _: 0.9).start()
    judge = await FakeJudge().start()
    yield World(small, large, judge)
    for server in (small, large, judge):
        await server.stop()


@pytest.fixture
def ask(run_router: Any) -> Callable[..., Any]:
    @asynccontextmanager
    async def run(config: dict[str, Any], **options: Any) -> AsyncIterator[tuple[Client, Any]]:
        async with run_router({}, predictor=Knowing(), **config, **options) as (client, app):
            yield client, app

    return run


async def settled(app: Any) -> None:
    """Until no shadow request is under way."""
    async with asyncio.timeout(10):
        await app.services.learner.idle()


async def questions(client: Client, app: Any, num: int, start: int = 0, **fields: Any) -> None:
    for number in range(start, start + num):
        reply = await client.chat(f"question {number}", **fields)
        assert reply.status == 200
        await settled(app)


async def learning(client: Client) -> dict[str, Any]:
    return (await client.get("/admin/state")).json["learning"]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_other_tier_answers_unseen_and_a_judge_makes_a_label_of_it(
    world: World, ask: Any, stream: bool
) -> None:
    async with ask(world.config()) as (client, app):
        await questions(client, app, 12, stream=stream)
        labels = await app.services.store.labels()
        state = (await client.get("/admin/state")).json
        decisions = (await client.get("/admin/decisions")).json["decisions"]

    served = {one["request_id"]: one for one in decisions}
    assert len(labels) == len(served) == 12
    for label in labels:
        one = served[label.request_id]
        assert (label.source, label.tier, label.probability) == ("judge", one["tier"], 1.0)
        assert set(label.quality) == {"small", "large"}
        assert label.predicted == one["quality"]
        assert label.cost_usd > 0.0
        assert label.prompt is None
        assert label.features is None
    # Nothing of it is seen: not in counts, shares, spend of tiers, or latencies.
    assert sum(tier["num_requests"] for tier in state["tiers"]) == 12
    assert len(world.small.inference) == len(world.large.inference) == 12


async def test_what_is_learned_costs_and_is_told_and_kept_apart_from_tenants(
    world: World, ask: Any
) -> None:
    async with ask(world.config()) as (client, app):
        await questions(client, app, 8)
        labels = await app.services.store.labels()
        spend = await app.services.store.spend()
        told = await learning(client)

    booked = sum(row.cost_usd for row in spend if row.tenant == LEARNING)
    assert booked == pytest.approx(sum(label.cost_usd for label in labels))
    assert told["spent_today_usd"] == pytest.approx(booked)
    assert {row.tier for row in spend if row.tenant == LEARNING} <= {"small", "large", "(judge)"}
    assert sum(row.num_requests for row in spend if row.tenant == "anonymous") == 8


async def test_the_days_money_is_never_passed_and_survives_a_restart(
    world: World, ask: Any, tmp_path: Any
) -> None:
    cap = 0.0425
    place = {"store": {"type": "sqlite", "flush_s": 0.01}, "store_file": tmp_path / "router.db"}
    config = world.config(daily_usd=cap)
    async with ask(config, **place) as (client, app):
        await questions(client, app, 20)
        first = await learning(client)
    async with ask(config, **place) as (client, app):
        restarted = await learning(client)
        await questions(client, app, 20, start=20)
        second = await learning(client)
        spend = await app.services.store.spend()

    assert 0.0 < first["spent_today_usd"] <= cap
    assert restarted["spent_today_usd"] == pytest.approx(first["spent_today_usd"])
    assert second["spent_today_usd"] <= cap
    assert sum(row.cost_usd for row in spend if row.tenant == LEARNING) <= cap
    # What cannot be paid is not drawn any more, so that labels stay a fair sample.
    assert first["failed"]["no money"] == 1
    assert "the day's money is spent" in first["closed"].values()
    assert first["skipped"]["the day's money is spent"] > 0


@pytest.mark.parametrize("mood", ["down", "garbled", "silent", "page"])
async def test_a_judge_that_gives_no_verdict_costs_labels_and_nothing_else(
    world: World, ask: Any, mood: str
) -> None:
    world.judge.mood = mood
    config = world.config()
    config["learning"]["judge"]["timeout_s"] = 0.05
    async with ask(config) as (client, app):
        await questions(client, app, 16)
        labels = await app.services.store.labels()
        told = await learning(client)

    # Equal answers are a tie without a judge.
    assert all(label.quality == {"small": 1.0, "large": 1.0} for label in labels)
    assert len(labels) < 16
    assert told["judge"]["ok"] is False
    assert told["judge"]["error"]
    assert told["failed"]["no verdict"] > 0
    if told["judge"]["num_failed"] >= 5:
        assert told["judge"]["paused"]
        assert "the judge is away" in told["closed"].values()


async def test_a_judge_that_always_likes_the_second_answer_says_half_of_both(
    world: World, ask: Any
) -> None:
    """Both orders are asked, so a favourite position cancels out."""
    world.judge.mood = "liar"
    async with ask(world.config()) as (client, app):
        await questions(client, app, 12)
        labels = await app.services.store.labels()
        told = await learning(client)

    assert {tuple(sorted(label.quality.items())) for label in labels} <= {
        (("large", 0.5), ("small", 0.5)),
        (("large", 1.0), ("small", 1.0)),
    }
    assert told["judge"]["num_contradicted"] > 0


@pytest.mark.parametrize("kind", ["Exact", "Normalised"])
async def test_rules_take_the_dearest_tiers_answer_for_right(
    world: World, ask: Any, kind: str
) -> None:
    async with ask(world.config(judge={"type": kind})) as (client, app):
        await questions(client, app, 16)
        labels = await app.services.store.labels()

    assert len(world.judge.inference) == 0
    assert {label.source for label in labels} == {"shadow"}
    for label in labels:
        assert label.quality["large"] == 1.0
    assert 0.0 < sum(label.quality["small"] for label in labels) < 16.0


async def test_a_number_is_compared_only_with_a_number(world: World, ask: Any) -> None:
    async with ask(world.config(judge={"type": "Numeric"})) as (client, app):
        await questions(client, app, 4)
        told = await learning(client)

    assert told["num_labelled"] == 0
    assert told["failed"] == {"no verdict": 4}


async def test_who_names_a_tier_or_opts_out_is_not_asked_again(world: World, ask: Any) -> None:
    from tandem_router.api.api_keys import key_hash

    secret = b"0123456789abcdef"
    tenants = [
        {"name": name, "key_hashes": [key_hash(secret, f"tdm-{name}")], "learning": name == "in"}
        for name in ("in", "out")
    ]
    async with ask(world.config(), tenants=tenants, key_secret=secret) as (client, app):
        for number in range(4):
            for name in ("in", "out"):
                headers = {"authorization": f"Bearer tdm-{name}"}
                await client.chat(f"question {number}", headers=headers)
                await client.chat(f"question {number}", headers=headers, model="small")
                await settled(app)
        labels = await app.services.store.labels()

    assert [label.tenant for label in labels] == ["in"] * 4


async def test_no_share_means_no_second_answer(world: World, ask: Any) -> None:
    async with ask(world.config(shadow_share=0.0)) as (client, app):
        await questions(client, app, 6)
        told = await learning(client)

    assert told["num_drawn"] == 0
    assert len(world.small.inference) + len(world.large.inference) == 6


async def test_a_tier_that_misses_its_slo_gets_no_shadows_and_labels_say_so(
    world: World, ask: Any
) -> None:
    config = world.config()
    async with ask(config, slo={"ttft_ms": 100.0}) as (client, app):
        await questions(client, app, 4)
        latency = app.services.routing.latency["large"]
        for _ in range(20):
            latency.saw(5.0, None, app.services.clock())
        app.services.learner.gate.look_again()
        await questions(client, app, 30, start=4)
        told = await learning(client)
        num_before = told["num_labelled"]
        for _ in range(2000):
            latency.saw(0.001, None, app.services.clock())
        app.services.learner.gate.look_again()
        await questions(client, app, 30, start=34)
        labels = await app.services.store.labels()

    assert told["closed"] == {"large": "tier large misses its SLO"}
    assert told["skipped"]["tier large misses its SLO"] > 0
    late = [label for label in labels[num_before:] if label.tier == "small"]
    assert late
    assert all(label.probability < 0.8 for label in late)
    assert all(label.probability == 1.0 for label in labels if label.tier == "large")


async def test_the_judge_is_asked_by_its_model_and_key_and_its_price_is_booked(
    world: World, ask: Any, tmp_path: Any
) -> None:
    (tmp_path / "key").write_text("sk-judge\n")
    config = world.config(daily_usd=100.0)
    config["learning"]["judge"] = {
        "type": "External",
        "url": f"{world.judge.url}/v1",
        "model": "arbiter-1",
        "api_key_file": str(tmp_path / "key"),
        "usd_per_1m_input_tokens": 1000.0,
        "usd_per_1m_output_tokens": 5000.0,
        "timeout_s": 5.0,
    }
    async with ask(config) as (client, app):
        await questions(client, app, 8)
        spend = await app.services.store.spend()

    asked = world.judge.inference
    assert {seen.json["model"] for seen in asked} == {"arbiter-1"}
    assert {seen.headers["authorization"] for seen in asked} == {"bearer sk-judge"}
    (booked,) = [row.cost_usd for row in spend if row.tier == "(judge)"]
    assert booked == pytest.approx(len(asked) * (100 * 1000.0 + 10 * 5000.0) / 1e6)


async def test_a_budget_that_cannot_pay_pauses_learning_and_no_request(
    world: World, ask: Any
) -> None:
    async with ask(world.config(), budget={"usd_per_hour": 0.6}) as (client, app):
        await questions(client, app, 6)
        told = await learning(client)

    assert told["failed"] == {"no money": 1}
    assert set(told["closed"].values()) == {"the budget cannot pay it now"}


async def test_learning_takes_its_part_of_a_budget_and_leaves_the_rest_to_answers(
    world: World, ask: Any
) -> None:
    config = world.config(daily_usd=100.0)
    config["learning"]["judge"] |= {"usd_per_1m_input_tokens": 1000.0}
    async with ask(config, budget={"usd_per_hour": 100.0}) as (client, app):
        await questions(client, app, 60)
        told = await learning(client)

    assert 0 < told["num_labelled"] < 60, told
    assert told["failed"] == {}
    assert set(told["closed"].values()) == {"learning has had its part of the budget"}
    assert set(told["skipped"]) == {"learning has had its part of the budget"}


async def test_what_was_captured_is_deleted_after_retention_days(world: World, ask: Any) -> None:
    async with ask(world.config(capture="Prompts", retention_days=2.0)) as (client, app):
        await client.chat("a question")
        await settled(app)
        (label,) = await app.services.store.labels()
        await app.services.quality.forget(label.at + 1.9 * 86_400)
        (kept,) = await app.services.store.labels()
        await app.services.quality.forget(label.at + 2.1 * 86_400)
        (bare,) = await app.services.store.labels()

    assert (label.prompt, kept.prompt, bare.prompt) == ("a question", "a question", None)
    assert bare.quality == label.quality


async def test_captured_prompts_are_redacted_and_features_hold_no_words(
    world: World, ask: Any
) -> None:
    text = "Write to anna@example.org or see https://example.org/x?id=1 about 4711 0815 please"
    kinds = ["Emails", "Numbers", "Urls"]
    found = {}
    for capture in ("None", "Features", "Prompts"):
        async with ask(world.config(capture=capture, redact=kinds)) as (client, app):
            await client.chat(text)
            await settled(app)
            (found[capture],) = await app.services.store.labels()

    assert (found["None"].prompt, found["None"].features) == (None, None)
    assert found["Prompts"].prompt == "Write to [email] or see [url] about [number] please"
    assert found["Features"].prompt is None
    assert "anna" not in str(found["Features"].features)
    assert len(found["Features"].features["hand"]) > 20
    assert found["Features"].features["word_grams"]


async def test_a_second_answer_that_fails_is_counted_and_nobody_waits(
    world: World, ask: Any
) -> None:
    async with ask(world.config()) as (client, app):
        await questions(client, app, 2)
        await world.large.stop()
        small = [n for n in range(2, 40) if uniform("gain", f"question {n}") < 0.5][:4]
        for number in small:
            reply = await client.chat(f"question {number}")
            assert reply.headers["x-tandem-tier"] == "small"
            await settled(app)
        told = await learning(client)

    assert told["failed"]["no answer"] >= 1
