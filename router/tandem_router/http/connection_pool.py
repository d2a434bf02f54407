"""Keep-alive HTTP/1.1 connections to one origin, and the replies that arrive on them.

A reply is read while it arrives: its consumer waits on it, pauses its worker by being slow, and
gives it up by closing it.
"""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import httptools

from tandem_router.config.addresses import Outward, numeric
from tandem_router.errors import TimedOutError, UnreachableError, UpstreamError
from tandem_router.http.deadlines import Deadlines
from tandem_router.http.eager import Waited

# A response whose consumer is slower than its worker stops being read beyond this many bytes.
PAUSE_ABOVE_BYTES = 256 * 1024
# Shorter than the keep-alive of the servers we talk to (uvicorn: 5 s), so that a reused
# connection is rarely one the server is just closing.
IDLE_KEPT_S = 4.0
MAX_IDLE_PER_ORIGIN = 256
MAX_HEADER_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a connection leads; equal origins share a pool."""

    scheme: str
    host: str
    port: int

    @property
    def host_header(self) -> bytes:
        name = f"[{self.host}]" if ":" in self.host else self.host
        default = 443 if self.scheme == "https" else 80
        return (name if self.port == default else f"{name}:{self.port}").encode()


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, pool: OriginPool) -> None:
        self._pool = pool
        self._loop = pool.loop
        self.deadlines = pool.deadlines
        self.transport: asyncio.Transport | None = None
        self.response: Response | None = None
        self.closed = False
        self.idle_since = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self._keep_alive = True
        self._is_after_chunk = False  # what the parser is fed next begins a chunk

    @property
    def name(self) -> str:
        """Host and port, for people."""
        return self._pool.name

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio.Transport, so nothing can be asserted.
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        response = self.response
        self.response = None
        if response is not None:
            if response.until_eof and exc is None:
                response._complete()
                response._notify()
            else:
                why = str(exc) if exc else "closed before the reply was complete"
                response._fail(UpstreamError(f"{self._pool.name}: connection {why}"))
        self._pool.discard(self)

    def data_received(self, data: bytes) -> None:
        response = self.response
        if response is None:
            # Bytes nobody asked for: this connection cannot be trusted with a request.
            self.abort()
            return
        response.received_any = True
        response.last_data = self._loop.time()
        pass_on = response._pass_on
        if pass_on is not None and self._is_after_chunk and pass_on(data):
            return  # whole chunks: the parser would be where it is
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.response = None
            response._fail(UpstreamError(f"{self._pool.name}: malformed HTTP reply: {error}"))
            self.abort()
            return
        if self._is_after_chunk and not data.endswith(b"\r\n"):
            self._is_after_chunk = False  # the next one has begun
        blocks = response._blocks
        if response._sink is not None and len(blocks) == 1 and not response.done:
            response._sink(blocks.pop())  # as `_notify`, for nearly every chunk of a stream
        else:
            response._notify()

    def on_header(self, name: bytes, value: bytes) -> None:
        response = self.response
        if response is not None:
            response.header_bytes += len(name) + len(value)
            if response.header_bytes > MAX_HEADER_BYTES:
                raise ValueError("reply headers are too long")
            response.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        response = self.response
        if response is None:
            return
        status = self._parser.get_status_code()
        if status < 200:
            response.headers.clear()
            return
        response.status = status
        self._keep_alive = self._parser.should_keep_alive()
        headers = response.headers
        response.until_eof = (
            b"content-length" not in headers
            and b"transfer-encoding" not in headers
            and status not in (204, 304)
        )

    def on_chunk_header(self) -> None:
        self._is_after_chunk = False

    def on_chunk_complete(self) -> None:
        self._is_after_chunk = True

    def on_body(self, body: bytes) -> None:
        response = self.response
        if response is not None:
            response._blocks.append(body)
            if response._sink is None:
                response._count(len(body))

    def on_message_complete(self) -> None:
        response = self.response
        if response is None or response.status == 0:
            return
        self.response = None
        response._complete()
        if self._keep_alive and not self.closed:
            self._pool.release(self)
        else:
            self.abort()

    def send(self, head: bytes, body: bytes, response: Response) -> None:
        assert self.transport is not None
        self.response = response
        self._is_after_chunk = False
        if len(body) > 65536:
            self.transport.write(head)
            self.transport.write(body)
        else:
            self.transport.write(head + body)

    def abort(self) -> None:
        if not self.closed and self.transport is not None:
            self.closed = True
            self.transport.abort()
        self._pool.discard(self)


def _drop(_: bytes) -> None:
    """For what nobody wants to read."""


class Response(Waited):
    """A reply whose status and headers are known; the body is read as it arrives.

    Either its consumer waits for bytes (`read_some`), or they are poured into a function as they
    come (`pour`), which spares a stream a future and a task's turn for every chunk.
    """

    # What most replies leave as it is, so that making one costs little.
    status = 0
    header_bytes = 0
    until_eof = False
    received_any = False
    _buffered = 0
    _paused = False
    done = False  # nothing more will arrive
    _error: UpstreamError | None = None
    _is_watched = False
    _stall_s = math.inf
    _begin_by = math.inf
    _sink: Callable[[bytes], None] | None = None
    _pass_on: Callable[[bytes], bool] | None = None

    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.last_data = loop.time()
        self._loop = loop
        self._connection: Connection | None = connection
        self._blocks: list[bytes] = []

    @property
    def num_buffered_bytes(self) -> int:
        """What has arrived and was not read yet."""
        return self._buffered

    @property
    def error(self) -> UpstreamError | None:
        """What broke the reply; None while it goes on and after a whole one."""
        return self._error

    # -- how long it may take ---------------------------------------------------------------

    def watch(self, stall_s: float, begin_s: float | None = None) -> None:
        """Fail the reply after stall_s without a byte, or begin_s without `began` being called.

        A provider that keeps a connection alive and answers nothing sends bytes, too.
        """
        connection = self._connection
        if connection is None:
            return
        self._stall_s, now = stall_s, self.last_data
        due = now + stall_s
        if begin_s is not None:
            self._begin_by = now + begin_s
            due = min(due, self._begin_by)
        self._is_watched = True
        connection.deadlines.watch(self, due)

    def began(self) -> None:
        """The answer has begun: from here only silence ends it."""
        self._begin_by = math.inf

    def due(self, now: float) -> float:
        """When it may be late, after `now`; fails a reply that is."""
        due, why = self.last_data + self._stall_s, f"no byte for {self._stall_s:g} s"
        if self._paused:
            due = now + self._stall_s  # it is we who do not read
        if self._begin_by < due:
            due, why = self._begin_by, "no answer began in time"
        if due > now:
            return due
        connection = self._connection
        name = connection.name if connection is not None else "worker"
        if connection is not None:
            connection.response = None
            connection.abort()
        self._fail(TimedOutError(f"{name}: {why}"))
        return math.inf

    # -- reading ----------------------------------------------------------------------------

    def check_headers(self) -> None:
        """Raises UpstreamError where the reply has ended before its headers."""
        if not self.status:
            raise self._error or UpstreamError("the reply ended before its headers")

    async def read_some(self) -> bytes:
        """All bytes that have arrived, at least one; b"" at the end of the body.

        Raises UpstreamError when the connection breaks first; bytes that came before the break
        are returned first.
        """
        while not self._blocks:
            if self.done:
                if self._error is not None:
                    raise self._error
                return b""
            await self.until_awake()
        data = self._taken()
        if self._paused:
            self.resume()
        return data

    def whole(self) -> bytes | None:
        """The body, where all of it is here and nobody has read of it; else None."""
        return self._taken() if self.done and self._error is None else None

    async def read_all(self, max_bytes: int = 64 * 2**20) -> bytes:
        if self.done and self._error is None and self._buffered <= max_bytes:
            return self._taken()
        parts = []
        size = 0
        while data := await self.read_some():
            parts.append(data)
            size += len(data)
            if size > max_bytes:
                self.close()
                raise UpstreamError(f"the reply is larger than {max_bytes} bytes")
        return b"".join(parts)

    def pour(self, sink: Callable[[bytes], None] | None) -> None:
        """Hand what arrives to `sink`, from what is here on; None: to whoever reads, again.

        `sink` gets b"" once at the end, however it came: `error` says how. It may `pause`, call
        `pour(None)`, and must not raise.
        """
        self._sink = sink
        if sink is None:
            self._pass_on = None
        if sink is not None:
            self.resume()
            self._notify()

    def offer(self, pass_on: Callable[[bytes], bool] | None) -> None:
        """What arrives between two chunks goes to `pass_on` first, in its framing, while poured.

        It says whether those were whole chunks, which it has taken; it must not raise.
        """
        self._pass_on = pass_on

    def pause(self) -> None:
        """Read no more until `resume`: whoever takes the bytes is slow."""
        connection = self._connection
        if not self._paused and connection is not None and connection.transport is not None:
            self._paused = True
            connection.transport.pause_reading()

    def resume(self) -> None:
        """Read on, after a pause."""
        if self._paused:
            self._paused = False
            self.last_data = self._loop.time()
            if self._connection is not None and self._connection.transport is not None:
                self._connection.transport.resume_reading()

    def let_end(self, within_s: float) -> None:
        """Nobody reads on; where it ends within that time, its connection is used again."""
        if self.done or self._connection is None:
            return
        self._begin_by = self._loop.time() + within_s
        self._connection.deadlines.watch(self, self._begin_by)
        self.pour(_drop)

    def close(self) -> None:
        """Give the reply up. Closing before its end closes the connection: the worker's cue."""
        self._sink = self._pass_on = None
        connection = self._connection
        if connection is not None and not self.done:
            connection.response = None
            self._fail(UpstreamError("closed by the router"))
            connection.abort()

    # -- what the connection tells ----------------------------------------------------------

    def _count(self, num_bytes: int) -> None:
        """So many bytes wait for somebody to read them."""
        self._buffered += num_bytes
        if self._buffered > PAUSE_ABOVE_BYTES:
            self.pause()

    def _taken(self) -> bytes:
        blocks = self._blocks
        data = blocks[0] if len(blocks) == 1 else b"".join(blocks)
        blocks.clear()
        self._buffered = 0
        return data

    def _complete(self) -> None:
        """The last byte is here; `_notify` is the caller's to call."""
        self.done = True
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._is_watched:
            connection.deadlines.forget(self)
        if self._paused:
            self._paused = False
            transport = connection.transport
            if transport is not None and not transport.is_closing():
                transport.resume_reading()

    def _fail(self, error: UpstreamError) -> None:
        if not self.done:
            self._error = error
        self._complete()
        self._notify()

    def _notify(self) -> None:
        """Tell the consumer of what has come."""
        sink = self._sink
        if sink is None:
            self.awake()
            return
        if self._blocks:
            sink(self._taken())
            sink = self._sink
        if self.done and sink is not None:
            self._sink = None
            sink(b"")


