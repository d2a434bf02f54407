"""How a client's connection becomes ASGI requests, with everything it may hold bounded first.

uvicorn listens, drains and stops; this protocol reads in its place. It answers what cannot be
passed on with OpenAI error objects: headers that are too large (431) or too slow (408), malformed
messages (400), connections above the cap (503; probes have a reserve). A client that does not
read its reply loses the connection. An upgrade nobody speaks (`h2c`) is ignored, as RFC 9110
(7.8) allows, and its request answered with its body.
"""

from __future__ import annotations

import asyncio
import http
import logging
from collections import Counter, deque
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import unquote

import httptools

from tandem_router.errors import ApiError, overloaded

logger = logging.getLogger("tandem.router")

PROBES = frozenset({"/health", "/ready", "/metrics"})
# Read ahead of the application, per request.
BODY_AHEAD_BYTES = 64 * 1024
MAX_PIPELINED = 16
# Bytes of chunk headers, extensions and trailers beside the body that they frame.
FRAMING_SLACK_BYTES, FRAMING_PER_BODY_BYTE = 64 * 1024, 8
SWEEP_S = 0.5
LINGER_S = 2.0
_STATUS_LINES = {
    status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode())
    for status in http.HTTPStatus
}
_HOP_BY_HOP = frozenset({b"upgrade", b"http2-settings", b"connection"})

