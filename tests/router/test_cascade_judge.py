"""An external judge is asked of an answer before it is sent, where that changes what is done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from eventually import eventually
from quality_world import World
from tandem_router.api.api_keys import key_hash
from tandem_router.config import RouterConfig
from tandem_router.predictor.cascade import TokenStatistics, Verdict, VerifierPower
from tandem_router.quality.answer_judge import READING
from tandem_router.testing.planted_quality import FakeJudge, PlantedProvider
from tandem_router.testing.two_tiers import Scores

#: The verifier keeps it; blame of a judge that nobody checked has the large tier asked.
KEPT = Verdict(0.8, 0.9)


class Cascading(Scores):
    """Leaves it open, with a verifier that says the same of every answer."""

    def __init__(self, verdict: Verdict = KEPT) -> None:
        super().__init__(0.5, 0.9)
        self.verdict = verdict
        self.cascade = self
        self.verifier = self
        self.power = VerifierPower((0.02, 0.98), (0.98, 0.02))
        self.first, self.second = "small", "large"

    def verify(self, prompt: str, answer: str, tokens: TokenStatistics | None = None) -> Verdict:
        return self.verdict

    def weigh(self, verdict: Verdict, small: float, large: float) -> Verdict:
        return verdict


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """The small tier is wrong, the large one right, the judge sees which."""
    small = await PlantedProvider(quality=lambda _: 0.0).start()
    large = await PlantedProvider(quality=lambda _: 1.0).start()
    judge = await FakeJudge().start()
    yield World(small, large, judge)
    for server in (small, large, judge):
        await server.stop()


@pytest.fixture
def ask(run_router: Any, world: World) -> Callable[..., Any]:
    @asynccontextmanager
    async def run(
        verdict: Verdict = KEPT, learning: dict[str, Any] | None = None, **changes: Any
    ) -> AsyncIterator[tuple[Any, Any]]:
        config = world.config(**{"shadow_share": 0.0, "daily_usd": 10.0, **(learning or {})})
        config["threshold"] = 0.15
        config["cascade"] = {"judge_timeout_s": 5.0}
        predictor = Cascading(verdict)
        async with run_router({}, predictor=predictor, **{**config, **changes}) as found:
            yield found

    return run


async def told(client: Any) -> dict[str, Any]:
    return (await client.get("/admin/state")).json["cascade"]["judge"]


async def the_read(client: Any) -> dict[str, Any]:
    return (await client.get("/admin/decisions")).json["decisions"][0]["read"]


@pytest.mark.parametrize(("is_right", "tier"), [(True, "small"), (False, "large")])
async def test_an_answer_that_the_verifier_would_keep_is_shown_to_the_judge(
    world: World, ask: Any, is_right: bool, tier: str
) -> None:
    world.small.quality = lambda _: float(is_right)
    async with ask() as (client, app):
        reply = await client.chat("what is it?")
        state, read = await told(client), await the_read(client)
        spend = await app.services.store.spend()

    assert reply.headers["x-tandem-tier"] == tier
    assert reply.headers["x-tandem-reason"] == ("verified" if is_right else "escalated")
    assert len(world.judge.inference) == 1
    word = "good" if is_right else "bad"
    assert (read["judge"], state["outcomes"]) == (word, {word: 1})
    assert read["probability_unjudged"] == 0.8
    assert read["probability"] == pytest.approx(0.8 if is_right else 12 / 19)
    assert state["problem"] == ""
    usd = (100 * 2.0 + 10 * 4.0) / 1e6
    assert [row.cost_usd for row in spend if row.tier == READING] == [pytest.approx(usd)]
    assert state["spent_today_usd"] == pytest.approx(usd) == read["judge_usd"]


@pytest.mark.parametrize("verdict", [Verdict(0.99, 0.9), Verdict(0.1, 0.9)])
async def test_nobody_is_asked_whose_word_changes_nothing(
    world: World, ask: Any, verdict: Verdict
) -> None:
    async with ask(verdict) as (client, _):
        await client.chat("what is it?")
        state = await told(client)

    assert world.judge.inference == []
    assert state["outcomes"] == {"needless": 1}


@pytest.mark.parametrize("mood", ["down", "garbled", "silent", "page"])
async def test_a_judge_that_says_nothing_leaves_the_verifier_to_decide(
    world: World, ask: Any, mood: str
) -> None:
    world.judge.mood = mood
    async with ask(cascade={"judge_timeout_s": 0.05}) as (client, _):
        replies = [await client.chat(f"question {number}") for number in range(7)]
        state = await told(client)

    assert {reply.headers["x-tandem-reason"] for reply in replies} == {"verified"}
    # After five in a row it is left alone.
    assert state["outcomes"] == {"no_verdict": 5, "away": 2}
    assert state["problem"].startswith("the judge gives no verdicts, the other views decide: ")
    assert state["paused"]


async def test_half_a_letter_in_an_answer_is_shown_like_any_other(world: World, ask: Any) -> None:
    world.small.said = lambda seen: "It is right \ud83d."  # type: ignore[method-assign]
    async with ask() as (client, _):
        reply = await client.chat("what is it?")
        state = await told(client)

    assert reply.status == 200
    assert state["outcomes"] == {"good": 1}


async def test_what_breaks_inside_costs_no_request(
    ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    async with ask() as (client, app):
        monkeypatch.setattr(app.services.answer_judge.judge, "opinion", broken)
        reply = await client.chat("what is it?")
        state = await told(client)

    assert (reply.status, reply.headers["x-tandem-reason"]) == (200, "verified")
    assert state["outcomes"] == {"failed": 1}


async def test_a_judge_that_is_too_slow_for_answers_may_still_grade_labels(
    world: World, ask: Any
) -> None:
    world.judge.mood = "down"
    async with ask() as (client, app):
        for number in range(6):
            await client.chat(f"question {number}")

        assert app.services.answer_judge.judge.paused()
        assert not app.services.learner.judge.paused()


async def test_it_waits_no_longer_than_the_slo_leaves(world: World, ask: Any) -> None:
    world.judge.mood = "silent"
    cascade = {"judge_timeout_s": 3600.0}
    async with ask(cascade=cascade, slo={"ttft_ms": 400.0}) as (client, app):
        app.services.routing.latency["small"].last_whole.saw(0.01, app.services.clock())
        reply = await client.chat("what is it?")
        state = await told(client)

    assert reply.headers["x-tandem-reason"] == "verified"
    assert state["outcomes"] in ({"no_verdict": 1}, {"no_time": 1})


async def test_the_wait_for_the_judge_is_no_part_of_how_quick_the_small_tier_is(
    world: World, ask: Any
) -> None:
    world.small.quality = lambda _: 1.0
    async with ask() as (client, app):
        await client.chat("what is it?")
        record = (await client.get("/admin/decisions")).json["decisions"][0]
        seen = app.services.routing.latency["small"].last_whole
        value_s = seen.report(95.0, None, app.services.clock()).value_s

    assert record["read"]["judge_s"] > 0.0
    assert value_s == pytest.approx(record["e2e_s"] - record["read"]["judge_s"])


async def test_it_spends_half_of_the_days_money_at_most_and_a_restart_changes_nothing(
    world: World, ask: Any, tmp_path: Any
) -> None:
    place = {"store": {"type": "sqlite", "flush_s": 0.01}, "store_file": tmp_path / "router.db"}
    place["learning"] = {"daily_usd": 0.02}
    states = []
    for _ in range(2):
        async with ask(**place) as (client, app):
            await eventually(lambda app=app: app.services.store.health.ok)
            for number in range(40):
                reply = await client.chat(f"question {number}")
                assert reply.status == 200
            states.append(await told(client))
            spend = await app.services.store.spend()

    assert states[0]["outcomes"]["bad"] > 0
    assert states[0]["outcomes"]["no_money"] > 0
    assert "could not be paid today" in states[0]["problem"]
    assert sum(row.cost_usd for row in spend if row.tier == READING) <= 0.01
    assert states[1]["outcomes"].keys() <= {"no_money", "bad"}
    assert states[1]["spent_today_usd"] <= 0.01


async def test_a_budget_that_cannot_pay_the_judge_leaves_the_verifier_to_decide(
    world: World, ask: Any
) -> None:
    judge = {**world.config()["learning"]["judge"], "usd_per_1m_input_tokens": 1e6}
    learning = {"judge": judge, "daily_usd": 1e9}
    async with ask(learning=learning, budget={"usd_per_hour": 1.0}) as (client, _):
        reply = await client.chat("what is it?", max_tokens=8)
        state = await told(client)

    assert reply.headers["x-tandem-reason"] == "verified"
    assert state["outcomes"] == {"no_money": 1}
    assert world.judge.inference == []


async def test_words_of_tenants_who_opt_out_are_not_shown_to_it(world: World, ask: Any) -> None:
    secret = b"0123456789abcdef"
    tenants = [
        {"name": name, "key_hashes": [key_hash(secret, f"tdm-{name}")], "learning": name == "in"}
        for name in ("in", "out")
    ]
    async with ask(tenants=tenants, key_secret=secret) as (client, app):
        replies = [
            await client.chat("what is it?", headers={"authorization": f"Bearer tdm-{name}"})
            for name in ("in", "out")
        ]
        outcomes = dict(app.services.answer_judge.outcomes)

    assert [reply.headers["x-tandem-tier"] for reply in replies] == ["large", "small"]
    assert outcomes == {"bad": 1, "opted_out": 1}
    assert len(world.judge.inference) == 1


@pytest.mark.parametrize("streams", [False, True])
async def test_streams_are_shown_to_it_only_where_the_router_reads_them(
    world: World, ask: Any, streams: bool
) -> None:
    cascade = {"judge_timeout_s": 5.0, "streams": streams}
    async with ask(cascade=cascade) as (client, _):
        await client.chat("what is it?", stream=True)

    assert len(world.judge.inference) == int(streams)


async def test_without_judge_timeout_s_a_judge_sees_no_answer_before_it_is_sent(
    world: World, ask: Any
) -> None:
    async with ask(cascade={}) as (client, _):
        reply = await client.chat("what is it?")

        assert await told(client) is None
    assert reply.headers["x-tandem-reason"] == "verified"
    assert world.judge.inference == []


async def test_a_client_that_leaves_meanwhile_frees_everything_and_the_most_is_booked(
    world: World, ask: Any
) -> None:
    world.judge.mood = "silent"
    async with ask(cascade={"judge_timeout_s": 3600.0}) as (client, app):
        request = asyncio.create_task(client.chat("what is it?"))
        await eventually(lambda: world.judge.inference)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        state, services = await told(client), app.services

    assert services.ledger.num_inflight == 0
    assert 0.0 < state["spent_today_usd"] <= services.learner.cap.spent(services.learner.day())


async def test_a_judge_that_always_says_good_is_found_out_and_asked_no_more(
    world: World, ask: Any, tmp_path: Any
) -> None:
    """Labels say so, after a restart too: its word changes nothing."""
    world.judge.mood = "liar"
    place = {"store": {"type": "sqlite", "flush_s": 0.01}, "store_file": tmp_path / "router.db"}
    place["learning"] = {"shadow_share": 1.0}
    async with ask(**place) as (client, app):
        await eventually(lambda: app.services.quality.replayed)
        for number in range(22):
            await client.chat(f"question {number}")
            await app.services.learner.idle()
        first = await told(client)
    async with ask(**place) as (client, app):
        await eventually(lambda: app.services.quality.replayed)
        again = await told(client)
        await client.chat("another question")
        last = await told(client)

    # It likes the second of two answers: a label is one half right, and twenty are ten of each.
    assert first["outcomes"] == {"good": 20, "needless": 2}
    assert (first["num_checked"], first["checked"]) == (20, True)
    assert (again["num_checked"], again["checked"], again["outcomes"]) == (20, True, {})
    assert last["outcomes"] == {"needless": 1}


async def test_another_judge_begins_unchecked(world: World, ask: Any) -> None:
    async with ask(learning={"shadow_share": 1.0}) as (client, app):
        await eventually(lambda: app.services.quality.replayed)
        await client.chat("what is it?")
        await app.services.learner.idle()
        before = (await told(client))["num_checked"]
        learning = app.config.learning.model_dump(exclude_unset=True)
        learning["judge"]["model"] = "another"
        app.settings.apply({"learning": learning})

        assert before == 1
        assert (await told(client))["num_checked"] == 0
        assert app.services.answer_judge.judge.config.model == "another"


@pytest.mark.parametrize("judge", [None, {"type": "Exact"}])
def test_a_cascade_that_asks_a_judge_needs_an_external_one(judge: Any) -> None:
    tiers = [{"name": "a", "served_model": "a"}, {"name": "b", "served_model": "b"}]
    with pytest.raises(ValueError, match=r"learning\.judge, which is not of type External"):
        RouterConfig.model_validate(
            {
                "name": "chat",
                "tiers": tiers,
                "fallback_tier": "b",
                "cascade": {"judge_timeout_s": 3.0},
                "learning": {"judge": judge},
            }
        )
