"""The load generator: few bytes read per reply, so that what is measured is what stands between.

Closed loops: each of `concurrency` connections sends its next request when a reply is complete.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

PATH = "/v1/chat/completions"
BODY = {
    "model": "bench",
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Which of these numbers is the largest: 17, 4, 99, 23? " * 4},
    ],
    "max_tokens": 128,
    "temperature": 0.7,
}
MOST_S = 120.0


@dataclass
class Timings:
    """Seconds from a request's last byte to its reply's first body byte, and to its last."""

    first_s: list[float] = field(default_factory=list)
    last_s: list[float] = field(default_factory=list)


class BadReply(Exception):
    pass


def request_bytes(stream: bool) -> bytes:
    body = json.dumps({**BODY, "stream": True} if stream else BODY).encode()
    return (
        b"POST %b HTTP/1.1\r\nhost: 127.0.0.1\r\nuser-agent: bench\r\naccept: */*\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        % (PATH.encode(), len(body), body)
    )


class _Client(asyncio.Protocol):
    """One keep-alive connection; knows where a reply ends by content-length or its last chunk."""

    def __init__(self, request: bytes, timings: Timings, more: Any) -> None:
        self._request = request
        self._timings = timings
        self._more = more  # whether another request is to be sent
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._next()

    def _next(self) -> None:
        if not self._more():
            self._transport.close()
            if not self.done.done():
                self.done.set_result(None)
            return
        self._buffer = bytearray()
        self._body_at = self._length = -1
        self._began = False
        self._sent = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        buffer = self._buffer
        buffer += data
        if self._body_at < 0:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(buffer[:end]).lower()
            if not head.startswith(b"http/1.1 200"):
                self._fail(f"bad reply: {bytes(buffer[:400])!r}")
                return
            self._body_at = end + 4
            at = head.find(b"content-length:")
            if at >= 0:
                self._length = int(head[at + 15 :].split(b"\r\n", 1)[0])
        if not self._began and len(buffer) > self._body_at:
            self._began = True
            self._timings.first_s.append(now - self._sent)
        if self._length >= 0:
            complete = len(buffer) >= self._body_at + self._length
        else:
            complete = buffer.endswith(b"0\r\n\r\n")
        if complete:
            self._timings.last_s.append(now - self._sent)
            if b'"usage"' not in buffer and b"[DONE]" not in buffer:
                self._fail(f"incomplete reply: {bytes(buffer[-400:])!r}")
                return
            self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the connection was closed: {exc}")

    def _fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(BadReply(why))
            self._transport.abort()


async def drive(port: int, stream: bool, num: int, concurrency: int) -> Timings:
    """Raises BadReply, TimeoutError."""
    timings, left = Timings(), num
    request = request_bytes(stream)

    def more() -> bool:
        nonlocal left
        left -= 1
        return left >= 0

    loop = asyncio.get_running_loop()
    async with asyncio.timeout(MOST_S):
        made = [
            await loop.create_connection(lambda: _Client(request, timings, more), "127.0.0.1", port)
            for _ in range(concurrency)
        ]
        await asyncio.gather(*(client.done for _, client in made))
    return timings