Message = MutableMapping[str, Any]


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Times in seconds. max_waiting_per_address: connections of one address that have not sent
    the header of their first request yet; probe_reserve: connections beyond max_connections on
    which only probes are answered."""

    max_header_bytes: int = 32_768
    header_timeout_s: float = 10.0
    write_timeout_s: float = 30.0
    keep_alive_s: float = 30.0
    max_connections: int = 4096
    max_waiting_per_address: int = 256
    probe_reserve: int = 32


class Listener:
    """What all connections of one server share: caps, and the clock that ends slow ones."""

    def __init__(self, limits: ServerLimits) -> None:
        self.limits = limits
        self.connections: set[Connection] = set()
        self.waiting: Counter[str] = Counter()
        self._sweeping = False

    def protocol(self) -> type[asyncio.Protocol]:
        """The class that uvicorn's `http` option takes."""
        shared = self

        class Bound(Connection):
            listener = shared

        return Bound

    def sweep_later(self, loop: asyncio.AbstractEventLoop) -> None:
        """One timer for all connections, while there are any: none of their own per request."""
        if not self._sweeping:
            self._sweeping = True
            loop.call_later(SWEEP_S, self._sweep, loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._sweeping = False
        now = loop.time()
        for connection in list(self.connections):
            if connection.deadline is not None and connection.deadline <= now:
                connection.too_late()
        if self.connections:
            self.sweep_later(loop)

    def make_room(self) -> bool:
        """Close a connection that is idle between requests; whether there was one."""
        for connection in self.connections:
            if connection.idle:
                connection.abort()
                return True
        return False


class Connection(asyncio.Protocol):
    """One client's connection; requests on it are answered one after the other."""

    listener: Listener

    def __init__(
        self,
        config: Any,
        server_state: Any,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if not config.loaded:
            config.load()
        self._app = config.loaded_app
        self._state = server_state
        self._app_state = app_state
        self.loop = _loop or asyncio.get_event_loop()
        self.limits = self.listener.limits
        self.deadline: float | None = None
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._client: tuple[str, int] | None = None
        self._server: tuple[str, int] | None = None
        self._scheme = "http"
        self._waiting = False  # counted among those without a first request
        self._reserved = False
        self._closing = False
        self._drained: asyncio.Future[None] | None = None
        self._writing_paused = False
        self._reading_paused = False
        self._exchange: Exchange | None = None
        self._pipeline: deque[Exchange] = deque()
        self._reading: Exchange | None = None  # the one whose body is arriving
        self._framing_bytes = 0
        self._body_bytes = 0
        self._refusal: ApiError | None = None
        self._new_parser()

    def _new_parser(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._in_header = True
        self._upgrading = False
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._header_bytes = 0
        self._raw_bytes = 0

    # -- the connection ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._client = _address(transport.get_extra_info("peername"))
        self._server = _address(transport.get_extra_info("sockname"))
        if transport.get_extra_info("sslcontext"):
            self._scheme = "https"
        listener, limits = self.listener, self.limits
        host = self._client[0] if self._client else ""
        if listener.waiting[host] >= limits.max_waiting_per_address:
            self._closing = True
            self.transport.abort()
            return
        if len(listener.connections) >= limits.max_connections and not listener.make_room():
            if len(listener.connections) >= limits.max_connections + limits.probe_reserve:
                self._closing = True
                self.transport.abort()
                return
            self._reserved = True
        self._state.connections.add(self)
        listener.connections.add(self)
        listener.waiting[host] += 1
        self._waiting = True
        self.deadline = self.loop.time() + limits.header_timeout_s
        if self._reserved:
            self.deadline = self.loop.time() + min(2.0, limits.header_timeout_s)
        listener.sweep_later(self.loop)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self.deadline = None
        self._state.connections.discard(self)
        self.listener.connections.discard(self)
        self._no_longer_waiting()
        self.resume_writing()
        for exchange in (self._exchange, *self._pipeline):
            if exchange is not None:
                exchange.gone()
        self._pipeline.clear()

    def _no_longer_waiting(self) -> None:
        if self._waiting:
            self._waiting = False
            host = self._client[0] if self._client else ""
            self.listener.waiting[host] -= 1
            if self.listener.waiting[host] <= 0:
                del self.listener.waiting[host]

    @property
    def idle(self) -> bool:
        """Between two requests, without a byte of the next."""
        return (
            self._exchange is None
            and not self._waiting
            and not self._closing
            and self._in_header
            and not self._raw_bytes
        )

    def abort(self) -> None:
        self._closing = True
        self.listener.connections.discard(self)
        if not self.transport.is_closing():
            self.transport.abort()

    def shutdown(self) -> None:
        """uvicorn stops: what is under way ends, then the connection."""
        if self._exchange is None:
            self._closing = True
            self.transport.close()
        else:
            self._exchange.keep_alive = False

    def too_late(self) -> None:
        """The deadline has passed: of a header, a pause between requests, a reply nobody reads."""
        self.deadline = None
        if self._closing or self._writing_paused or self._exchange is not None or self.idle:
            self.abort()
        elif self._raw_bytes == 0:
            self._close()
        else:
            limit_s = self.limits.header_timeout_s
            self._refuse(ApiError(408, f"the request's header did not arrive within {limit_s:g} s"))

    def pause_writing(self) -> None:
        self._writing_paused = True
        self.deadline = self.loop.time() + self.limits.write_timeout_s

    def resume_writing(self) -> None:
        if self._writing_paused:
            self._writing_paused = False
            self.deadline = None
            if self._exchange is None and not self._closing:
                self.deadline = self.loop.time() + self.limits.keep_alive_s
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    async def drain(self) -> None:
        while self._writing_paused and not self._closing:
            if self._drained is None or self._drained.done():
                self._drained = self.loop.create_future()
            await self._drained

    def write(self, data: bytes) -> None:
        if not self._closing:
            self.transport.write(data)

    def pause_reading(self) -> None:
        if not self._reading_paused and not self._closing:
            self._reading_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self._reading_paused and not self.transport.is_closing():
            self._reading_paused = False
            self.transport.resume_reading()

    def eof_received(self) -> None:
        """A client that closes its side is gone: nothing else tells that nobody reads a stream."""

    # -- what arrives -----------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        in_header = self._in_header
        if in_header:
            if not self._raw_bytes and not self._waiting and self._exchange is None:
                self.deadline = self.loop.time() + self.limits.header_timeout_s
            self._raw_bytes += len(data)
        else:
            self._framing_bytes += len(data)
        self._feed(data)
        if self._refusal is None:
            if self._in_header and self._raw_bytes > self.limits.max_header_bytes:
                self._refusal = self._too_large()
            elif not self._in_header and self._framing_bytes > (
                FRAMING_SLACK_BYTES + FRAMING_PER_BODY_BYTE * self._body_bytes
            ):
                self._refusal = ApiError(400, "the request body is mostly framing, not content")
        if self._refusal is not None:
            self._refuse(self._refusal)

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[int(upgrade.args[0]) :])
        except httptools.HttpParserError as error:
            if self._refusal is None:
                self._refusal = ApiError(400, f"the request is not valid HTTP/1.1: {error}")

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Read the request again without its wish for another protocol, and its body with it."""
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._refusal = ApiError(405, "CONNECT is not served here", code="method_not_allowed")
            return
        version = self._parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b\r\n" % (method, self._url, version)]
        for name, value in self._headers:
            if name not in _HOP_BY_HOP:
                lines.append(b"%b: %b\r\n" % (name, value))
        self._new_parser()
        self._feed(b"".join([*lines, b"\r\n"]))
        if rest and self._refusal is None:
            self._feed(rest)

    def on_message_begin(self) -> None:
        self._in_header = True
        self._url = b""
        self._headers = []
        self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value) + 4
        if self._header_bytes + len(self._url) > self.limits.max_header_bytes:
            self._refusal = self._refusal or self._too_large()
        elif self._in_header:  # else a trailer: nobody asked for it
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._refusal is not None:
            return
        if len(self._url) > self.limits.max_header_bytes:
            self._refusal = self._too_large()
            return
        parser = self._parser
        if parser.should_upgrade():
            self._upgrading = True
            return
        version = parser.get_http_version()
        hosts = [value for name, value in self._headers if name == b"host"]
        if len(hosts) > 1 or (version == "1.1" and not hosts):
            self._refusal = ApiError(400, "a request needs exactly one Host header")
            return
        try:
            url = httptools.parse_url(self._url)
            raw_path = url.path or b"/"
            path = raw_path.decode("ascii")
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
            self._refusal = ApiError(400, "the request's path is not a valid URL")
            return
        if "%" in path:
            path = unquote(path)
        if self._reserved and path not in PROBES:
            number = self.limits.max_connections
            self._refusal = overloaded(
                f"the router has {number} connections, its limit; retry later",
                code="too_many_connections",
                retry_after_s=1.0,
                status=503,
            )
            return
        self._in_header = False
        self._framing_bytes = self._body_bytes = 0
        self._no_longer_waiting()
        if not self._writing_paused:
            self.deadline = None
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "method": parser.get_method().decode("ascii"),
            "path": path,
            "raw_path": raw_path,
            "query_string": url.query or b"",
            "headers": self._headers,
            "client": self._client,
            "server": self._server,
            "scheme": self._scheme,
            "root_path": "",
            "state": self._app_state.copy() if self._app_state else {},
        }
        exchange = Exchange(self, scope, parser.should_keep_alive() and not self._reserved)
        scope["extensions"] = {"tandem.exchange": exchange}
        self._reading = exchange
        if self._exchange is None:
            self._start(exchange)
        elif len(self._pipeline) >= MAX_PIPELINED:
            self._refusal = ApiError(400, "too many requests are sent ahead of their replies")
        else:
            self._pipeline.append(exchange)
            self.pause_reading()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._framing_bytes -= min(len(body), self._framing_bytes)
        if self._reading is not None and self._refusal is None:
            self._reading.feed(body)

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        reading, self._reading = self._reading, None
        self._in_header = True
        self._raw_bytes = 0
        if reading is not None:
            reading.feed_end()
            if reading.complete and self._exchange is None:
                self.deadline = self.loop.time() + self.limits.keep_alive_s

    def _too_large(self) -> ApiError:
        return ApiError(
            431, f"request headers are larger than {self.limits.max_header_bytes} bytes"
        )

    # -- what is answered -------------------------------------------------------------------

    def _start(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._state.total_requests += 1
        task = self.loop.create_task(exchange.run(self._app))
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    def finished(self, exchange: Exchange) -> None:
        """The reply is written; the next request's turn, or the end."""
        if exchange is not self._exchange:
            return
        self._exchange = None
        if self._closing:
            return
        if not exchange.keep_alive or exchange.more_body:
            self._close()
            return
        self.deadline = self.loop.time() + self.limits.keep_alive_s
        if self._writing_paused:
            self.deadline = self.loop.time() + self.limits.write_timeout_s
        elif self._raw_bytes:
            self.deadline = self.loop.time() + self.limits.header_timeout_s
        if self._pipeline:
            self._start(self._pipeline.popleft())
        if not self._pipeline:
            self.resume_reading()

    def _refuse(self, error: ApiError) -> None:
        """The last words on this connection, unless a reply is under way."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.gone()
        if exchange is None or not exchange.started:
            body = error.body()
            lines = [
                _STATUS_LINES[error.status],
                b"content-type: application/json\r\nx-content-type-options: nosniff\r\n"
                b"connection: close\r\ncontent-length: %d\r\n" % len(body),
                *(b"%b: %b\r\n" % header for header in error.headers()),
                b"\r\n",
                body,
            ]
            self.write(b"".join(lines))
        self._close()

    def _close(self) -> None:
        """End our side and read no more of theirs; a reset would take the reply with it."""
        if self._closing:
            return
        self._closing = True
        self._no_longer_waiting()
        self.resume_reading()
        try:
            self.transport.write_eof()
        except (OSError, RuntimeError):  # they have reset it; it is closed already; it is TLS
            self.transport.close()
        self.deadline = self.loop.time() + LINGER_S


class Exchange:
    """One request and its reply: ASGI's `receive` and `send`."""

    __slots__ = (
        "_body",
        "_body_bytes",
        "_chunked",
        "_connection",
        "_gone",
        "_head",
        "_told_all",
        "_waiter",
        "complete",
        "keep_alive",
        "more_body",
        "on_gone",
        "scope",
        "started",
    )

    def __init__(self, connection: Connection, scope: Message, keep_alive: bool) -> None:
        self._connection = connection
        self.scope = scope
        self.keep_alive = keep_alive
        self._body: list[bytes] = []
        self._body_bytes = 0
        self.more_body = True
        self._told_all = False
        self._gone = False
        self._waiter: asyncio.Future[None] | None = None
        self._head: bytes | None = None
        self._chunked = False
        self.started = False
        self.complete = False
        # Called once when the client leaves before its reply is complete.
        self.on_gone: Callable[[], None] | None = None

    def whole_body(self) -> bytes | None:
        """The body if all of it is here, which `receive` then tells no more."""
        if self.more_body or self._told_all:
            return None
        self._told_all = True
        self._body_bytes = 0
        self._connection.resume_reading()
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        return body

    def feed(self, data: bytes) -> None:
        if self.complete:
            return
        self._body.append(data)
        self._body_bytes += len(data)
        if self._body_bytes > BODY_AHEAD_BYTES:
            self._connection.pause_reading()
        self._wake()

    def feed_end(self) -> None:
        self.more_body = False
        self._wake()

    def gone(self) -> None:
        if not self._gone:
            self._gone = True
            self._wake()
            if self.on_gone is not None and not self.complete:
                self.on_gone()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def receive(self) -> Message:
        connection = self._connection
        if self.more_body and not self._body and not self.started and self._expects_continue():
            connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while True:
            if self._gone or self.complete:
                return {"type": "http.disconnect"}
            if self._body or (not self.more_body and not self._told_all):
                body = b"".join(self._body)
                self._body.clear()
                self._body_bytes = 0
                connection.resume_reading()
                self._told_all = not self.more_body
                return {"type": "http.request", "body": body, "more_body": self.more_body}
            self._waiter = connection.loop.create_future()
            await self._waiter

    def _expects_continue(self) -> bool:
        return any(
            name == b"expect" and value.lower() == b"100-continue"
            for name, value in self.scope["headers"]
        )

    async def send(self, message: Message) -> None:
        connection = self._connection
        if connection._writing_paused:
            await connection.drain()
        if self._gone or self.complete:
            return
        if message["type"] == "http.response.start":
            self._begin(message)
            return
        body = message.get("body", b"")
        more = message.get("more_body", False)
        if self.scope["method"] == "HEAD":
            body = b""
        elif self._chunked:
            if body:
                body = b"%x\r\n%b\r\n" % (len(body), body)
            if not more:
                body += b"0\r\n\r\n"
        if self._head is not None:
            body, self._head = self._head + body, None
            self.started = True
        if body:
            connection.write(body)
        if not more:
            self.complete = True
            self._wake()
            connection.finished(self)

    def _begin(self, message: Message) -> None:
        status = message["status"]
        parts = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        for name, value in self._connection._state.default_headers:
            parts.append(b"%b: %b\r\n" % (name, value))
        sized = status in (204, 304)
        for name, value in message["headers"]:
            if name == b"content-length":
                sized = True
            elif name == b"connection" and value.lower() == b"close":
                self.keep_alive = False
                continue
            parts.append(b"%b: %b\r\n" % (name, value))
        old = self.scope["http_version"] == "1.0"
        if not sized and self.scope["method"] != "HEAD":
            if old:
                self.keep_alive = False  # the end of the connection is the end of the body
            else:
                self._chunked = True
                parts.append(b"transfer-encoding: chunked\r\n")
        if not self.keep_alive or self.more_body:
            parts.append(b"connection: close\r\n")
        elif old:
            parts.append(b"connection: keep-alive\r\n")
        parts.append(b"\r\n")
        self._head = b"".join(parts)

    async def run(self, app: Callable[..., Any]) -> None:
        failed = False
        try:
            await app(self.scope, self.receive, self.send)
        except Exception:
            logger.exception("a request failed inside the router")
            failed = True
        if self.complete or self._gone:
            return
        if self.started:
            self._connection.abort()  # half a reply must not look like a whole one
        else:
            if not failed:
                logger.error("the application sent no reply to %s", self.scope["path"][:200])
            self._connection._refuse(
                ApiError(500, "the router failed on this request", type="server_error")
            )


def _address(name: Any) -> tuple[str, int] | None:
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) and len(name) >= 2 else None
