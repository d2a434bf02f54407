"""The upstream client reads any valid reply, reuses connections and never trusts a broken one."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from eventually import eventually
from tandem_router.balancing import kubernetes_discovery as endpointslices
from tandem_router.config import EndpointSliceEndpoints, ServiceRef
from tandem_router.errors import TimedOutError, UnreachableError, UpstreamError
from tandem_router.http.client import UpstreamClient
from tandem_router.http.deadlines import Deadlines
from tandem_router.http.response import PAUSE_ABOVE_BYTES, Response

Script = Callable[[int, asyncio.StreamReader, asyncio.StreamWriter], Any]


@asynccontextmanager
async def server(script: Script) -> AsyncIterator[str]:
    """A server whose nth connection is handled by script(n, reader, writer)."""
    count = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        try:
            await script(count, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    listener.close()


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return head + await reader.readexactly(length)


def replying(*parts: bytes, forever: bool = True) -> Script:
    async def script(_: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
            if not forever:
                return

    return script


@pytest.mark.parametrize(
    "parts",
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",),
        tuple(
            bytes([byte])
            for byte in b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n"
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",),
    ],
)
async def test_every_framing_gives_the_same_body_and_the_connection_is_reused(
    parts: tuple[bytes, ...],
) -> None:
    connections = 0

    async def counting(n: int, reader: Any, writer: Any) -> None:
        nonlocal connections
        connections = n
        await replying(*parts)(n, reader, writer)

    async with server(counting) as url:
        client = UpstreamClient()
        for _ in range(3):
            response = await client.request("POST", url + "/x?y=1", body=b"{}")
            assert (response.status, await response.read_all()) == (200, b"hello")
        client.close()

    assert connections == 1


async def test_a_body_that_ends_with_the_connection_is_read_to_its_end() -> None:
    async with server(replying(b"HTTP/1.0 200 OK\r\n\r\nhel", b"lo", forever=False)) as url:
        client = UpstreamClient()
        response = await client.request("GET", url)
        assert await response.read_all() == b"hello"
        client.close()


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n",
    ],
)
async def test_a_reply_that_breaks_off_gives_its_bytes_and_then_an_error(reply: bytes) -> None:
    async with server(replying(reply, forever=False)) as url:
        client = UpstreamClient()
        response = await client.request("GET", url)
        with pytest.raises(UpstreamError):
            await response.read_all()
        client.close()


@pytest.mark.parametrize(
    "reply", [b"", b"HTTP/1.1 2", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\na: " + b"b" * 99_999]
)
async def test_no_reply_or_a_senseless_one_is_an_error(reply: bytes) -> None:
    async with server(replying(reply, forever=False)) as url:
        client = UpstreamClient()
        with pytest.raises(UpstreamError):
            await client.request("GET", url)
        client.close()


async def test_a_connection_the_server_closed_while_idle_is_replaced_silently() -> None:
    good = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

    async def close_after_one(n: int, reader: Any, writer: Any) -> None:
        await read_request(reader)
        writer.write(good)
        await writer.drain()
        if n == 1:
            # Read the next request, then close without an answer, as a timed-out server does.
            await read_request(reader)

    async with server(close_after_one) as url:
        client = UpstreamClient()
        for _ in range(2):
            response = await client.request("POST", url, body=b"{}")
            assert await response.read_all() == b"ok"
        client.close()


async def test_an_unreachable_server_is_told_apart() -> None:
    client = UpstreamClient(connect_timeout_s=0.5)

    with pytest.raises(UnreachableError):
        await client.request("GET", "http://127.0.0.1:1/")


@pytest.mark.parametrize("url", ["ftp://a", "nonsense", "http://", "http://a:b", "http://[::1"])
async def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UpstreamError):
        await UpstreamClient().request("GET", url)


async def test_silence_is_a_stall_but_a_slow_stream_is_not() -> None:
    async def script(n: int, reader: Any, writer: Any) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(6):
            await asyncio.sleep(0.04)
            writer.write(b"1\r\nx\r\n")
        await asyncio.sleep(30)

    async with server(script) as url:
        client = UpstreamClient(stall_timeout_s=0.15)
        response = await client.request("GET", url)
        read = b""
        while len(read) < 6:
            read += await response.read_some()
        with pytest.raises(UpstreamError, match=r"no byte for 0\.15 s"):
            await response.read_some()
        client.close()

    assert read == b"xxxxxx"


async def test_a_slow_reader_holds_the_server_back_and_loses_nothing() -> None:
    size = PAUSE_ABOVE_BYTES * 8
    written = 0

    async def script(n: int, reader: Any, writer: Any) -> None:
        nonlocal written
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        while written < size:
            writer.write(b"x" * 65536)
            await writer.drain()
            written += 65536

    async with server(script) as url:
        client = UpstreamClient()
        response = await client.request("GET", url)
        await eventually(lambda: written > PAUSE_ABOVE_BYTES)
        assert response.num_buffered_bytes <= PAUSE_ABOVE_BYTES * 2
        assert len(await response.read_all()) == size
        client.close()


async def test_closing_a_reply_early_closes_the_connection() -> None:
    closed = asyncio.Event()

    async def script(n: int, reader: Any, writer: Any) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nx")
        try:
            assert await reader.read() == b""
        except ConnectionError:
            pass
        closed.set()

    async with server(script) as url:
        client = UpstreamClient()
        response = await client.request("GET", url)
        response.close()
        async with asyncio.timeout(2):
            await closed.wait()


def slice_object(service: str, *addresses: str, **conditions: bool) -> dict[str, Any]:
    return {
        "metadata": {
            "name": f"{service}-abc",
            "labels": {"kubernetes.io/service-name": service},
            "resourceVersion": "7",
        },
        "ports": [{"name": "http", "port": 8100}],
        "endpoints": [{"addresses": [a], "conditions": conditions} for a in addresses],
    }


REFS = (
    ServiceRef(tier="small", role="unified", service="s"),
    ServiceRef(tier="large", role="decode", service="l-decode", port=9000),
)


def test_slices_become_the_table_without_unready_and_terminating_addresses() -> None:
    table = endpointslices.table_of(
        [
            slice_object("s", "10.0.0.2", "10.0.0.1"),
            slice_object("l-decode", "fd00::1", ready=True),
            slice_object("l-decode", "10.0.0.9", ready=False),
            slice_object("l-decode", "10.0.0.8", ready=True, terminating=True),
            slice_object("unrelated", "10.0.0.7"),
        ],
        REFS,
    )

    assert table == {
        "small": {"unified": ("http://10.0.0.1:8100", "http://10.0.0.2:8100")},
        "large": {"decode": ("http://[fd00::1]:8100",)},
    }


def test_where_a_slice_names_no_port_the_services_is_asked() -> None:
    without = {**slice_object("l-decode", "10.0.0.1"), "ports": []}

    assert endpointslices.table_of([without], REFS)["large"] == {
        "decode": ("http://10.0.0.1:9000",)
    }


def test_of_two_ports_the_one_that_speaks_http_is_asked() -> None:
    """vLLM's prefill and decode pods have one for blocks, too."""
    two = slice_object("s", "10.0.0.1")
    two["ports"] = [{"name": "kv", "port": 8200}, {"name": "http", "port": 8100}]

    assert endpointslices.table_of([two], REFS)["small"] == {"unified": ("http://10.0.0.1:8100",)}


