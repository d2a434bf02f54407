"""One request and its reply as ASGI's `receive` and `send`, over a client's connection."""

from __future__ import annotations

import asyncio
import http
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Protocol

from tandem_router.errors import ApiError
from tandem_router.http.eager import EagerRun

if TYPE_CHECKING:
    from tandem_router.http.known_heads import Head

logger = logging.getLogger("tandem.router")

# Read ahead of the application, per request.
BODY_AHEAD_BYTES = 64 * 1024
STATUS_LINES = {
    status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode())
    for status in http.HTTPStatus
}

Message = MutableMapping[str, Any]
# An application's own way for an exchange; None: it has to be asked as ASGI says.
Direct = Callable[["Exchange"], Awaitable[None] | None]


class ClientConnection(Protocol):
    """What an exchange knows of the connection that it is on (`http.server` has them)."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    address: str
    closing: bool
    writing_paused: bool

    def default_lines(self) -> bytes: ...
    def scope_of(self, head: Head, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]: ...
    def write(self, data: bytes) -> None: ...
    async def drain(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def finished(self, exchange: Exchange) -> None: ...
    def refuse(self, error: ApiError) -> None: ...
    def abort(self) -> None: ...


class Exchange:
    """One request and its reply: ASGI's `receive` and `send`."""

    # What most requests leave as it is, so that making one costs little.
    _body_bytes = 0
    _length = 0
    _told_all = False
    more_body = False
    _body: list[bytes]
    _gone = False
    _waiter: asyncio.Future[None] | None = None
    _whole: bytes | None = None  # the body of a request whose head is known, until it is told
    _reply_head: bytes | None = None
    _chunked = False
    started = False
    complete = False
    # Called once when the client leaves before its reply is complete.
    on_gone: Callable[[], None] | None = None
    # Called when the client reads slower than it is written to.
    on_congested: Callable[[], None] | None = None
    # Called when a client that was slow has read what was written.
    on_drained: Callable[[], None] | None = None
    task: asyncio.Task[None] | EagerRun | None = None

    def __init__(
        self,
        connection: ClientConnection,
        scope: Message | None,
        names: Mapping[bytes, bytes],
        keep_alive: bool,
        head: Head | None = None,
        body: bytes | None = None,
    ) -> None:
        """head, body: of a request whose head is known, with all of its body; scope: of others."""
        self.connection = connection
        self._scope = scope
        self.head = head
        about = head.scope if head is not None else scope
        assert about is not None
        self.method: str = about["method"]
        self.version: str = about["http_version"]
        # Headers by name, the last of those with one name: whether there is one is seen at once.
        self.names = names
        self.keep_alive = keep_alive
        if body is not None:
            self._whole, self._length = body, len(body)
        else:
            self.more_body, self._body = True, []

    @property
    def scope(self) -> Message:
        """As ASGI has it."""
        scope = self._scope
        if scope is None:
            assert self.head is not None
            headers = self.head.headers_with(self._length)
            scope = self._scope = self.connection.scope_of(self.head, headers)
            scope["extensions"] = {"tandem.exchange": self}
        return scope

    @staticmethod
    def of(send: object) -> Exchange | None:
        """The exchange whose `send` this is; None where another server's, or something between."""
        owner = getattr(send, "__self__", None)
        return owner if isinstance(owner, Exchange) else None

    def whole_body(self) -> bytes | None:
        """The body if all of it is here, which `receive` then tells no more."""
        if self.more_body or self._told_all:
            return None
        self._told_all = True
        whole = self._whole
        if whole is not None:
            self._whole = None
            return whole
        self._body_bytes = 0
        self.connection.resume_reading()
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        return body

    def feed(self, data: bytes) -> None:
        if self.complete:
            return
        self._body.append(data)
        self._body_bytes += len(data)
        if self._body_bytes > BODY_AHEAD_BYTES:
            self.connection.pause_reading()
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
        connection = self.connection
        if self._whole is not None:
            self._body, self._whole = [self._whole], None
        if self.more_body and not self._body and not self.started and self._expects_continue():
            connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while True:
            if self._gone or self.complete:
                return {"type": "http.disconnect"}
            if (not self._told_all and not self.more_body) or (self.more_body and self._body):
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
        if self.connection.writing_paused:
            await self.connection.drain()
        if message["type"] == "http.response.start":
            self.begin(message["status"], message["headers"])
        else:
            self.write(message.get("body", b""), message.get("more_body", False))

    def write(self, body: bytes, more: bool) -> None:
        """A part of the reply's body, its last where there is no `more`; not while congested."""
        if self._gone or self.complete:
            return
        if self._chunked:
            if body:
                body = b"%x\r\n%b\r\n" % (len(body), body)
            if not more:
                body += b"0\r\n\r\n"
        elif self.method == "HEAD":
            body = b""
        if self._reply_head is not None:
            body, self._reply_head = self._reply_head + body, None
            self.started = True
        connection = self.connection
        if body:
            connection.write(body)
        if not more:
            self.complete = True
            self._wake()
            connection.finished(self)

    @property
    def relays_chunks(self) -> bool:
        """Whether what follows are chunks, the reply's head is written: they may be, as they are,
        to the connection's transport until it is `closing`."""
        return self._chunked and self._reply_head is None

    def begin(
        self,
        status: int,
        headers: Collection[tuple[bytes, bytes]],
        length: int | None = None,
    ) -> None:
        """The reply's head; sent with the first part of its body.

        length: of the body, where the headers do not say it.
        """
        if self._gone or self.complete:
            return
        sized = length is not None or status in (204, 304)
        if length is None:
            kept = []
            for header in headers:
                name = header[0]
                if name == b"content-length":
                    sized = True
                elif name == b"connection" and header[1].lower() == b"close":
                    self.keep_alive = False
                    continue
                kept.append(header)
            headers = kept
        lines = b"".join([b"%b: %b\r\n" % header for header in headers])
        if length is not None:
            lines += b"content-length: %d\r\n" % length
        self._reply_head = self._head(status, lines, sized)

    def begin_stream(self, lines: bytes) -> None:
        """As `begin` with status 200 and no length; lines: the headers as they are written."""
        if not self._gone and not self.complete:
            self._reply_head = self._head(200, lines, False)

    def reply(self, lines: bytes, body: bytes) -> None:
        """A whole reply with status 200 at once; not while congested."""
        if self._gone or self.complete:
            return
        lines = b"%bcontent-length: %d\r\n" % (lines, len(body))
        head = self._head(200, lines, True)
        self.started = self.complete = True
        connection = self.connection
        connection.write(head if self.method == "HEAD" else head + body)
        self._wake()
        connection.finished(self)

    def _head(self, status: int, lines: bytes, sized: bool) -> bytes:
        """The reply's head, with what says where it ends and whether the connection goes on."""
        old = self.version == "1.0"
        if not sized and self.method != "HEAD":
            if old:
                self.keep_alive = False  # the end of the connection is the end of the body
            else:
                self._chunked = True
                lines += b"transfer-encoding: chunked\r\n"
        if not self.keep_alive or self.more_body:
            lines += b"connection: close\r\n"
        elif old:
            lines += b"connection: keep-alive\r\n"
        first = STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
        return b"%b%b%b\r\n" % (first, self.connection.default_lines(), lines)

    async def run(
        self,
        answer: Awaitable[None],
        tasks: set[asyncio.Task[None] | EagerRun],
    ) -> None:
        """See that what answers the request does so, and let go of it."""
        failed = False
        try:
            await answer
        except Exception:
            logger.exception("a request failed inside the router")
            failed = True
        finally:
            if self.task is not None:
                tasks.discard(self.task)
                self.task = None
        if self.complete or self._gone:
            return
        if self.started:
            self.connection.abort()  # half a reply must not look like a whole one
        else:
            if not failed:
                logger.error("the application sent no reply to %s", self.scope["path"][:200])
            self.connection.refuse(
                ApiError(500, "the router failed on this request", type="server_error")
            )