@dataclass(eq=False)
class OriginPool:
    """The connections to one origin: idle ones to be taken, busy ones to be broken off."""

    origin: Origin
    loop: asyncio.AbstractEventLoop
    tls: ssl.SSLContext | None
    deadlines: Deadlines
    outward: Outward | None = None
    idle: list[Connection] = field(default_factory=list)
    busy: set[Connection] = field(default_factory=set)

    @property
    def name(self) -> str:
        return f"{self.origin.host}:{self.origin.port}"

    async def connect(self, timeout_s: float) -> Connection:
        origin = self.origin
        try:
            async with asyncio.timeout(timeout_s):
                if self.outward is None:
                    _, connection = await self.loop.create_connection(
                        lambda: Connection(self), origin.host, origin.port, ssl=self.tls
                    )
                else:
                    connection = await self._connect_outward(self.outward)
        except TimeoutError as error:
            raise UnreachableError(f"{self.name}: no connection within {timeout_s:g} s") from error
        except (OSError, UnicodeError) as error:  # UnicodeError: no host can have that name
            reason = getattr(error, "strerror", None) or error
            raise UnreachableError(f"{self.name}: cannot connect: {reason}") from error
        self.busy.add(connection)
        return connection

    async def _connect_outward(self, rule: Outward) -> Connection:
        """To an address that was checked, not to the name: DNS may say another one next time.

        Raises OSError.
        """
        origin = self.origin
        found = await self.loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
        refusals = {each: _refused(each, rule) for each in addresses}
        failure = OSError("no address")
        for address in addresses:
            if (why := refusals[address]) is not None:
                failure = OSError(f"{address} {why}; see outward in the configuration")
                continue
            try:
                _, connection = await self.loop.create_connection(
                    lambda: Connection(self),
                    address,
                    origin.port,
                    ssl=self.tls,
                    server_hostname=origin.host if self.tls is not None else None,
                )
                return connection
            except OSError as error:
                failure = error
        raise failure

    def take_idle(self) -> Connection | None:
        oldest = self.loop.time() - IDLE_KEPT_S
        while self.idle:
            connection = self.idle.pop()
            transport = connection.transport
            if connection.closed or transport is None or transport.is_closing():
                continue
            if connection.idle_since < oldest:
                connection.abort()
                continue
            self.busy.add(connection)
            return connection
        return None

    def release(self, connection: Connection) -> None:
        self.busy.discard(connection)
        if len(self.idle) >= MAX_IDLE_PER_ORIGIN:
            connection.abort()
            return
        connection.idle_since = self.loop.time()
        self.idle.append(connection)

    def discard(self, connection: Connection) -> None:
        self.busy.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)

    def abandon(self, why: str) -> None:
        for connection in list(self.busy):
            response = connection.response
            connection.response = None
            if response is not None:
                response._fail(UpstreamError(f"{self.name}: {why}"))
            connection.abort()

    def close(self) -> None:
        for connection in [*self.idle, *self.busy]:
            connection.abort()


def _refused(address: str, rule: Outward) -> str | None:
    number = numeric(address)
    return "is no address" if number is None else rule.refused(number)
