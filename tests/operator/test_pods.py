"""Asking pods: a reply is read whole, within bounds, or refused in words."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tandem_operator import pods
from tandem_operator.pods import ask_json


@asynccontextmanager
async def answering(*parts: bytes, endless: bool = False) -> AsyncIterator[int]:
    """A server that sends these bytes to whoever asks, the last ones for ever if so wanted."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
            while endless:
                writer.write(parts[-1])
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_a_reply_may_come_in_pieces_and_in_chunks() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with answering(head, b'4\r\n{"a"\r\n', b"4;x=y\r\n: 1}\r\n", b"0\r\n\r\n") as port:
        assert await ask_json("127.0.0.1", port, "/x") == (200, {"a": 1})


async def test_a_reply_without_end_is_refused() -> None:
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    async with answering(head, b"x" * 65536, endless=True) as port:
        with pytest.raises(ValueError, match=f"more than {pods.MAX_REPLY_BYTES} bytes"):
            await ask_json("127.0.0.1", port, "/x")


@pytest.mark.parametrize("reply", [b"", b"\r\n\r\n", b"SSH-2.0-x", b"HTTP/1.1 oops {}\r\n\r\n{}"])
async def test_what_is_not_http_is_no_answer(reply: bytes) -> None:
    async with answering(reply) as port:
        with pytest.raises(ValueError, match="is no HTTP"):
            await ask_json("127.0.0.1", port, "/x")