def framed(*documents: Any) -> bytes:
    body = b"".join(json.dumps(document).encode() + b"\n" for document in documents)
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def watching(url: str, folder: Any) -> EndpointSliceEndpoints:
    return EndpointSliceEndpoints(
        type="endpointslice",
        namespace="prod",
        services=REFS,
        api_url=url,
        credentials_dir=str(folder),
    )


async def test_slices_are_watched_and_listed_again_after_a_410(tmp_path: Any) -> None:
    (tmp_path / "token").write_text("token-1\n")
    requests: list[bytes] = []
    first = {"metadata": {"resourceVersion": "5"}, "items": [slice_object("s", "10.0.0.1")]}
    added = {"type": "ADDED", "object": slice_object("l-decode", "10.0.0.3")}
    gone = {"type": "ERROR", "object": {"code": 410, "message": "too old"}}
    again = {"metadata": {"resourceVersion": "9"}, "items": [slice_object("s", "10.0.0.4")]}
    replies = [framed(first), framed(added), framed(gone), framed(again)]

    async def script(n: int, reader: Any, writer: Any) -> None:
        while True:
            requests.append(await read_request(reader))
            if not replies:
                await asyncio.sleep(30)
            writer.write(replies.pop(0))
            await writer.drain()

    tables: list[Any] = []
    arrived = asyncio.Event()

    def on_table(table: Any) -> None:
        tables.append(table)
        if len(tables) == 3:
            arrived.set()

    async with server(script) as url:
        config = watching(url, tmp_path)
        task = asyncio.ensure_future(endpointslices.watch_slices(config, on_table))
        async with asyncio.timeout(5):
            await arrived.wait()
        task.cancel()

    assert tables[1]["large"] == {"decode": ("http://10.0.0.3:8100",)}
    assert tables[2] == {"small": {"unified": ("http://10.0.0.4:8100",)}}
    assert b"authorization: Bearer token-1" in requests[0]
    assert b"/namespaces/prod/endpointslices?labelSelector=" in requests[0]
    assert b"resourceVersion=5" in requests[1]
    assert b"resourceVersion=7" in requests[2]


