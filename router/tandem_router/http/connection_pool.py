"""Keep-alive HTTP/1.1 connections to one origin, and how what arrives on them becomes replies."""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
from dataclasses import dataclass, field
from typing import cast

import httptools

from tandem_router.config.addresses import Outward, numeric
from tandem_router.errors import UnreachableError, UpstreamError
from tandem_router.http.deadlines import Deadlines
from tandem_router.http.response import Response

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
        response.last_data = self._loop.time()
        pass_on = response._pass_on
        if pass_on is not None and self._is_after_chunk and pass_on(data):
            return  # whole chunks: the parser would be where it is
        response.received_any = True
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
        response.encoding = headers.get(b"content-encoding")
        if b"content-length" not in headers:
            response.until_eof = b"transfer-encoding" not in headers and status not in (204, 304)

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

    def heard_at(self) -> float:
        """As `UpstreamClient.heard_at`."""
        replies = [connection.response for connection in self.busy]
        times = [each.last_data for each in replies if each is not None and each.has_begun]
        return max(times, default=-math.inf)

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
