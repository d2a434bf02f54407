"""How a client's connection becomes ASGI requests, with everything it may hold bounded first.

uvicorn listens, drains and stops; this protocol reads in its place. It answers what cannot be
passed on with OpenAI error objects: headers that are too large (431) or too slow (408), malformed
messages (400), connections above the cap (503; probes have a reserve). A client that does not
read its reply loses the connection. An upgrade nobody speaks (`h2c`) is ignored, as RFC 9110
(7.8) allows, and its request answered with its body.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast
from urllib.parse import unquote

import httptools
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from tandem_router.errors import ApiError, overloaded
from tandem_router.http.eager import EagerRun
from tandem_router.http.exchange import STATUS_LINES, Direct, Exchange
from tandem_router.http.known_heads import Head, KnownHeads

PROBES = frozenset({"/health", "/ready", "/metrics"})
MAX_PIPELINED = 16
MOST_URL_KEPT = 256  # bytes; longer ones are read anew each time
# Bytes of chunk headers, extensions and trailers beside the body that they frame.
FRAMING_SLACK_BYTES, FRAMING_PER_BODY_BYTE = 64 * 1024, 8
SWEEP_S = 0.5
LINGER_S = 2.0
_OF_PROXIES = frozenset({b"x-forwarded-for", b"x-forwarded-proto"})
_HOP_BY_HOP = frozenset({b"upgrade", b"http2-settings", b"connection"})


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
        self.default_headers: list[tuple[bytes, bytes]] = []
        self.default_lines = b""
        self.heads = KnownHeads()

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
        self._app = self._unproxied = config.loaded_app
        if isinstance(self._app, ProxyHeadersMiddleware):
            self._unproxied = self._app.app  # most requests come through no proxy
        self._direct: Direct | None = getattr(self._unproxied, "direct", None)
        self._state = server_state
        self._app_state = app_state
        self.loop = _loop or asyncio.get_event_loop()
        self.limits = self.listener.limits
        self.deadline: float | None = None
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._client: tuple[str, int] | None = None
        self._server: tuple[str, int] | None = None
        self.address = ""  # the client's, without its port
        self._scheme = "http"
        self._waiting = False  # counted among those without a first request
        self._reserved = False
        self.closing = False
        self._drained: asyncio.Future[None] | None = None
        self.writing_paused = False
        self._reading_paused = False
        self._exchange: Exchange | None = None
        self._pipeline: deque[Exchange] = deque()
        self._reading: Exchange | None = None  # the one whose body is arriving
        self._last_head: Head | None = None
        self._begun: Exchange | None = None  # the one whose head came last
        self._framing_bytes = 0
        self._fed_bytes = 0  # of the bytes being read now
        self._body_bytes = 0
        self._refusal: ApiError | None = None
        self._new_parser()

    def _new_parser(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._in_header = True
        self._upgrading = False
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._trailer_bytes = 0
        self._raw_bytes = 0

    def default_lines(self) -> bytes:
        """What uvicorn adds to every reply; it makes another list of it each second."""
        headers = self._state.default_headers
        listener = self.listener
        if headers is not listener.default_headers:
            listener.default_headers = headers
            listener.default_lines = b"".join([b"%b: %b\r\n" % each for each in headers])
        return listener.default_lines

    # -- the connection ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._client = _address(transport.get_extra_info("peername"))
        self._server = _address(transport.get_extra_info("sockname"))
        if transport.get_extra_info("sslcontext"):
            self._scheme = "https"
        listener, limits = self.listener, self.limits
        host = self.address = self._client[0] if self._client else ""
        if listener.waiting[host] >= limits.max_waiting_per_address:
            self.closing = True
            self.transport.abort()
            return
        if len(listener.connections) >= limits.max_connections and not listener.make_room():
            if len(listener.connections) >= limits.max_connections + limits.probe_reserve:
                self.closing = True
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
        self.closing = True
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
            host, waiting = self.address, self.listener.waiting
            waiting[host] -= 1
            if waiting[host] <= 0:
                del waiting[host]

    @property
    def idle(self) -> bool:
        """Between two requests, without a byte of the next."""
        return (
            self._exchange is None
            and not self._waiting
            and not self.closing
            and self._in_header
            and not self._raw_bytes
        )

    def abort(self) -> None:
        self.closing = True
        self.listener.connections.discard(self)
        if not self.transport.is_closing():
            self.transport.abort()

    def shutdown(self) -> None:
        """uvicorn stops: what is under way ends, then the connection."""
        if self._exchange is None:
            self.closing = True
            self.transport.close()
        else:
            self._exchange.keep_alive = False

    def too_late(self) -> None:
        """The deadline has passed: of a header, a pause between requests, a reply nobody reads."""
        self.deadline = None
        if self.closing or self.writing_paused or self._exchange is not None or self.idle:
            self.abort()
        elif self._raw_bytes == 0:
            self._close()
        else:
            limit_s = self.limits.header_timeout_s
            self.refuse(ApiError(408, f"the request's header did not arrive within {limit_s:g} s"))

    def pause_writing(self) -> None:
        self.writing_paused = True
        self.deadline = self.loop.time() + self.limits.write_timeout_s
        exchange = self._exchange
        if exchange is not None and exchange.on_congested is not None:
            exchange.on_congested()

    def resume_writing(self) -> None:
        if self.writing_paused:
            self.writing_paused = False
            self.deadline = None
            if self._exchange is None and not self.closing:
                self.deadline = self.loop.time() + self.limits.keep_alive_s
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        exchange = self._exchange
        if exchange is not None and exchange.on_drained is not None:
            exchange.on_drained()

    async def drain(self) -> None:
        while self.writing_paused and not self.closing:
            if self._drained is None or self._drained.done():
                self._drained = self.loop.create_future()
            await self._drained

    def write(self, data: bytes) -> None:
        if not self.closing:
            self.transport.write(data)

    def pause_reading(self) -> None:
        if not self._reading_paused and not self.closing:
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
        if self.closing:
            return
        # Nothing of a request is here yet, and none is being answered: most begin so.
        fresh = self._in_header and not self._raw_bytes and self._exchange is None
        if fresh and not self._reserved:
            last = self._last_head  # a client sends the same one again
            body = last.body_in(data) if last is not None else None
            if last is not None and body is not None:
                self._take(last, body)
                return
            if (known := self.listener.heads.find(data)) is not None:
                self._last_head = known[0]
                self._take(*known)
                return
        self._begun = None
        self._fed_bytes = len(data)
        if self._in_header:
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
            self.refuse(self._refusal)
        elif fresh and self._begun is not None:
            exchange = self._begun
            if not exchange.more_body and not self._reserved:
                scope, names = exchange.scope, dict(exchange.names)
                self.listener.heads.remember(
                    data, dict(scope), scope["headers"], names, exchange.keep_alive
                )

    def _take(self, head: Head, body: bytes) -> None:
        """A whole request whose head has been read before; the parser does not see it."""
        if self._waiting:
            self._no_longer_waiting()
        if not self.writing_paused:
            self.deadline = None
        self._start(Exchange(self, None, head.names, head.keep_alive, head, body))

    def scope_of(self, head: Head, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
        """ASGI's view of a request with a known head."""
        return {
            **head.scope,
            "headers": headers,
            "client": self._client,
            "server": self._server,
            "scheme": self._scheme,
            "state": self._app_state.copy() if self._app_state else {},
        }

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
        self._trailer_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_header:
            self._headers.append((name.lower(), value))
        else:  # a trailer: nobody asked for it
            self._trailer_bytes += len(name) + len(value) + 4
            if self._trailer_bytes > self.limits.max_header_bytes:
                self._refusal = self._refusal or self._too_large()

    def on_headers_complete(self) -> None:
        if self._refusal is not None:
            return
        headers = self._headers
        names = dict(headers)
        limit = self.limits.max_header_bytes
        if self._raw_bytes + self._fed_bytes > limit:  # else its header cannot be larger either
            num_bytes = sum(len(name) + len(value) + 4 for name, value in headers)
            if num_bytes + len(self._url) > limit:
                self._refusal = self._too_large()
                return
        parser = self._parser
        if parser.should_upgrade():
            self._upgrading = True
            return
        version = parser.get_http_version()
        num_hosts = int(b"host" in names)
        if len(names) != len(headers):
            num_hosts = sum(name == b"host" for name, _ in headers)
        if num_hosts > 1 or (version == "1.1" and not num_hosts):
            self._refusal = ApiError(400, "a request needs exactly one Host header")
            return
        try:
            split = _split_url if len(self._url) <= MOST_URL_KEPT else _split_url.__wrapped__
            path, raw_path, query = split(self._url)
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
            self._refusal = ApiError(400, "the request's path is not a valid URL")
            return
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
        if not self.writing_paused:
            self.deadline = None
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "method": parser.get_method().decode("ascii"),
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": headers,
            "client": self._client,
            "server": self._server,
            "scheme": self._scheme,
            "root_path": "",
            "state": self._app_state.copy() if self._app_state else {},
        }
        keep_alive = parser.should_keep_alive() and not self._reserved
        exchange = Exchange(self, scope, names, keep_alive)
        scope["extensions"] = {"tandem.exchange": exchange}
        self._reading = self._begun = exchange
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
        state = self._state
        state.total_requests += 1
        direct, tasks = self._direct, state.tasks
        answer = direct(exchange) if direct is not None and exchange.head is not None else None
        # Forgotten by `Exchange.run`: a callback of the task's would be a turn of the loop.
        if answer is not None:
            run = exchange.task = EagerRun(exchange.run(answer, tasks), self.loop)
            tasks.add(run)
            run.go_on()
            return
        app = self._unproxied if _OF_PROXIES.isdisjoint(exchange.names) else self._app
        answer = app(exchange.scope, exchange.receive, exchange.send)
        task = exchange.task = self.loop.create_task(exchange.run(answer, tasks))
        tasks.add(task)

    def finished(self, exchange: Exchange) -> None:
        """The reply is written; the next request's turn, or the end."""
        if exchange is not self._exchange:
            return
        self._exchange = None
        if self.closing:
            return
        if not exchange.keep_alive or exchange.more_body:
            self._close()
            return
        self.deadline = self.loop.time() + self.limits.keep_alive_s
        if self.writing_paused:
            self.deadline = self.loop.time() + self.limits.write_timeout_s
        elif self._raw_bytes:
            self.deadline = self.loop.time() + self.limits.header_timeout_s
        if self._pipeline:
            self._start(self._pipeline.popleft())
        if self._reading_paused and not self._pipeline:
            self.resume_reading()

    def refuse(self, error: ApiError) -> None:
        """The last words on this connection, unless a reply is under way."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.gone()
        if exchange is None or not exchange.started:
            body = error.body()
            lines = [
                STATUS_LINES[error.status],
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
        if self.closing:
            return
        self.closing = True
        self._no_longer_waiting()
        self.resume_reading()
        try:
            self.transport.write_eof()
        except (OSError, RuntimeError):  # they have reset it; it is closed already; it is TLS
            self.transport.close()
        self.deadline = self.loop.time() + LINGER_S


@lru_cache(maxsize=1024)
def _split_url(url: bytes) -> tuple[str, bytes, bytes]:
    """(path, path as sent, query). Clients ask for few URLs, again and again."""
    parts = httptools.parse_url(url)
    raw_path = parts.path or b"/"
    path = raw_path.decode("ascii")
    return unquote(path) if "%" in path else path, raw_path, parts.query or b""


def _address(name: Any) -> tuple[str, int] | None:
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) and len(name) >= 2 else None