GONE = framed({"type": "ERROR", "object": {"code": 410, "message": "too old"}})
FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno"


@pytest.mark.parametrize(
    "watched", [framed(), GONE, FORBIDDEN], ids=["ends at once", "gone at once", "refused"]
)
async def test_a_watch_that_tells_nothing_is_asked_for_more_and_more_rarely(
    tmp_path: Any, watched: bytes
) -> None:
    listed = framed({"metadata": {"resourceVersion": "5"}, "items": []})
    waits: list[float] = []
    enough = asyncio.Event()

    async def script(n: int, reader: Any, writer: Any) -> None:
        while True:
            writer.write(watched if b"watch=1" in await read_request(reader) else listed)
            await writer.drain()

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 4:
            enough.set()
            await asyncio.Event().wait()

    async with server(script) as url, asyncio.timeout(20):
        watch = endpointslices.watch_slices(watching(url, tmp_path), lambda _: None, sleep)
        task = asyncio.ensure_future(watch)
        await enough.wait()
        task.cancel()

    assert waits == [endpointslices.FIRST_RETRY_S * 2**i for i in range(4)]


@pytest.mark.parametrize(("more_s", "ends_at"), [(0.0, 2.0), (3.0, 5.0), (math.inf, 50.0)])
async def test_whether_a_reply_may_take_longer_is_asked_when_its_time_is_over(
    more_s: float, ends_at: float
) -> None:
    """Of nearly all replies it is never asked: they have begun by then."""
    asked: list[float] = []

    class Line:
        name = "worker"
        transport: asyncio.Transport | None = None
        response: Response | None = None
        deadlines = Deadlines(asyncio.get_running_loop())

        def abort(self) -> None: ...

    def more(now: float, sent_at: float) -> float:
        asked.append(now)
        return more_s if len(asked) == 1 and sent_at == 0.0 else 0.0

    reply = Response(Line(), asyncio.get_running_loop())
    at = reply.last_data = 0.0
    reply.watch(50.0, 2.0, more)

    at = 2.0
    while (due := reply.due(at)) < math.inf:
        at = due

    assert at == ends_at
    assert isinstance(reply.error, TimedOutError)
    assert asked == ([2.0, 5.0] if more_s == 3.0 else [2.0])
    Line.deadlines.close()
