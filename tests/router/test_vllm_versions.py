"""What vLLM 0.9, 0.10 and 0.32 really answered, played by the fake, under the router."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tandem_router.engines.vllm import VLLMReader
from tandem_router.testing.fake_vllm import VERSIONS, next_ids, prompt_ids, recording
from tandem_router.testing.fake_worker import token_text
from tandem_router.testing.two_tiers import TIERS
from vllm_kit import asker

TWO_TIERS = [TIERS[0], {**TIERS[1], "engine": "VLLM"}]
WORDS = [{"role": "user", "content": "How are you?"}]
LARGE = {"model": "large", "messages": WORDS, "temperature": 0, "max_tokens": 12}
USAGE = {"include_usage": True}
WITH_IDS = tuple(v for v in VERSIONS if "return_token_ids" in recording(v)["chat_fields"])
# Questions of the recording that the fake answers with a reply of its own making.
PLAYED = {
    "version": ("/version", None),
    "models": ("/v1/models", None),
    "chat": ("/v1/chat/completions", {"messages": WORDS, "max_tokens": 4}),
    "chat stream": (
        "/v1/chat/completions",
        {"messages": WORDS, "max_tokens": 4, "stream": True, "stream_options": USAGE},
    ),
    "chat stream with ids": (
        "/v1/chat/completions",
        {
            "messages": WORDS,
            "max_tokens": 4,
            "stream": True,
            "stream_options": USAGE,
            "return_token_ids": True,
        },
    ),
    "text": ("/v1/completions", {"prompt": "a", "max_tokens": 4}),
    "text stream with ids": (
        "/v1/completions",
        {
            "prompt": [20, 21, 12],
            "max_tokens": 4,
            "stream": True,
            "stream_options": USAGE,
            "return_token_ids": True,
        },
    ),
    "unknown model": ("/v1/chat/completions", {"model": "no-such-model", "messages": WORDS}),
    "tokenize": ("/tokenize", {"prompt": "a"}),
}


def shape(value: Any) -> Any:
    """Keys in their order and types; of a list the shapes that occur in it."""
    if isinstance(value, dict):
        return [[name, shape(each)] for name, each in value.items()]
    if isinstance(value, list):
        return sorted({json.dumps(shape(each)) for each in value})
    return type(value).__name__


def events(text: str) -> list[Any]:
    words = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [word if word == "[DONE]" else json.loads(word) for word in words]


@pytest.mark.parametrize("version", VERSIONS)
async def test_the_fake_answers_in_the_shapes_of_the_recorded_server(
    make_vllm: Callable[..., Any], version: str
) -> None:
    server = await make_vllm(plays=version, revision="abc")
    differing = []

    async with httpx.AsyncClient(base_url=server.url) as client:
        for name, (path, body) in PLAYED.items():
            reply = await (
                client.get(path)
                if body is None
                else client.post(path, json={"model": "large-model", **body})
            )
            told = recording(version)["replies"][name]
            said = events(reply.text) if "events" in told else reply.json()
            wanted = told.get("events", told.get("body"))
            if name == "models":
                wanted = {**wanted, "data": [e for e in wanted["data"] if not e["parent"]]}
            if reply.status_code != told["status"] or shape(said) != shape(wanted):
                differing.append((name, shape(said), shape(wanted)))
        named = {line.split("{")[0] for line in (await client.get("/metrics")).text.splitlines()}

    assert differing == []
    assert named >= set(recording(version)["metrics"])


@pytest.mark.parametrize("version", VERSIONS)
async def test_load_and_identity_of_every_version_are_read_whole(
    make_vllm: Callable[..., Any], version: str
) -> None:
    server = await make_vllm(plays=version, running=3.0, waiting=2.0, kv_use=0.25, revision="abc")

    report = await VLLMReader("large-model", "unified").read(asker(server))

    assert (report["num_running"], report["num_waiting"]) == (3, 2)
    assert report["kv_blocks"]["used"] == 50
    assert (report["revision"], report["max_model_len"]) == ("abc", 512)
    assert report["engine"] == f"vLLM {version}"
    assert (report["ready"], report["capabilities"]["generation"]) == (True, True)
    # 0.9 and 0.10 list /v1/embeddings for a model that makes text.
    assert report["capabilities"]["embeddings"] is False
    without_ids = [note for note in report["notes"] if "gives no token ids" in note]
    assert len(without_ids) == len(report["notes"]) == (version not in WITH_IDS)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_stream_of_a_killed_server_goes_on_where_the_version_gives_token_ids(
    run_router: Callable[..., Any],
    make_vllm: Callable[..., Any],
    reported: Callable[..., Any],
    version: str,
) -> None:
    cuts: list[int | None] = [6]  # whoever is asked first dies
    servers = [await make_vllm(plays=version, cut_after=cuts) for _ in range(2)]

    async with run_router({"large": {"unified": servers}}, tiers=TWO_TIERS) as (client, app):
        await reported(app)
        reply = await client.chat(**LARGE, stream=True, stream_options=USAGE)

    whole = "".join(map(token_text, next_ids(prompt_ids({"messages": WORDS}), 12)))
    assert b"token_ids" not in reply.body
    if version in WITH_IDS:
        assert reply.text() == whole
        assert reply.chunks[-1]["usage"]["completion_tokens"] == 12
    else:
        assert b"carries no token ids" in reply.body
        assert len(servers[0].orders) + len(servers[1].orders) == 1


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_whole_answer_and_a_refusal_reach_the_client_in_openais_form(
    run_router: Callable[..., Any],
    make_vllm: Callable[..., Any],
    reported: Callable[..., Any],
    version: str,
) -> None:
    server = await make_vllm(plays=version)
    too_long = recording(version)["replies"]["too many tokens"]

    async with run_router({"large": {"unified": [server]}}, tiers=TWO_TIERS) as (client, app):
        await reported(app)
        answer = await client.chat(**LARGE)
        server.refuse = [(400, {}, json.dumps(too_long["body"]).encode())]
        refused = await client.chat(**LARGE)

    assert answer.json["choices"][0]["message"]["role"] == "assistant"
    assert answer.json["usage"]["completion_tokens"] == 12
    said = too_long["body"].get("error", too_long["body"])
    assert (refused.status, refused.json["error"]["message"]) == (400, said["message"])


async def test_a_version_that_renames_what_is_read_is_used_and_says_what_is_lost(
    make_vllm: Callable[..., Any],
) -> None:
    renamed = ("vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    server = await make_vllm(plays="0.32.0", version="0.99.0", running=1.0, without_metrics=renamed)

    report = await VLLMReader("large-model", "unified").read(asker(server))

    assert (report["ready"], report["num_running"], report["num_waiting"]) == (True, 1, 0)
    assert report["notes"] == [
        "its /metrics lack vllm:num_requests_waiting, vllm:kv_cache_usage_perc: its load is known "
        "in part"
    ]


async def test_counters_that_jump_back_are_a_restart_and_no_traffic(
    make_vllm: Callable[..., Any],
) -> None:
    server = await make_vllm(plays="0.32.0", tokens_made=50_000.0, running=1.0, revision="old")
    name = "vllm:inter_token_latency_seconds"
    server.more_metrics = {f"{name}_count": 100.0, f"{name}_sum": 2.0}
    reader, ask = VLLMReader("large-model", "unified", probe=False), asker(server)
    await reader.read(ask)
    server.more_metrics = {f"{name}_count": 200.0, f"{name}_sum": 4.0}
    before = await reader.read(ask)

    server.tokens_made, server.revision = 3.0, "new"
    server.more_metrics = {f"{name}_count": 1.0, f"{name}_sum": 900.0}
    after = await reader.read(ask)

    assert (before["step_time_s"], before["revision"]) == (0.02, "old")
    # What it was before is asked again, and the fit has learnt nothing from the jump.
    assert (after["step_time_s"], after["revision"]) == (0.02, "new")
    assert after["profile"] == before["profile"]


async def test_images_and_embeddings_go_only_to_servers_that_take_them(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any], reported: Callable[..., Any]
) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    seeing = [{"role": "user", "content": [picture]}]
    replies = []

    for options in ({"images": True}, {}, {"embeds": True}):
        server = await make_vllm(plays="0.32.0", **options)
        async with run_router({"large": {"unified": [server]}}, tiers=TWO_TIERS) as (client, app):
            await reported(app)
            embed = {"model": "chat", "input": "a"}
            replies.append(
                (
                    (await client.chat(**{**LARGE, "messages": seeing})).status,
                    (await client.request("POST", "/v1/embeddings", embed)).status,
                )
            )

    assert replies[0] == (200, 400)
    assert replies[1] == (400, 400)
    assert replies[2][1] == 200


async def test_log_probabilities_and_what_is_vllms_own_pass_through(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any], reported: Callable[..., Any]
) -> None:
    server = await make_vllm(plays="0.32.0")
    own = {"logprobs": True, "top_logprobs": 2, "min_p": 0.1, "bad_words": ["x"]}

    async with run_router({"large": {"unified": [server]}}, tiers=TWO_TIERS) as (client, app):
        await reported(app)
        reply = await client.chat(**LARGE, **own)

    assert reply.status == 200
    assert server.orders[-1].json.items() >= own.items()


async def test_a_client_that_leaves_aborts_its_stream_at_the_server(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any], reported: Callable[..., Any]
) -> None:
    server = await make_vllm(plays="0.32.0", pause_s=0.05)

    async with run_router({"large": {"unified": [server]}}, tiers=TWO_TIERS) as (client, app):
        await reported(app)
        await client.chat(**{**LARGE, "max_tokens": 200}, stream=True, leave_after=3)
        async with asyncio.timeout(5):  # all of its answer would take twice as long
            await server.left.wait()

    assert server.num_disconnects == 1
