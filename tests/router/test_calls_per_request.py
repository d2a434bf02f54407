"""How many of the router's functions a request calls: what makes it dear shows without a clock.

A request through the real server and the real client, with bytes instead of sockets on both sides.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tandem_router.api.app import RouterApp
from tandem_router.config import RouterConfig
from tandem_router.http.connection_pool import Connection, Origin
from tandem_router.http.server import Listener, ServerLimits

# What a request called in November 2026, and a little more; a chunk of a stream calls two.
MOST_OF_A_WHOLE_REPLY = 162
MOST_OF_A_STREAM = 285
MOST_OF_A_CHUNK = 2
WORD = b'data: {"choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}\n\n'
END = (
    b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4}}\n\ndata: [DONE]\n\n'
)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked"
ANSWER = {
    "choices": [{"index": 0, "message": {"content": "word"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 1},
}


class Wire:
    """A transport without a socket; `told` gets what is written."""

    def __init__(self, told: Callable[[bytes], None]) -> None:
        self.write = told

    def get_extra_info(self, name: str) -> Any:
        return ("test", 1) if name in ("peername", "sockname") else None

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...

    close = write_eof = abort


def chunk(events: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(events), events)


def reply_to(request: bytes, num_chunks: int) -> list[bytes]:
    """What the upstream's connection brings, read by read."""
    if b'"stream":true' not in request:
        body = json.dumps(ANSWER).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        return [head % len(body) + body]
    first = STREAM_HEAD + b"\r\n\r\n" + chunk(WORD)
    return [first, *[chunk(WORD)] * (num_chunks - 1), chunk(END) + b"0\r\n\r\n"]


def router() -> RouterApp:
    prices = {"usd_per_1m_input_tokens": 1.0, "usd_per_1m_output_tokens": 2.0}
    url = "http://127.0.0.1:9/v1"
    tiers = [
        {"name": name, "served_model": name, "kind": "external", "url": url, **prices}
        for name in ("mini", "full")
    ]
    config = {"name": "chat", "tiers": tiers, "fallback_tier": "full"}
    return RouterApp(RouterConfig.model_validate({**config, "predictor": {"type": "Length"}}))


async def calls_of(num_chunks: int) -> Counter[str]:
    """The router's functions that one more request calls once its like has come a few times.

    num_chunks: of the stream that is asked for; 0: a whole reply.
    """
    loop = asyncio.get_running_loop()
    app = router()
    written: list[bytes] = []
    state = SimpleNamespace(connections=set(), tasks=set(), total_requests=0, default_headers=[])
    make: Any = Listener(ServerLimits()).protocol()
    client = make(SimpleNamespace(loaded=True, loaded_app=app), state, {}, loop)
    client.connection_made(Wire(written.append))
    pool = app.services.client._pool(Origin("http", "127.0.0.1", 9), True)
    upstream = Connection(pool)

    def bring(parts: list[bytes]) -> None:
        upstream.data_received(parts.pop(0))
        if parts:
            loop.call_soon(bring, parts)

    def asks(sent: bytes) -> None:
        loop.call_soon(bring, reply_to(sent, num_chunks))

    upstream.connection_made(Wire(asks))
    messages = [{"role": "user", "content": "Hello?"}]
    body = {"model": "chat", "messages": messages, "stream": num_chunks > 0}
    raw = json.dumps(body, separators=(",", ":")).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\ncontent-length: %d\r\n\r\n"
    request = head % len(raw) + raw
    pool.idle.append(upstream)

    calls: Counter[str] = Counter()

    def called(frame: Any, event: str, _: Any) -> None:
        if event == "call" and "tandem_router" in frame.f_code.co_filename:
            calls[frame.f_code.co_qualname] += 1

    async def asked() -> bytes:
        upstream.idle_since = loop.time()
        written.clear()
        loop.call_soon(client.data_received, request)
        while not written or state.tasks:  # noqa: ASYNC110
            await asyncio.sleep(0)
        return b"".join(written)

    for _ in range(4):
        assert (await asked()).startswith(b"HTTP/1.1 200 OK")
    counts = []
    for _ in range(3):  # the fewest: a timer may come in between
        calls = Counter()
        sys.setprofile(called)
        try:
            reply = await asked()
        finally:
            sys.setprofile(None)
        assert reply.count(b"word") == max(1, num_chunks)
        counts.append(calls)
    app.services.client.close()
    return min(counts, key=lambda each: sum(each.values()))


@pytest.fixture
def no_profile() -> None:
    if sys.getprofile() is not None:
        pytest.skip("something else counts calls")


@pytest.mark.usefixtures("no_profile")
async def test_a_whole_reply_costs_a_bounded_number_of_calls_and_no_task() -> None:
    calls = await calls_of(0)

    assert sum(calls.values()) <= MOST_OF_A_WHOLE_REPLY, calls.most_common()
    assert calls["EagerRun.go_on"] == 2  # when the request is here, and when the reply is
    assert not calls["_rest"]  # it never was a task


@pytest.mark.usefixtures("no_profile")
async def test_a_chunk_of_a_stream_costs_two_calls() -> None:
    short, long = [sum((await calls_of(number)).values()) for number in (4, 36)]

    assert (long - short) / 32 <= MOST_OF_A_CHUNK
    assert short <= MOST_OF_A_STREAM
