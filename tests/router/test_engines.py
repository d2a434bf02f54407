"""A tier whose workers are vLLM, or any OpenAI-compatible server, under the router."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem_router.engines import Told, engine_of
from tandem_router.engines.vllm import HUNG_AFTER_S, VLLMReader
from tandem_router.engines.vllm_metrics import Sample, StepProfile
from tandem_router.openai.body import Bodies
from tandem_router.openai.request import parse_inference
from tandem_router.testing.fake_vllm import next_ids, prompt_ids
from tandem_router.testing.fake_worker import token_text
from tandem_router.testing.two_tiers import TIERS
from vllm_kit import asker

ROOT = Path(__file__).resolve().parents[2]
CHAT = {"messages": [{"role": "user", "content": "How are you?"}], "temperature": 0}
LARGE = {"model": "large", **CHAT}


def tiers(engine: str = "VLLM", **more: Any) -> list[dict[str, Any]]:
    return [TIERS[0], {**TIERS[1], "engine": engine, **more}]


def whole_text(body: dict[str, Any], num: int = 12) -> str:
    return "".join(map(token_text, next_ids(prompt_ids(body), num)))


async def known(app: Any, count: int) -> None:
    """Until the load of so many workers has been read."""
    async with asyncio.timeout(5):
        while sum(worker.load is not None for worker in app.picker.workers) < count:
            app.services.workers_changed.clear()
            await app.services.workers_changed.wait()


# -- going on -----------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(2, 13))
async def test_a_stream_of_a_dead_server_goes_on_from_its_ids(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any], cut: int
) -> None:
    cuts: list[int | None] = [cut]  # whoever is asked first dies
    one, two = await make_vllm(cut_after=cuts), await make_vllm(cut_after=cuts)

    async with run_router({"large": {"unified": [one, two]}}, tiers=tiers()) as (client, app):
        await known(app, 2)
        reply = await client.chat(
            **LARGE, stream=True, stream_options={"include_usage": True}, max_tokens=12
        )

    assert reply.text() == whole_text(CHAT)
    assert b"token_ids" not in reply.body
    chunks = [c for c in reply.chunks if c.get("choices")]
    assert len({(c["id"], c["created"], c["object"]) for c in chunks}) == 1
    usage = next(c["usage"] for c in reply.chunks if c.get("usage"))
    assert usage["completion_tokens"] == 12
    assert usage["prompt_tokens"] == len(prompt_ids(CHAT))


async def test_a_client_that_asks_for_ids_gets_them(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any]
) -> None:
    server = await make_vllm()

    async with run_router({"large": {"unified": [server]}}, tiers=tiers()) as (client, _):
        reply = await client.chat(**LARGE, stream=True, return_token_ids=True)

    assert b'"prompt_token_ids":[' in reply.body


async def test_what_hangs_on_more_than_ids_is_made_again_and_not_said_twice(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any]
) -> None:
    cuts: list[int | None] = [6]
    one, two = await make_vllm(cut_after=cuts), await make_vllm(cut_after=cuts)
    asked = {**CHAT, "response_format": {"type": "json_object"}}

    async with run_router({"large": {"unified": [one, two]}}, tiers=tiers()) as (client, app):
        await known(app, 2)
        reply = await client.chat(model="large", stream=True, **asked)

    orders = [*one.orders, *two.orders]
    assert all(order.path == "/v1/chat/completions" for order in orders)
    assert reply.text() == whole_text(CHAT)


async def test_an_older_server_without_ids_ends_its_stream_with_an_error(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any]
) -> None:
    one = await make_vllm(cut_after=[4], gives_ids=False)
    two = await make_vllm(cut_after=[4], gives_ids=False)

    async with run_router({"large": {"unified": [one, two]}}, tiers=tiers()) as (client, _):
        reply = await client.chat(**LARGE, stream=True)

    assert b"carries no token ids" in reply.body
    assert len(one.orders) + len(two.orders) == 1


async def test_an_answer_drawn_at_random_is_continued_and_counted_as_such(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any]
) -> None:
    cuts: list[int | None] = [6]
    one, two = await make_vllm(cut_after=cuts), await make_vllm(cut_after=cuts)
    body = {"model": "large", "messages": CHAT["messages"], "temperature": 0.7}

    async with run_router({"large": {"unified": [one, two]}}, tiers=tiers()) as (client, app):
        reply = await client.chat(**body, stream=True)
        counted = app.services.metrics.render().decode()

    assert b"[DONE]" in reply.body
    assert 'tandem_resumptions_total{kind="continued",tier="large"} 1.0' in counted


# -- what is asked ------------------------------------------------------------------------


async def test_the_server_is_asked_for_its_own_model_and_gets_no_token_of_ours(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any]
) -> None:
    server = await make_vllm()

    async with run_router({"large": {"unified": [server]}}, tiers=tiers(), peer_token="secret") as (
        client,
        _,
    ):
        reply = await client.chat(**LARGE, top_k=3)

    assert reply.json["choices"][0]["message"]["content"] == whole_text(CHAT)
    order = server.orders[-1]
    assert order.json["model"] == "large-model"
    assert order.json["top_k"] == 3
    assert not any("secret" in value for seen in server.seen for value in seen.headers.values())


def test_a_queue_by_priority_is_given_length_or_deadline(
    make_config: Callable[..., Any],
) -> None:
    request = parse_inference("chat", json.dumps(LARGE).encode(), Bodies(make_config().limits))

    def priority(**told: Any) -> Any:
        known = Told("r", 100, 1, "m", **told)
        return engine_of("VLLM").fields(request, request.fields, known).get("priority")

    assert priority() is None
    assert priority(order="Length", expected_tokens=40.2) == 40
    assert priority(order="Deadline", deadline_ms=500) == 100_500
    assert priority(order="Deadline", deadline_ms=500) < priority(order="Deadline")
    assert priority(order="Length", expected_tokens=9.0, turn=-1) < 0


def test_in_the_order_of_arrival_only_a_turn_sets_apart(make_config: Callable[..., Any]) -> None:
    request = parse_inference("chat", json.dumps(LARGE).encode(), Bodies(make_config().limits))
    first, flood = (
        engine_of("VLLM").fields(
            request, request.fields, Told("r", 100, 1, "m", order="Arrival", turn=turn)
        )
        for turn in (None, 2)
    )

    assert "priority" not in first  # which is 0 there
    assert flood["priority"] > 0


@pytest.mark.parametrize("engine_order", ["None", "Deadline"])
async def test_a_tiers_engine_order_says_whether_its_server_is_given_priorities(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any], engine_order: str
) -> None:
    server = await make_vllm()

    async with run_router(
        {"large": {"unified": [server]}}, tiers=tiers(engine_order=engine_order)
    ) as (client, app):
        await known(app, 1)
        await client.chat(**LARGE, headers={"x-tandem-ttft-slo-ms": "500"})

    assert ("priority" in server.orders[-1].json) == (engine_order == "Deadline")


def test_our_workers_are_told_the_predicted_length_of_an_answer() -> None:
    def told(expected: float | None) -> dict[bytes, bytes]:
        known = Told("r", 100, 1, "m", expected_tokens=expected)
        return dict(engine_of("Tandem").headers(known, stream=False))

    assert told(81.6)[b"x-tandem-expected-tokens"] == b"82"
    assert told(0.2)[b"x-tandem-expected-tokens"] == b"1"
    assert b"x-tandem-expected-tokens" not in told(None)


async def test_a_split_pool_hands_the_prefill_servers_parameters_to_the_decode_server(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any]
) -> None:
    handed = {"do_remote_prefill": True, "remote_block_ids": [1], "remote_engine_id": "e"}
    prefill, decode = await make_vllm(kv_params=handed), await make_vllm()
    table = {"large": {"prefill": [prefill], "decode": [decode]}}

    async with run_router(table, tiers=tiers()) as (client, app):
        await known(app, 2)
        reply = await client.chat(**LARGE, stream=True)
        await prefill.stop()
        alone = await client.chat(**LARGE)

    order = prefill.orders[0].json
    assert (order["max_tokens"], order["stream"]) == (1, False)
    assert order["kv_transfer_params"]["do_remote_decode"] is True
    assert decode.orders[0].json["kv_transfer_params"] == handed
    assert reply.text() == whole_text(CHAT)
    # A lost prefill server costs one prefill.
    assert alone.status == 200
    assert "kv_transfer_params" not in decode.orders[1].json


@pytest.mark.parametrize("arrives", [True, False])
async def test_the_link_test_of_two_servers_counts_what_arrived(
    make_vllm: Callable[..., Any], arrives: bool
) -> None:
    handed = {"do_remote_prefill": True, "remote_block_ids": [1]}
    prefill = await make_vllm(kv_params=handed)
    decode = await make_vllm(takes_blocks=arrives)

    result = await engine_of("VLLM").test_handover("large-model", asker(prefill), asker(decode))
    again = await engine_of("VLLM").test_handover("large-model", asker(prefill), asker(decode))
    prefill.served_model = "other"
    refused = await engine_of("VLLM").test_handover("large-model", asker(prefill), asker(decode))
    prefill.served_model = "large-model"
    without = await engine_of("VLLM").test_handover("large-model", asker(decode), asker(prefill))

    assert result is not None
    assert result[0] is arrives
    # What is in the decode server's cache by now is not what is asked for.
    assert again == result
    assert refused == (False, "the prefill server answered 404: The model does not exist.")
    assert without == (
        False,
        "the prefill worker's reply has no kv_transfer_params; is NixlConnector in its image?",
    )


async def test_tools_go_only_where_the_server_takes_them(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any]
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    able, unable = await make_vllm(tools=True), await make_vllm()
    answers = []

    for server in (able, unable):
        async with run_router({"large": {"unified": [server]}}, tiers=tiers()) as (client, app):
            await known(app, 1)
            answers.append(await client.chat(**LARGE, tools=[tool]))

    assert [reply.status for reply in answers] == [200, 400]
    assert "lacks tools" in answers[1].json["error"]["message"]


async def test_a_refusal_about_the_request_is_the_clients_to_read(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any]
) -> None:
    error = {"message": "max_tokens=9 is too large", "type": "BadRequestError", "code": 400}
    server = await make_vllm(refuse=[(400, {}, json.dumps({"error": error}).encode())])

    async with run_router({"large": {"unified": [server]}}, tiers=tiers()) as (client, _):
        reply = await client.chat(**LARGE)

    assert (reply.status, reply.json["error"]["message"]) == (400, error["message"])


async def test_any_openai_server_serves_a_tier(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any]
) -> None:
    server = await make_vllm(without_metrics=None)

    async with run_router({"large": {"unified": [server]}}, tiers=tiers("OpenAI")) as (client, app):
        await known(app, 1)
        reply = await client.chat(**LARGE, stream=True)
        capabilities = app.picker.capabilities("large")

    assert reply.text() == whole_text(CHAT)
    assert "return_token_ids" not in server.orders[-1].json
    assert capabilities.tools


# -- what is read -------------------------------------------------------------------------


async def test_metrics_read_as_a_load_report(make_vllm: Callable[..., Any]) -> None:
    server = await make_vllm(running=3.0, waiting=2.0, kv_use=0.25, revision="abc")

    report = await VLLMReader("large-model", "unified").read(asker(server))

    assert (report["num_running"], report["num_waiting"]) == (3, 2)
    assert report["pending_prefill_tokens"] == 80
    assert report["kv_blocks"] == {"total": 200, "free": 150, "cached": 0, "used": 50}
    assert (report["block_size"], report["max_model_len"]) == (16, 512)
    assert (report["revision"], report["ready"], report["engine"]) == ("abc", True, "vLLM 0.32.0")
    assert report["prefix_hit_rate"] == 0.25


async def test_metrics_that_vanish_leave_a_usable_worker_of_unknown_load(
    make_vllm: Callable[..., Any],
) -> None:
    server = await make_vllm(running=3.0)
    reader, ask = VLLMReader("large-model", "unified"), asker(server)
    await reader.read(ask)
    server.without_metrics = None

    report = await reader.read(ask)

    assert (report["ready"], report["num_running"]) == (True, 0)
    assert "its load is not known" in report["notes"][-1]


async def test_a_server_of_another_model_is_not_used_and_says_why(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any]
) -> None:
    server = await make_vllm()
    server.served_model = "other"

    report = await VLLMReader("large-model", "unified").read(asker(server))
    async with run_router({"large": {"unified": [server]}}, tiers=tiers()) as (client, app):
        await known(app, 1)
        reply = await client.chat(**LARGE)

    assert report["ready"] is False
    assert "serves other and not 'large-model'" in report["problem"]
    assert reply.status == 503


async def test_an_engine_that_makes_no_token_behind_a_healthy_server_hangs(
    make_vllm: Callable[..., Any],
) -> None:
    now = [0.0]
    server = await make_vllm(running=2.0, tokens_made=50.0)
    reader, ask = VLLMReader("large-model", "unified", lambda: now[0]), asker(server)
    said = [(await reader.read(ask)).get("problem")]

    now[0] += HUNG_AFTER_S + 1
    said.append((await reader.read(ask)).get("problem"))
    server.tokens_made = 51.0
    said.append((await reader.read(ask)).get("problem"))

    assert said[0] is None
    assert "hangs behind its server" in said[1]
    assert said[2] is None


async def test_an_older_version_says_that_streams_do_not_survive(
    make_vllm: Callable[..., Any],
) -> None:
    server = await make_vllm(plays="0.9.2")

    report = await VLLMReader("large-model", "unified").read(asker(server))

    assert "gives no token ids" in report["notes"][0]


def test_a_step_profile_is_fitted_from_what_histograms_grew_by() -> None:
    profile = StepProfile()
    sums = [0.0, 0.0, 0.0, 0.0]
    for batch, length in [(1, 100), (4, 300), (16, 50), (8, 200), (2, 400)]:
        sums = [a + b for a, b in zip(sums, (10, 10 * (0.01 + 0.002 * batch), 1, 0), strict=True)]
        sums[3] += 0.05 + 0.001 * length
        total = sums[2] and length
        text = (
            f"vllm:num_requests_running {batch}\n"
            f"vllm:inter_token_latency_seconds_count {sums[0]}\n"
            f"vllm:inter_token_latency_seconds_sum {sums[1]}\n"
            f"vllm:request_prefill_time_seconds_count {sums[2]}\n"
            f"vllm:request_prefill_time_seconds_sum {sums[3]}\n"
            f"vllm:request_prompt_tokens_count {sums[2]}\n"
            f"vllm:request_prompt_tokens_sum {total}\n"
        )
        profile.add(Sample.parse(text))

    report = profile.report()

    assert report is not None
    decode = report["decode"]
    assert decode is not None
    assert decode[0] > 0
    assert decode[2] > 0


@pytest.mark.parametrize("text", ["", "x", "vllm:num_requests_running NaN", "vllm:"])
def test_no_text_of_metrics_breaks_the_reading(text: str) -> None:
    assert Sample.parse(text).running >= 0


# -- the seam -----------------------------------------------------------------------------


def test_the_least_adapter_costs_less_than_a_hundred_lines() -> None:
    """Both halves together: how it is asked and read, and what runs in the pod."""
    halves = (
        "router/tandem_router/engines/openai.py",
        "operator/tandem_operator/plan/engines/openai.py",
    )

    lines = [line for half in halves for line in (ROOT / half).read_text().splitlines()]

    assert len([line for line in lines if line.strip()]) < 100


def test_nothing_but_the_adapters_knows_an_engines_name() -> None:
    """A second place that asks which engine it is would be a second seam."""
    kept = ("router/tandem_router/engines", "operator/tandem_operator/plan/engines")
    declared = (
        "router/tandem_router/config/tiers.py",
        "operator/tandem_operator/resources/model.py",
        "operator/tandem_operator/resources/rules/engines.py",
        "operator/tandem_operator/cli/init.py",
        "router/tandem_router/testing",
    )
    found = [
        str(path.relative_to(ROOT))
        for package in ("router/tandem_router", "operator/tandem_operator")
        for path in sorted((ROOT / package).rglob("*.py"))
        if not str(path.relative_to(ROOT)).startswith((*kept, *declared))
        and any(f'"{name}"' in path.read_text() for name in ("VLLM", "OpenAI"))
    ]

    assert found == []
