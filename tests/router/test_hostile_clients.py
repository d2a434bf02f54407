"""What one client may hold of a router: its connections, headers, bodies, sequences and place."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from eventually import eventually
from tandem_router.api.api_keys import key_hash
from tandem_router.api.app import RouterApp
from tandem_router.api.origin import loopback_names
from tandem_router.api.request_body import read_body
from tandem_router.config.limits import LimitsConfig
from tandem_router.errors import ApiError
from tandem_router.http.server import Listener, ServerLimits
from tandem_router.limits.bodies import PER_BODY_BYTES, HeldBodies
from tandem_router.proxy.upstream_request import salted
from tandem_router.testing.asgi_client import Client
from tandem_router.testing.two_tiers import both

CHAT = {"model": "large", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@contextlib.asynccontextmanager
async def served(
    app: Any, limits: ServerLimits | None = None, listener: Listener | None = None
) -> AsyncIterator[int]:
    """The port of an ASGI application behind our protocol."""
    listener = listener or Listener(limits or ServerLimits())
    config = uvicorn.Config(
        app, port=0, http=listener.protocol(), lifespan="off", log_config=None, ws="none"
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.ensure_future(server.serve())
    await eventually(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        await task


async def said(port: int, data: bytes) -> bytes:
    """All that the server answers to `data`, until it closes or one reply is whole."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    reply = b""
    async with asyncio.timeout(10):
        while part := await reader.read(65_536):
            reply += part
            head, found, rest = reply.partition(b"\r\n\r\n")
            length = [line for line in head.split(b"\r\n") if line.startswith(b"content-length:")]
            if found and length and len(rest) >= int(length[0][15:]):
                break
    writer.close()
    return reply


def post(body: bytes, *headers: bytes, version: bytes = b"1.1") -> bytes:
    lines = [b"POST /v1/chat/completions HTTP/" + version, b"host: x", *headers]
    return b"\r\n".join([*lines, b"content-length: %d" % len(body), b"", body])


