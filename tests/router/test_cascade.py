"""The cheaper tier's answer is read before it is sent, and replaced where it will not do."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from eventually import eventually
from tandem_router.openai.sse import event_data, split_events
from tandem_router.predictor.cascade import TokenStatistics, Verdict, VerifierPower
from tandem_router.testing.fake_provider import FakeProvider
from tandem_router.testing.fake_server import Seen
from tandem_router.testing.fake_vllm import FakeVLLM
from tandem_router.testing.two_tiers import TIERS, Scores

CERTAIN = asdict(TokenStatistics(8, -0.1, -0.5, 0.0, -0.1))
SEPARATES = VerifierPower((0.02, 0.98), (0.98, 0.02))
GUESSES = VerifierPower((0.5, 0.5), (0.5, 0.5))


@dataclass
class Reads:
    """A verifier that says what a test wants and remembers what it was shown."""

    says: Verdict = field(default_factory=lambda: Verdict(0.9, 0.9))
    seen: list[tuple[str, str, TokenStatistics | None]] = field(default_factory=list)
    fails: Exception | None = None
    waits: threading.Event | None = None
    began: threading.Event = field(default_factory=threading.Event)

    def verify(self, prompt: str, answer: str, tokens: TokenStatistics | None = None) -> Verdict:
        self.seen.append((prompt, answer, tokens))
        self.began.set()
        if self.waits is not None:
            self.waits.wait(5.0)
        if self.fails is not None:
            raise self.fails
        return self.says


@dataclass
class Stored:
    """A verifier between the two tiers."""

    verifier: Any
    power: VerifierPower = SEPARATES
    first: str = "small"
    second: str = "large"

    def weigh(self, verdict: Verdict, small: float, large: float) -> Verdict:
        return verdict


class Cascading(Scores):
    """Scores that leave it open, with a verifier."""

    def __init__(
        self,
        reads: Reads,
        small: float = 0.5,
        large: float = 0.9,
        power: VerifierPower = SEPARATES,
    ) -> None:
        super().__init__(small, large)
        self.cascade = Stored(reads, power)


@pytest.fixture
def run_router(run_router: Any) -> Any:
    """A router that asks for a gain of a tenth."""
    return lambda table, **changes: run_router(table, **{"threshold": 0.1, **changes})


GOOD = Verdict(0.9, 0.95)
BAD = Verdict(0.05, 0.9)
STREAMS = {"streams": True}


async def two(make_worker: Any, **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    small, large = await make_worker(**options), await make_worker()
    return small, large, {"small": {"unified": [small]}, "large": {"decode": [large]}}


def asked(worker: Any) -> int:
    return sum(seen.path.startswith("/v1/c") for seen in worker.seen)


async def of_tiers(client: Any, metric: str) -> dict[str, float]:
    """What a metric says of each tier."""
    text = (await client.get("/metrics")).body.decode()
    return {
        sample.labels["tier"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == metric
    }


async def the_record(client: Any) -> dict[str, Any]:
    (record,) = (await client.get("/admin/decisions")).json["decisions"]
    return record


async def test_a_good_small_answer_is_sent_after_it_was_read(
    run_router: Any, make_worker: Any
) -> None:
    reads = Reads(GOOD)
    small, large, table = await two(make_worker, token_statistics=CERTAIN)
    async with run_router(table, predictor=Cascading(reads), cascade={}) as (client, _):
        reply = await client.chat()
        record = await the_record(client)

    assert (reply.headers["x-tandem-tier"], reply.headers["x-tandem-reason"]) == (
        "small",
        "verified",
    )
    assert (asked(small), asked(large)) == (1, 0)
    ((prompt, answer, tokens),) = reads.seen
    assert answer == reply.json["choices"][0]["message"]["content"]
    assert "hello" in prompt
    assert tokens == TokenStatistics.parse(CERTAIN)
    assert "tandem" not in reply.json
    assert record["read"]["probability"] == 0.9
    assert record["read"]["outcome"] == "verified"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_small_answer_is_replaced_by_the_large_tiers_and_both_are_booked(
    run_router: Any, make_worker: Any, stream: bool
) -> None:
    small, large, table = await two(make_worker)
    async with run_router(table, predictor=Cascading(Reads(BAD)), cascade=STREAMS) as (client, app):
        reply = await client.chat(stream=stream)
        record = await the_record(client)
        ledger = app.services.ledger
        costs = await of_tiers(client, "tandem_cost_usd_total")

    assert reply.headers["x-tandem-tier"] == "large"
    assert reply.headers["x-tandem-reason"] == "escalated"
    assert (asked(small), asked(large)) == (1, 1)
    small_usd, large_usd = (5 * 1.0 + 8 * 2.0) / 1e6, (5 * 10.0 + 8 * 20.0) / 1e6
    assert record["cost_usd"] == pytest.approx(small_usd + large_usd)
    assert record["read"]["cost_usd"] == pytest.approx(small_usd)
    assert record["read"]["outcome"] == "escalated"
    assert (record["prompt_tokens"], record["output_tokens"]) == (5, 8)
    assert ledger.num_inflight == 0
    assert costs == pytest.approx({"small": small_usd, "large": large_usd})
    if not stream:
        assert float(reply.headers["x-tandem-cost-usd"]) == pytest.approx(small_usd + large_usd)


async def test_a_verified_stream_is_the_small_answer_as_events(
    run_router: Any, make_worker: Any
) -> None:
    small, large, table = await two(make_worker)
    predictor = Cascading(Reads(GOOD))
    async with run_router(table, predictor=predictor, cascade=STREAMS) as (client, _):
        reply = await client.chat(stream=True, stream_options={"include_usage": True})
        whole = await client.chat()

    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-tandem-reason"] == "verified"
    assert not json.loads(next(s.body for s in small.seen if s.path.startswith("/v1/c")))["stream"]
    payloads = [event_data(event) for event in split_events(reply.body)]
    events = [json.loads(payload) for payload in payloads if payload != b"[DONE]"]
    text = "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])
    assert len(text) > 0
    assert events[-1]["usage"]["completion_tokens"] == 8
    assert asked(large) == 0
    assert whole.headers["x-tandem-reason"] == "verified"


@dataclass(eq=False)
class Says(FakeProvider):
    """A provider whose answer is this message."""

    message: dict[str, Any] = field(default_factory=dict)

    def whole(self, seen: Seen) -> dict[str, Any]:
        reply = super().whole(seen)
        reply["choices"][0]["message"] = {"role": "assistant", **self.message}
        return reply


async def provided(run_router: Any, reads: Reads, **body: Any) -> Any:
    """What a client gets of two providers, the smaller of which says `message`."""
    small, large = await Says(message=body.pop("message")).start(), await FakeProvider().start()
    tiers = [
        {**TIERS[0], "kind": "external", "url": f"{small.url}/v1"},
        {**TIERS[1], "kind": "external", "url": f"{large.url}/v1"},
    ]
    try:
        async with run_router({}, predictor=Cascading(reads), tiers=tiers, cascade=STREAMS) as (
            client,
            app,
        ):
            reply = await client.chat(**body)
            outcomes = dict(app.services.routing.answers.outcomes)
    finally:
        await small.stop()
        await large.stop()
    return reply, outcomes, asked(large)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ['{"answer": "forty \\u00fc", "of": [1, 2]}', "[1, 2", "null"])
async def test_an_answer_that_is_raw_json_is_read_and_sent_as_it_stands(
    run_router: Any, stream: bool, text: str
) -> None:
    reads = Reads(GOOD)
    form = {"response_format": {"type": "json_object"}, "stream": stream}
    reply, outcomes, num_large = await provided(
        run_router, reads, message={"content": text}, **form
    )

    assert [answer for _, answer, _ in reads.seen] == [text]
    assert (reply.headers["x-tandem-reason"], num_large) == ("verified", 0)
    assert outcomes == {"verified": 1}
    if stream:
        payloads = [event_data(event) for event in split_events(reply.body)]
        events = [json.loads(payload) for payload in payloads if payload != b"[DONE]"]
        said = "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])
    else:
        said = reply.json["choices"][0]["message"]["content"]
    assert said == text


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_a_call_of_a_tool_is_sent_unread_and_whole(
    run_router: Any, stream: bool
) -> None:
    """Some providers call what nobody offered; there is no text to read."""
    reads = Reads(BAD)
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    reply, outcomes, num_large = await provided(
        run_router, reads,
        message={"content": None, "reasoning_content": "hm", "tool_calls": [call]}, stream=stream,
    )  # fmt: skip

    assert reads.seen == []
    assert (reply.headers["x-tandem-reason"], num_large) == ("unverified", 0)
    assert outcomes == {"no_text": 1}
    if stream:
        payloads = [event_data(event) for event in split_events(reply.body)]
        events = [json.loads(payload) for payload in payloads if payload != b"[DONE]"]
        deltas = [c["delta"] for e in events for c in e["choices"]]
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert [d["reasoning_content"] for d in deltas if "reasoning_content" in d] == ["hm"]
        assert [c["index"] for c in calls] == [0]
    else:
        calls = reply.json["choices"][0]["message"]["tool_calls"]
    assert [(c["id"], c["function"]) for c in calls] == [("c1", call["function"])]


async def test_streams_go_straight_to_their_tier_unless_the_router_says_otherwise(
    run_router: Any, make_worker: Any
) -> None:
    reads = Reads(GOOD)
    _, _, table = await two(make_worker)
    async with run_router(table, predictor=Cascading(reads), cascade={}) as (client, _):
        reply = await client.chat(stream=True)

    assert reply.headers["x-tandem-reason"] == "gain"
    assert reads.seen == []


@pytest.mark.parametrize(
    ("small", "large", "power", "reason"),
    [
        (0.999, 0.9, SEPARATES, "sufficient"),
        (0.001, 0.9, SEPARATES, "gain"),
        (0.5, 0.9, GUESSES, "gain"),
    ],
    ids=["sure-small", "sure-large", "a-verifier-that-guesses"],
)
async def test_outside_the_middle_zone_no_answer_is_read(
    run_router: Any, make_worker: Any, small: float, large: float, power: Any, reason: str
) -> None:
    reads = Reads()
    _, _, table = await two(make_worker)
    predictor = Cascading(reads, small, large, power)
    async with run_router(table, predictor=predictor, cascade={}) as (client, _):
        reply = await client.chat()
        state = (await client.get("/admin/state")).json["cascade"]

    assert reply.headers["x-tandem-reason"] == reason
    assert reads.seen == []
    assert state["zones"] == {"large" if reason == "gain" else "small": 1}


async def test_without_a_cascade_in_the_configuration_no_answer_is_read(
    run_router: Any, make_worker: Any
) -> None:
    reads = Reads()
    _, _, table = await two(make_worker)
    async with run_router(table, predictor=Cascading(reads)) as (client, _):
        reply = await client.chat()
        state = (await client.get("/admin/state")).json

    assert reply.headers["x-tandem-reason"] == "gain"
    assert reads.seen == []
    assert state["cascade"] is None


async def test_a_predictor_without_a_verifier_says_so(run_router: Any, make_worker: Any) -> None:
    _, _, table = await two(make_worker)
    async with run_router(table, predictor=Scores(0.5, 0.9), cascade={}) as (client, _):
        reply = await client.chat()
        state = (await client.get("/admin/state")).json["cascade"]

    assert reply.headers["x-tandem-reason"] == "gain"
    assert "holds no verifier" in state["problem"]


@pytest.mark.parametrize(
    "body",
    [
        {"n": 2},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"logprobs": True},
        {"model": "large"},
    ],
    ids=["several-answers", "tools", "logprobs", "a-named-tier"],
)
async def test_what_a_verdict_on_text_says_little_of_is_not_read(
    run_router: Any, make_worker: Any, body: dict[str, Any]
) -> None:
    reads = Reads()
    _, _, table = await two(make_worker)
    async with run_router(table, predictor=Cascading(reads), cascade={}) as (client, _):
        reply = await client.chat(**body)

    assert reply.status in (200, 400)
    assert reads.seen == []


@pytest.mark.parametrize(
    "says", [Verdict(float("nan"), 0.9), Verdict(2.0, 0.9)], ids=["nan", "above-one"]
)
async def test_a_senseless_verdict_sends_the_answer_and_is_counted(
    run_router: Any, make_worker: Any, says: Verdict
) -> None:
    _, large, table = await two(make_worker)
    async with run_router(table, predictor=Cascading(Reads(says)), cascade={}) as (client, _):
        reply = await client.chat()
        state = (await client.get("/admin/state")).json["cascade"]

    assert reply.headers["x-tandem-reason"] == "unverified"
    assert state["outcomes"] == {"failed": 1}
    assert asked(large) == 0


async def test_a_verifier_that_fails_sends_the_answer_and_is_counted(
    run_router: Any, make_worker: Any
) -> None:
    _, large, table = await two(make_worker)
    predictor = Cascading(Reads(fails=RuntimeError("broken")))
    async with run_router(table, predictor=predictor, cascade={}) as (client, _):
        reply = await client.chat()
        state = (await client.get("/admin/state")).json["cascade"]

    assert (reply.status, reply.headers["x-tandem-reason"]) == (200, "unverified")
    assert state["outcomes"] == {"failed": 1}
    assert asked(large) == 0


async def test_a_late_verdict_does_not_count(run_router: Any, make_worker: Any) -> None:
    waits = threading.Event()
    _, _, table = await two(make_worker)
    predictor = Cascading(Reads(BAD, waits=waits))
    async with run_router(table, predictor=predictor, cascade={"deadline_ms": 20}) as (client, _):
        reply = await client.chat()
        state = (await client.get("/admin/state")).json["cascade"]
        waits.set()

    assert reply.headers["x-tandem-reason"] == "unverified"
    assert state["outcomes"] == {"late": 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_escalation_that_fails_sends_the_small_answer_which_is_paid_once(
    run_router: Any, make_worker: Any, stream: bool
) -> None:
    small, large, table = await two(make_worker)
    refusal = (500, {}, b'{"error": {"message": "no"}}')
    large.refuse.extend([refusal] * 20)
    async with run_router(table, predictor=Cascading(Reads(BAD)), cascade=STREAMS) as (client, _):
        reply = await client.chat(stream=stream)
        record = await the_record(client)
        costs = await of_tiers(client, "tandem_cost_usd_total")
        tokens = await of_tiers(client, "tandem_output_tokens_total")

    assert reply.status == 200
    assert reply.headers["x-tandem-tier"] == "small"
    assert reply.headers["x-tandem-reason"] == "unverified"
    assert asked(small) == 1
    small_usd = (5 * 1.0 + 8 * 2.0) / 1e6
    assert record["cost_usd"] == pytest.approx(small_usd)
    assert (record["tier"], record["output_tokens"]) == ("small", 8)
    assert costs["small"] == pytest.approx(small_usd)
    assert tokens["small"] == 8
    assert float(reply.headers["x-tandem-cost-usd"]) == pytest.approx(small_usd)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_escalation_is_a_label_of_both_answers_and_asks_nobody_again(
    run_router: Any, make_worker: Any, stream: bool
) -> None:
    small, large, table = await two(make_worker)
    learning = {"shadow_share": 0.01, "judge": {"type": "Exact"}}
    predictor = Cascading(Reads(BAD))
    async with run_router(table, predictor=predictor, cascade=STREAMS, learning=learning) as (
        client,
        app,
    ):
        await client.chat(stream=stream)
        await app.services.learner.idle()
        (label,) = await app.services.store.labels()

    assert (label.source, label.tier, label.probability) == ("cascade", "large", 1.0)
    assert label.quality == {"small": 1.0, "large": 1.0}  # the fakes say the same of one seed
    assert (asked(small), asked(large)) == (1, 1)


async def test_an_escalation_that_nobody_can_pay_sends_the_small_answer(
    run_router: Any, make_worker: Any
) -> None:
    _, large, table = await two(make_worker)
    external = [
        {**TIERS[0], "usd_per_1m_output_tokens": 0.0, "usd_per_1m_input_tokens": 0.0},
        {**TIERS[1], "usd_per_1m_output_tokens": 1e6, "kind": "external", "url": large.url + "/v1"},
    ]
    del table["large"]
    async with run_router(
        table,
        predictor=Cascading(Reads(BAD)),
        cascade={},
        tiers=external,
        budget={"usd_per_hour": 1.0},
    ) as (client, _):
        reply = await client.chat(max_tokens=8)

    assert reply.headers["x-tandem-tier"] == "small"
    assert asked(large) == 0


async def test_a_slow_small_tier_is_not_read_where_the_slo_leaves_no_time(
    run_router: Any, make_worker: Any
) -> None:
    reads = Reads(GOOD)
    _, _, table = await two(make_worker)
    predictor = Cascading(reads)
    async with run_router(table, predictor=predictor, cascade={}, slo={"ttft_ms": 500}) as (
        client,
        app,
    ):
        unknown = await client.chat()
        latency, now = app.services.routing.latency["small"], app.services.clock()
        latency.last_whole.saw(0.2, now)
        quick = await client.chat()
        for _ in range(20):
            latency.last_whole.saw(0.7, app.services.clock())
        slow = await client.chat()

    reasons = [reply.headers["x-tandem-reason"] for reply in (unknown, quick, slow)]
    assert reasons == ["gain", "verified", "gain"]


async def test_a_small_tier_that_fails_leaves_its_place_to_the_large_one(
    run_router: Any, make_worker: Any
) -> None:
    reads = Reads(GOOD)
    small, large, table = await two(make_worker)
    small.refuse.extend([(500, {}, b'{"error": {"message": "no"}}')] * 20)
    async with run_router(table, predictor=Cascading(reads), cascade=STREAMS) as (client, _):
        reply = await client.chat(stream=True)

    assert reply.status == 200
    assert (reply.headers["x-tandem-tier"], reply.headers["x-tandem-reason"]) == (
        "large",
        "unavailable",
    )
    assert reads.seen == []
    assert asked(large) == 1


async def test_a_client_that_leaves_while_its_answer_is_read_frees_everything(
    run_router: Any, make_worker: Any
) -> None:
    waits = threading.Event()
    reads = Reads(GOOD, waits=waits)
    _, _, table = await two(make_worker)
    async with run_router(table, predictor=Cascading(reads), cascade={"deadline_ms": 4000}) as (
        client,
        app,
    ):
        request = asyncio.create_task(client.chat())
        assert await asyncio.to_thread(reads.began.wait, 5.0)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        waits.set()

        assert app.services.ledger.num_inflight == 0
        assert app.picker.num_inflight("small") == 0


async def test_what_the_verifier_said_is_the_quality_that_is_expected(
    run_router: Any, make_worker: Any
) -> None:
    _, _, table = await two(make_worker)
    async with run_router(table, predictor=Cascading(Reads(GOOD)), cascade={}) as (client, app):
        await client.chat()

        ratio = app.services.steering.expected_quality_ratio

    assert ratio == pytest.approx(0.9 / 0.95)


@pytest.mark.parametrize("kind", ["chat", "completions"])
async def test_vllm_tells_how_sure_it_was_and_the_client_does_not_see_it(
    run_router: Any, make_worker: Any, kind: str
) -> None:
    small = await FakeVLLM(served_model=TIERS[0]["served_model"]).start()
    table = {"small": {"unified": [small]}, "large": {"decode": [await make_worker()]}}
    reads = Reads(GOOD)
    tiers = [{**TIERS[0], "engine": "VLLM"}, TIERS[1]]
    try:
        async with run_router(table, predictor=Cascading(reads), tiers=tiers, cascade={}) as (
            client,
            app,
        ):
            await eventually(lambda: all(worker.load for worker in app.picker.workers))
            reply = await (
                client.chat()
                if kind == "chat"
                else client.request("POST", "/v1/completions", {"model": "chat", "prompt": "hello"})
            )
    finally:
        await small.stop()

    assert reply.headers["x-tandem-reason"] == "verified"
    ((_, _, tokens),) = reads.seen
    assert tokens is not None
    assert (tokens.num_tokens, tokens.mean_logprob) == (12, -0.25)
    assert reply.json["choices"][0]["logprobs"] is None
    sent = [seen.json for seen in small.seen if seen.path.startswith("/v1/c") and seen.body]
    assert sent[-1]["logprobs"] == (True if kind == "chat" else 1)
