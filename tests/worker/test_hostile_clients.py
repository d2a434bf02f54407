"""What somebody without the token, or a page of another site, may hold of a worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tandem_worker.server.app import WorkerApp
from tandem_worker.server.connections import Strangers
from tandem_worker.server.http_server import HttpServer, listen

HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
LOAD = b"GET /v1/load HTTP/1.1\r\nhost: localhost\r\n"


@contextlib.asynccontextmanager
async def served(app: Any, strangers: Strangers | None = None) -> AsyncIterator[int]:
    listener = listen("127.0.0.1", 0)
    server = HttpServer(app, listener, strangers)
    await server.start()
    try:
        yield listener.getsockname()[1]
    finally:
        await server.stop(force=True)


async def said(port: int, *parts: bytes) -> bytes:
    """All that is answered until the connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    reply = b""
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
            while part := await reader.read(65_536):
                reply += part
    writer.close()
    return reply


async def ok(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01 nonsense\r\n\r\n", b"400"),
        (HEALTH + b"a: " + b"x" * 200_000, b"431"),
        (HEALTH + b"a: b\r\n" * 20_000, b"431"),
        (b"GET /" + b"x" * 200_000, b"431"),
        (HEALTH + b"a: " + b"x" * 40_000 + b"\r\n\r\n", b"431"),
        (HEALTH + b"transfer-encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 20_000, b""),
        (HEALTH + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (HEALTH + b"content-length: 5\r\ncontent-length: 6\r\n\r\n", b"400"),
        (HEALTH + b"content-length: +5\r\n\r\n", b"400"),
        ((HEALTH + b"\r\n") * 2_000, b""),
    ],
    ids=range(10),
)
async def test_what_is_too_much_ends_the_connection(data: bytes, status: bytes) -> None:
    async with served(ok) as port:
        reply = await said(port, data)

    assert reply.count(b"HTTP/1.1 200") < 40
    if status:
        assert reply.split()[1] == status, reply[:200]
        assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["message"]


async def test_slow_headers_are_refused_while_they_are_read() -> None:
    async with served(ok, Strangers(header_timeout_s=0.05)) as port:
        begun, silent = await asyncio.gather(said(port, HEALTH + b"a"), said(port))

    assert begun.startswith(b"HTTP/1.1 408")
    assert silent.startswith(b"HTTP/1.1 408")


async def test_who_never_reads_is_dropped() -> None:
    async def large(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for left in reversed(range(64)):
            part = {"type": "http.response.body", "body": b"x" * 2**20, "more_body": left > 0}
            await send(part)

    async with served(large, Strangers(write_timeout_s=0.1)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(HEALTH + b"\r\n")
        await asyncio.sleep(0.5)
        num_bytes = 0
        with contextlib.suppress(ConnectionResetError):
            while part := await reader.read(2**20):
                num_bytes += len(part)
        writer.close()

    assert num_bytes < 64 * 2**20


async def whole(reader: asyncio.StreamReader) -> bytes:
    """One reply of a connection that is kept."""
    head = await reader.readuntil(b"\r\n\r\n")
    (length,) = re.findall(rb"content-length: (\d+)", head.lower())
    return head + await reader.readexactly(int(length))


async def test_silent_connections_keep_nobody_out(start_worker: Any) -> None:
    worker = await start_worker(token=b"secret")
    strangers = Strangers(most=4)
    async with served(WorkerApp(worker), strangers) as port:
        peer = await asyncio.open_connection("127.0.0.1", port)
        peer[1].write(LOAD + b"x-tandem-peer-token: secret\r\n\r\n")
        await whole(peer[0])
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        health = await said(port, HEALTH + b"connection: close\r\n\r\n")
        peer[1].write(LOAD + b"x-tandem-peer-token: secret\r\n\r\n")  # it was not sent away
        again = await whole(peer[0])
        kept = len(strangers.kept)
        for _, writer in (*silent, peer):
            writer.close()

    assert health.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 200" in again
    assert kept <= 4


async def test_a_refused_stranger_is_sent_away_with_its_body_unread(start_worker: Any) -> None:
    async with served(WorkerApp(await start_worker(token=b"secret"))) as port:
        reply = await said(
            port, b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 9000000\r\n\r\n"
        )

    assert reply.startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"host: evil.example", b"421"),
        (b"host: 127.0.0.1.evil.example:8000", b"421"),
        (b"host: localhost:8000\r\norigin: https://evil.example", b"403"),
        (b"host: localhost:8000\r\norigin: null", b"403"),
        (b"host: localhost:8000\r\nsec-fetch-site: cross-site", b"403"),
        (b"host: localhost:8000\r\norigin: http://localhost:8000", b"200"),
        (b"host: localhost:8000", b"200"),
    ],
    ids=range(7),
)
async def test_a_page_of_another_site_does_not_drain_a_worker_without_token(
    start_worker: Any, headers: bytes, status: bytes
) -> None:
    worker = await start_worker()
    async with served(WorkerApp(worker)) as port:
        reply = await said(
            port, b"POST /drain HTTP/1.1\r\nconnection: close\r\n" + headers + b"\r\n\r\n"
        )

    assert reply.split()[1] == status
    assert worker.is_draining is (status == b"200")
