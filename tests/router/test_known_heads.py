"""A request whose head was read before is the same request as when it was read."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_router.http.known_heads import MOST_KEPT, KnownHeads
from tandem_router.http.server import Listener, ServerLimits
from tandem_router.testing.two_tiers import both

NAMES = st.sampled_from(
    ["Accept", "authorization", "X-Length", "x-content-length", "Connection", "content-type"]
)
VALUES = st.text("abc019:/,; ", max_size=12)
LENGTH_NAMES = st.sampled_from(["content-length", "Content-Length", "CONTENT-LENGTH"])


class Wire:
    """What a connection writes, without a socket."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def get_extra_info(self, name: str) -> Any:
        return ("test", 1) if name in ("peername", "sockname") else None

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True

    close = write_eof = abort

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


async def seen(listener: Listener, *parts: bytes) -> tuple[list[Any], bytes]:
    """(what the application is asked, what the client is written) of one connection's bytes."""
    asked: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        kept = {name: value for name, value in scope.items() if name != "extensions"}
        asked.append((kept, body))
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    config = SimpleNamespace(loaded=True, loaded_app=app)
    state = SimpleNamespace(
        connections=set(), tasks=set(), total_requests=0, default_headers=[(b"date", b"now")]
    )
    make: Any = listener.protocol()
    connection, wire = make(config, state, {}, asyncio.get_running_loop()), Wire()
    connection.connection_made(wire)
    for part in parts:
        connection.data_received(part)
        while state.tasks:  # noqa: ASYNC110
            await asyncio.sleep(0)
    connection.connection_lost(None)
    return asked, wire.written


def whole(
    head: bytes, body: bytes, length: int | None = None, name: str = "content-length"
) -> bytes:
    number = len(body) if length is None else length
    return b"%b%b: %d\r\n\r\n%b" % (head, name.encode(), number, body)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(NAMES, VALUES), max_size=5),
    LENGTH_NAMES,
    st.sampled_from(["POST", "PUT"]),
    st.sampled_from(["/v1/chat/completions", "/a?b=c", "/%41"]),
    st.lists(st.binary(max_size=30), min_size=4, max_size=4),
    st.sampled_from(["1.1", "1.0"]),
)
async def test_a_known_head_says_what_it_said_when_it_was_read(
    headers: list[tuple[str, str]],
    length_name: str,
    method: str,
    path: str,
    bodies: list[bytes],
    version: str,
) -> None:
    lines = [f"{method} {path} HTTP/{version}", "host: test"]
    lines += [f"{name}: {value}" for name, value in headers]
    head = ("\r\n".join(lines) + "\r\n").encode()
    knowing = Listener(ServerLimits())

    for body in bodies:
        request = whole(head, body, name=length_name)
        assert await seen(knowing, request) == await seen(Listener(ServerLimits()), request)


async def test_a_head_is_kept_from_its_second_time_on() -> None:
    listener = Listener(ServerLimits())
    request = whole(b"POST /a HTTP/1.1\r\nhost: test\r\n", b"{}")

    counts = []
    for _ in range(3):
        await seen(listener, request)
        counts.append(len(listener.heads))

    assert counts == [0, 1, 1]


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (whole(b"POST /a HTTP/1.1\r\nhost: test\r\n", b"{}", length=1), b"HTTP/1.1 400"),
        (
            whole(b"POST /a HTTP/1.1\r\nhost: test\r\ncontent-length: 2\r\n", b"{}"),
            b"HTTP/1.1 400",
        ),
        (
            whole(b"POST /a HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n", b"{}"),
            b"HTTP/1.1 400",
        ),
    ],
    ids=["too short", "two lengths", "two framings"],
)
async def test_what_the_parser_refuses_stays_refused(data: bytes, answer: bytes) -> None:
    listener = Listener(ServerLimits())
    for _ in range(3):
        await seen(listener, whole(b"POST /a HTTP/1.1\r\nhost: test\r\n", b"{}"))

    for _ in range(3):
        _, written = await seen(listener, data)
        assert answer in written


async def test_requests_that_follow_each_other_in_one_read_are_all_answered() -> None:
    listener = Listener(ServerLimits())
    request = whole(b"POST /a HTTP/1.1\r\nhost: test\r\n", b"{}")
    for _ in range(3):
        await seen(listener, request)

    asked, _ = await seen(listener, request, request + request, request[:20], request[20:], request)

    assert [body for _, body in asked] == [b"{}"] * 5


def test_heads_with_a_value_of_their_own_each_push_no_other_out() -> None:
    heads = KnownHeads()
    scope = {"http_version": "1.1", "method": "POST", "path": "/a"}

    def come(value: int) -> bytes:
        data = whole(b"POST /a HTTP/1.1\r\nhost: test\r\nx-id: %d\r\n" % value, b"{}")
        names = {b"host": b"test", b"x-id": b"%d" % value, b"content-length": b"2"}
        heads.remember(data, dict(scope), list(names.items()), names, True)
        return data

    known = come(0)
    come(0)
    for value in range(1, 20_000):
        come(value)

    assert heads.find(known) is not None
    assert len(heads) <= MOST_KEPT


async def test_the_router_answers_a_known_head_as_an_unknown_one(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(await both(make_worker)) as (client, _):
        replies = [
            await client.chat("hi", model="large", headers=headers, **fields)
            for headers in ({}, {"x-tandem-priority": "wrong"}, {"x-tandem-max-cost-usd": "1"})
            for fields in ({}, {"max_tokens": -1}, {"stream": True, "max_tokens": 3})
            for _ in range(3)
        ]

    for at in range(0, len(replies), 3):
        first, *later = replies[at : at + 3]
        for reply in later:
            assert reply.status == first.status
            assert reply.headers.keys() == first.headers.keys()
            if reply.status != 200:
                assert reply.json["error"] == first.json["error"]
