"""Bytes as clients and providers really send them: halves of characters, line ends, encodings."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from tandem_router.api.inference import POSTS
from tandem_router.testing.fake_provider import WORDS, FakeProvider
from tandem_router.testing.two_tiers import TIERS

CHAT = {"model": "large", "messages": [{"role": "user", "content": "a"}]}
ADMIN = {"/admin/set-points": "PUT", "/admin/keys": "POST", "/admin/settings": "PUT"}
JSON = {"content-type": "application/json"}
HALF = rb"""{"model": "chat", "max_tokens": 5, "request_id": "\ud800", "prompt": "\ud800x",
 "input": "\udfff", "messages": [{"role": "user", "content": "\ud800"}], "tenant": "\ud800"}"""
HUGE = rb"""{"model": "chat", "max_tokens": 5, "temperature": 1e999, "prompt": "a", "input": "a",
 "messages": [{"role": "user", "content": "a"}], "gain_threshold": 1e999, "tenant": "a"}"""


@pytest.fixture
async def provider() -> Any:
    server = await FakeProvider().start()
    yield server
    await server.stop()


def tiers(provider: Any) -> list[dict[str, Any]]:
    return [TIERS[0], {**TIERS[1], "kind": "external", "url": f"{provider.url}/v1"}]


@pytest.mark.parametrize("path", sorted(POSTS | ADMIN.keys()))
@pytest.mark.parametrize("body", [HALF, HUGE], ids=["half a character", "1e999"])
async def test_what_no_string_or_number_is_gets_a_400_on_every_route(
    run_router: Any, path: str, body: bytes
) -> None:
    async with run_router({}) as (client, _):
        reply = await client.request(ADMIN.get(path, "POST"), path, body, JSON)

    assert reply.status == 400
    assert reply.headers["content-type"] == "application/json"
    assert "not valid JSON" in reply.error["message"]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
async def test_a_stream_is_read_whichever_line_end_its_provider_uses(
    run_router: Any, provider: Any, line_end: bytes
) -> None:
    provider.line_end = line_end

    async with run_router({}, tiers=tiers(provider)) as (client, _):
        reply = await client.chat(model="large", stream=True)
        said = await client.request(
            "POST", "/v1/messages", {**CHAT, "max_tokens": 9, "stream": True}
        )

    assert reply.text() == "".join(WORDS)
    assert b"message_stop" in said.body


async def test_a_packed_reply_is_unpacked_and_a_packed_stream_is_no_answer(
    run_router: Any, provider: Any
) -> None:
    """What reaches a client is what its headers say, whatever the provider does."""
    provider.packed = True

    async with run_router({}, tiers=tiers(provider)) as (client, _):
        whole = await client.chat(model="large")
        stream = await client.chat(model="large", stream=True)

    assert whole.json["choices"][0]["message"]["content"] == "".join(WORDS)
    assert "content-encoding" not in whole.headers
    assert (stream.status, stream.error["code"]) == (502, "tier_failed")


async def test_a_body_that_is_packed_twice_is_refused_however_it_says_so(run_router: Any) -> None:
    body = gzip.compress(gzip.compress(json.dumps(CHAT).encode()))

    async with run_router({}) as (client, app):
        listed = await client.request(
            "POST", "/v1/chat/completions", body, {"content-encoding": "gzip, gzip"}
        )
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        twice = [(b"content-encoding", b"gzip")] * 2
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions"}
        await app({**scope, "headers": twice, "client": None}, receive, send)

    assert listed.status == 415
    assert sent[0]["status"] == 415