async def test_bytes_that_are_no_request_get_an_openai_error(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router({}) as (_, app), served(app) as port:
        for data, status in (
            (b"\x16\x03\x01 nonsense\r\n\r\n", b"400"),
            (b"GET /health HTTP/1.1\r\n\r\n", b"400"),
            (b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"x" * 40_000, b"431"),
            (b"GET /" + b"x" * 40_000, b"431"),
            (b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"x" * 40_000 + b"\r\n\r\n", b"431"),
            (post(b"{}", b"transfer-encoding: chunked"), b"400"),
        ):
            reply = await said(port, data)

            assert reply.split()[1] == status, (data[:60], reply[:200])
            assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["message"]


async def test_a_slow_header_is_refused_while_it_is_read(run_router: Any) -> None:
    limits = ServerLimits(header_timeout_s=0.05)
    async with run_router({}) as (_, app), served(app, limits) as port:
        reply = await said(port, b"GET /health HTTP/1.1\r\nhost: x\r\na")

    assert reply.startswith(b"HTTP/1.1 408")


async def test_health_lives_when_every_connection_is_taken(run_router: Any) -> None:
    listener = Listener(ServerLimits(max_connections=2))
    async with run_router({}) as (_, app), served(app, listener=listener) as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await eventually(lambda: len(listener.connections) == 2)
        health = await said(port, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        models = await said(port, b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        for _, writer in held:
            writer.close()

    assert health.startswith(b"HTTP/1.1 200")
    assert models.startswith(b"HTTP/1.1 503")
    assert b"too_many_connections" in models


@pytest.mark.parametrize(
    "headers",
    [
        (b"connection: upgrade, http2-settings", b"upgrade: h2c", b"http2-settings: AAMAAABk"),
        (b"content-type: application/json",),
    ],
)
async def test_a_wish_for_http2_is_answered_as_http1_with_its_body(
    run_router: Any, make_worker: Any, headers: tuple[bytes, ...]
) -> None:
    body = json.dumps(CHAT).encode()
    async with run_router(await both(make_worker)) as (_, app), served(app) as port:
        reply = await said(port, post(body, *headers))
        old = await said(port, post(body, *headers[:0], version=b"1.0"))

    for each in (reply, old):
        assert each.startswith(b"HTTP/1.1 200")
        assert b"x-content-type-options: nosniff" in each
        assert json.loads(each.partition(b"\r\n\r\n")[2])["choices"]


async def test_a_packed_body_is_read_within_the_same_bound(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(await both(make_worker)) as (client, _):
        path, packed = "/v1/chat/completions", {"content-encoding": "gzip"}
        good = await client.request("POST", path, gzip.compress(json.dumps(CHAT).encode()), packed)
        bomb = await client.request("POST", path, gzip.compress(b" " * 2**23), packed)
        plain = await client.request("POST", path, b"{}", packed)
        other = await client.request("POST", path, b"{}", {"content-encoding": "br"})

    assert [each.status for each in (good, bomb, plain, other)] == [200, 413, 400, 415]


async def test_pages_of_other_sites_change_nothing(run_router: Any) -> None:
    async with run_router({}) as (client, _):
        foreign = {"origin": "https://evil.example", "host": "localhost:8000"}
        put = await client.request("PUT", "/admin/set-points", {"gain_threshold": 0.5}, foreign)
        form = await client.request(
            "PUT", "/admin/set-points", {"gain_threshold": 0.5}, {"content-type": "text/plain"}
        )
        chat = await client.chat(headers=foreign)
        unnamed = await client.chat(
            headers={"sec-fetch-site": "cross-site", "host": "localhost:8000"}
        )
        half = await client.request("PUT", "/admin/settings", b'{"\\ud800": 1e999}')

    assert [each.status for each in (put, form, chat, unnamed, half)] == [403, 415, 403, 403, 400]


async def test_one_request_may_not_be_many(run_router: Any) -> None:
    async with run_router({}) as (client, app):
        for body, named in (
            ({"prompt": ["x"] * 128, "n": 16}, "sequences"),
            ({"prompt": "x", "logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
            ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ):
            reply = await client.request("POST", "/v1/completions", {"model": "chat", **body})
            assert reply.status == 400
            assert named in reply.error["message"]
        assert app.services.ledger.num_inflight == 0


@pytest.mark.parametrize("own", [{}, {"cache_salt": "mine"}])
def test_prefixes_are_shared_within_a_tenant_only(own: dict[str, str]) -> None:
    fields = {**CHAT, **own}
    body = json.dumps(fields).encode()
    a, again, b = (json.loads(salted(fields, body, tenant)) for tenant in ("a", "a", "b"))

    assert a == again
    assert a["cache_salt"] != b["cache_salt"]
    assert "mine" not in a["cache_salt"]
    assert {**a, "cache_salt": 0} == {**fields, "cache_salt": 0}


def test_bodies_are_counted_by_sender_and_in_all() -> None:
    bodies = HeldBodies(4 * PER_BODY_BYTES, 2 * PER_BODY_BYTES)
    first = bodies.hold("a")
    first.grow(PER_BODY_BYTES)
    with pytest.raises(ApiError) as own:
        bodies.hold("a")
    second = [bodies.hold("b"), bodies.hold("c")]
    with pytest.raises(ApiError) as everybodys:
        bodies.hold("d")
    for each in (first, *second):
        each.release()

    assert (own.value.status, everybodys.value.status) == (429, 503)
    assert bodies.num_bytes == 0
    assert not +bodies.by_sender


async def test_a_body_that_grows_beyond_its_senders_share_is_refused_while_it_is_read() -> None:
    """In pieces, none of which is large, and none of which is the last."""
    bodies = HeldBodies(10 * PER_BODY_BYTES, 4 * PER_BODY_BYTES)
    limits = LimitsConfig(max_body_bytes=100 * PER_BODY_BYTES)
    other = bodies.hold("b")
    other.grow(PER_BODY_BYTES)
    num_pieces = 0

    async def receive() -> dict[str, Any]:
        nonlocal num_pieces
        num_pieces += 1
        return {"type": "http.request", "body": b" " * (PER_BODY_BYTES // 2), "more_body": True}

    held = bodies.hold("a")
    with pytest.raises(ApiError) as refused:
        await read_body({"headers": []}, receive, limits, held)

    assert refused.value.status == 429
    assert num_pieces == 7
    assert bodies.by_sender["a"] == 4 * PER_BODY_BYTES
    held.release()
    other.grow(PER_BODY_BYTES)  # of somebody else nothing is taken
    other.release()
    assert bodies.num_bytes == 0


async def test_a_router_answers_to_its_allowed_hosts_only(run_router: Any) -> None:
    async with run_router({}, access={"allowed_hosts": ["chat.example"]}) as (client, _):
        own = await client.request("GET", "/v1/models", headers={"host": "chat.example:8000"})
        rebound = await client.request("GET", "/v1/models", headers={"host": "evil.example"})

    assert (own.status, rebound.status) == (200, 421)


@pytest.mark.parametrize(
    ("listens_on", "host", "status"),
    [
        ("127.0.0.1", "localhost:8000", 200),
        ("127.0.0.1", "evil.example", 421),
        ("127.0.0.2", "127.0.0.2:8000", 200),
        ("127.0.0.2", "evil.example", 421),
        ("::1", "[::1]:8000", 200),
        ("::1", "evil.example:8000", 421),
        ("localhost", "evil.example", 421),
        ("10.0.0.7", "chat.example", 200),
    ],
)
async def test_a_router_on_a_loopback_address_answers_to_names_of_this_machine_only(
    make_config: Any, tmp_path: Path, listens_on: str, host: str, status: int
) -> None:
    app = RouterApp(
        make_config(), endpoints_path=tmp_path / "e", allowed_hosts=loopback_names([listens_on])
    )

    reply = await Client(app).request("GET", "/v1/models", headers={"host": host})

    app.services.client.close()
    assert reply.status == status


async def test_who_is_above_a_limit_is_told_before_the_body_is_sent(run_router: Any) -> None:
    secret = b"0123456789abcdef"
    tenants = [
        {"name": "acme", "key_hashes": [key_hash(secret, "k")], "requests_per_minute": 1},
    ]
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n"
    head += b"authorization: Bearer k\r\ncontent-length: 100000\r\n\r\n"
    async with run_router({}, tenants=tenants, key_secret=secret) as (_, app):
        app.services.ledger.hold("acme", 0.0)
        async with served(app) as port:
            reply = await said(port, head)

    assert reply.startswith(b"HTTP/1.1 429")
    assert b"100 Continue" not in reply


async def test_a_page_that_cors_origins_name_may_ask(run_router: Any, make_worker: Any) -> None:
    origin = "https://app.example"
    table = await both(make_worker)
    async with run_router(table, access={"cors_origins": [origin]}) as (client, _):
        chat = await client.chat(headers={"origin": origin, "host": "localhost:8000"})

    assert chat.status == 200


async def test_connections_that_say_nothing_are_bounded_by_address(run_router: Any) -> None:
    """The configuration's max_waiting_connections_per_address."""
    listener = Listener(ServerLimits(max_waiting_per_address=2))
    async with run_router({}) as (_, app), served(app, listener=listener) as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await eventually(lambda: len(listener.connections) == 2)
        third = await said(port, b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        for _, writer in held:
            writer.close()

    assert not third.startswith(b"HTTP/1.1 200")


async def test_a_client_that_never_reads_is_dropped() -> None:
    """The configuration's write_timeout_s."""
    num_parts = 64

    async def large(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for left in reversed(range(num_parts)):
            part = {"type": "http.response.body", "body": b"x" * 2**20, "more_body": left > 0}
            await send(part)

    listener = Listener(ServerLimits(write_timeout_s=0.1))
    async with served(large, listener=listener) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        await eventually(lambda: listener.connections)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await eventually(lambda: not listener.connections)
        num_bytes = 0
        with contextlib.suppress(ConnectionResetError):
            while part := await reader.read(2**20):
                num_bytes += len(part)
        writer.close()

    assert num_bytes < num_parts * 2**20


async def test_a_tenant_may_not_jump_the_queue(run_router: Any, make_worker: Any) -> None:
    """`highest_priority` bounds what `x-tandem-priority` may say."""
    secret = b"0123456789abcdef"
    table = await both(make_worker)
    tenants = [
        {"name": "usual", "key_hashes": [key_hash(secret, "k1")]},
        {"name": "urgent", "key_hashes": [key_hash(secret, "k2")], "highest_priority": -10},
    ]
    async with run_router(table, tenants=tenants, key_secret=secret) as (client, _):
        answers = [
            await client.chat(
                headers={"authorization": f"Bearer {key}", "x-tandem-priority": priority}
            )
            for key, priority in (("k1", "-5"), ("k1", "5"), ("k2", "-10"), ("k2", "-11"))
        ]

    assert [answer.status for answer in answers] == [400, 200, 200, 400]


async def test_a_page_of_a_named_origin_asks_first_and_reads_the_reply(
    run_router: Any, make_worker: Any
) -> None:
    """CORS: the browser's question is answered without a key, and every reply names the page."""
    page = {"origin": "https://app.example"}
    wants = {**page, "access-control-request-headers": "authorization, x-stainless-os, bad header"}
    access = {"cors_origins": ["https://app.example"]}
    table = {"large": {"decode": [await make_worker()]}}

    async with run_router(table, access=access) as (client, _):
        asked = await client.request("OPTIONS", "/v1/chat/completions", headers=wants)
        answered = await client.chat(headers=page, stream=True)
        refused = await client.chat(headers=page, model="nobody")
        other = await client.request("OPTIONS", "/v1/models", headers={"origin": "https://x.y"})

    assert asked.status == 204
    assert asked.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
    assert "POST" in asked.headers["access-control-allow-methods"]
    for reply in (asked, answered, refused):
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        assert reply.headers["vary"] == "origin"
    assert (answered.status, refused.status, other.status) == (200, 404, 405)
    assert "access-control-allow-origin" not in other.headers
