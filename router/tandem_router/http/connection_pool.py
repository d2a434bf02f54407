"""Keep-alive HTTP/1.1 connections to one origin, and the replies that arrive on them.

A reply is read while it arrives: its consumer waits on it, pauses its worker by being slow, and
gives it up by closing it.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from dataclasses import dataclass, field
from typing import cast

import httptools

from tandem_router.errors import TimedOutError, UnreachableError, UpstreamError

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
        self.transport: asyncio.Transport | None = None
        self.response: Response | None = None
        self.closed = False
        self.idle_since = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self._keep_alive = True

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
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.response = None
            response._fail(UpstreamError(f"{self._pool.name}: malformed HTTP reply: {error}"))
            self.abort()
            return
        response._wake()

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

    def on_body(self, body: bytes) -> None:
        response = self.response
        if response is not None:
            response._push(body)

    def on_message_complete(self) -> None:
        response = self.response
        if response is None or response.status == 0:
            return
        self.response = None
        response._complete()
        if self._keep_alive and not self.closed:
            self._parser = httptools.HttpResponseParser(self)
            self._pool.release(self)
        else:
            self.abort()

    def send(self, head: bytes, body: bytes, response: Response) -> None:
        assert self.transport is not None
        self.response = response
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


class Response:
    """A reply whose status and headers are known; the body is read as it arrives."""

    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.header_bytes = 0
        self.until_eof = False
        self.received_any = False
        self.last_data = loop.time()
        self._loop = loop
        self._connection: Connection | None = connection
        self._blocks: deque[bytes] = deque()
        self._buffered = 0
        self._paused = False
        self._done = False
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._watchdog: asyncio.TimerHandle | None = None
        self._begin_by: float | None = None
        self.num_body_bytes = 0

    @property
    def num_buffered_bytes(self) -> int:
        """What has arrived and was not read yet."""
        return self._buffered

    def watch(self, stall_s: float, begin_s: float | None = None) -> None:
        """Fail the reply after stall_s without a byte, or begin_s without `began` being called.

        A provider that keeps a connection alive and answers nothing sends bytes, too.
        """
        if begin_s is not None:
            self._begin_by = self._loop.time() + begin_s
        self._look(stall_s)

    def began(self) -> None:
        """The answer has begun: from here only silence ends it."""
        self._begin_by = None

    def _look(self, stall_s: float) -> None:
        """One timer per reply, not per read: it looks at the stamp of the last byte."""
        now = self._loop.time()
        remaining = stall_s if self._paused else self.last_data + stall_s - now
        why = f"no byte for {stall_s:g} s"
        if self._begin_by is not None and self._begin_by - now < remaining:
            remaining, why = self._begin_by - now, "no answer began in time"
        if remaining > 0.0:
            self._watchdog = self._loop.call_later(remaining, self._look, stall_s)
            return
        connection = self._connection
        name = connection.name if connection is not None else "worker"
        self._fail(TimedOutError(f"{name}: {why}"))
        if connection is not None:
            connection.response = None
            connection.abort()

    async def headers_ready(self) -> None:
        while self.status == 0 and not self._done:
            await self._wait()
        if self.status == 0:
            raise self._error or UpstreamError("the reply ended before its headers")

    async def read_some(self) -> bytes:
        """All bytes that have arrived, at least one; b"" at the end of the body.

        Raises UpstreamError when the connection breaks first; bytes that came before the break
        are returned first.
        """
        while not self._blocks:
            if self._done:
                if self._error is not None:
                    raise self._error
                return b""
            await self._wait()
        data = self._blocks.popleft() if len(self._blocks) == 1 else b"".join(self._blocks)
        self._blocks.clear()
        self._buffered = 0
        if self._paused:
            self._paused = False
            self.last_data = self._loop.time()
            if self._connection is not None and self._connection.transport is not None:
                self._connection.transport.resume_reading()
        return data

    async def read_all(self, max_bytes: int = 64 * 2**20) -> bytes:
        parts = []
        size = 0
        while data := await self.read_some():
            parts.append(data)
            size += len(data)
            if size > max_bytes:
                self.close()
                raise UpstreamError(f"the reply is larger than {max_bytes} bytes")
        return b"".join(parts)

    def close(self) -> None:
        """Give the reply up. Closing before its end closes the connection: the worker's cue."""
        connection = self._connection
        if connection is not None and not self._done:
            connection.response = None
            self._fail(UpstreamError("closed by the router"))
            connection.abort()

    def _push(self, data: bytes) -> None:
        self._blocks.append(data)
        self._buffered += len(data)
        self.num_body_bytes += len(data)
        if self._buffered > PAUSE_ABOVE_BYTES and not self._paused:
            connection = self._connection
            if connection is not None and connection.transport is not None:
                self._paused = True
                connection.transport.pause_reading()

    def _complete(self) -> None:
        self._done = True
        self._finish()

    def _fail(self, error: UpstreamError) -> None:
        if not self._done:
            self._done = True
            self._error = error
        self._finish()

    def _finish(self) -> None:
        if self._paused and self._connection is not None:
            self._paused = False
            transport = self._connection.transport
            if transport is not None and not transport.is_closing():
                transport.resume_reading()
        self._connection = None
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


@dataclass(eq=False)
class OriginPool:
    """The connections to one origin: idle ones to be taken, busy ones to be broken off."""

    origin: Origin
    loop: asyncio.AbstractEventLoop
    tls: ssl.SSLContext | None
    idle: list[Connection] = field(default_factory=list)
    busy: set[Connection] = field(default_factory=set)

    @property
    def name(self) -> str:
        return f"{self.origin.host}:{self.origin.port}"

    async def connect(self, timeout_s: float) -> Connection:
        origin = self.origin
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await self.loop.create_connection(
                    lambda: Connection(self), origin.host, origin.port, ssl=self.tls
                )
        except TimeoutError as error:
            raise UnreachableError(f"{self.name}: no connection within {timeout_s:g} s") from error
        except (OSError, UnicodeError) as error:  # UnicodeError: no host can have that name
            reason = getattr(error, "strerror", None) or error
            raise UnreachableError(f"{self.name}: cannot connect: {reason}") from error
        self.busy.add(connection)
        return connection

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
