"""What a connection to a worker may hold before it has shown the peer token, and while it sends.

uvicorn reads headers without a bound and keeps any number of silent connections. This protocol
answers headers that are too large (431) or too slow (408) with error objects, drops a client that
does not read its reply, and keeps a bounded number of strangers: connections that have not shown
the token. Where one more comes, the stranger that has been silent longest goes, so that probes and
the router always get in.
"""

from __future__ import annotations

import asyncio
import json
import resource
from dataclasses import dataclass, field
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tandem_worker.errors import RequestError

MAX_PIPELINED = 16
_LINGER_S = 2.0
_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


class _Refused(Exception):
    """Leaves the parser; the protocol knows why."""


def _most() -> int:
    """Half of the files that this process may open."""
    return min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


@dataclass(eq=False)
class Strangers:
    """The connections of one listener that have not shown the token, oldest first.

    Attributes:
        most: So many are kept.
        max_header_bytes: Of request line and headers, and of trailers.
        header_timeout_s: From a connection's, or a request's, first moment to the end of its
            headers.
        write_timeout_s: How long a client may leave a full buffer unread.
    """

    most: int = field(default_factory=_most)
    max_header_bytes: int = 32 * 1024
    header_timeout_s: float = 10.0
    write_timeout_s: float = 60.0
    kept: dict[WorkerProtocol, None] = field(default_factory=dict)

    def protocol(self, **settings: Any) -> WorkerProtocol:
        """For uvicorn: a new connection's protocol."""
        return WorkerProtocol(self, **settings)

    def came(self, connection: WorkerProtocol) -> bool:
        """Whether a new connection may stay; another one may have to go for it."""
        if len(self.kept) >= self.most:
            silent = next((each for each in self.kept if not each.is_answering), None)
            if silent is None:
                return False
            del self.kept[silent]
            silent.transport.abort()
        self.kept[connection] = None
        return True


class WorkerProtocol(HttpToolsProtocol):
    """uvicorn's, with bounds."""

    def __init__(self, strangers: Strangers, **settings: Any) -> None:
        super().__init__(**settings)
        self._strangers = strangers
        self._in_header = True
        self._header_bytes = 0
        self._trailer_bytes = 0
        self._refusal: tuple[int, str] | None = None
        self._ended = False
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    @property
    def is_answering(self) -> bool:
        """Whether a request of this connection is being served."""
        return self.cycle is not None and not self.cycle.response_complete

    def known(self) -> None:
        """A request has shown the token."""
        self._strangers.kept.pop(self, None)

    # -- the connection --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._strangers.came(self):
            self._expect_header()
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.known()
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._ended or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        if self._in_header:
            self._header_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # nothing else is spoken here: RFC 9110 (7.8) lets a server ignore the wish
        except httptools.HttpParserError:
            self._refuse(*(self._refusal or (400, "the request is not valid HTTP/1.1")))
        else:
            if self._in_header and self._header_bytes > self._strangers.max_header_bytes:
                self._refuse(*self._too_large())

    def pause_writing(self) -> None:
        super().pause_writing()
        limit_s = self._strangers.write_timeout_s
        self._write_timer = self.loop.call_later(limit_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    # -- what the parser finds -------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = cast(Any, {"tandem.connection": self})
        self._in_header = True
        self._trailer_bytes = 0
        self._expect_header()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_header:
            super().on_header(name, value)
            return
        self._trailer_bytes += len(name) + len(value)  # nobody asked for trailers
        if self._trailer_bytes > self._strangers.max_header_bytes:
            self._give_up(*self._too_large())

    def on_headers_complete(self) -> None:
        self._in_header = False
        self._header_bytes = 0
        self._stop_timers()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self._strangers.max_header_bytes:
            self._give_up(*self._too_large())
        if len(self.pipeline) >= MAX_PIPELINED:
            self._give_up(400, "too many requests are sent ahead of their replies")
        super().on_headers_complete()

    # -- what is refused -------------------------------------------------------------------------

    def _expect_header(self) -> None:
        self._stop_timers()
        self._timer = self.loop.call_later(self._strangers.header_timeout_s, self._too_slow)

    def _stop_timers(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _too_slow(self) -> None:
        limit_s = self._strangers.header_timeout_s
        self._refuse(408, f"the request's headers did not arrive within {limit_s:g} s")

    def _too_large(self) -> tuple[int, str]:
        limit = self._strangers.max_header_bytes
        return 431, f"request headers are larger than {limit} bytes"

    def _give_up(self, status: int, message: str) -> None:
        self._refusal = (status, message)
        raise _Refused

    def _refuse(self, status: int, message: str) -> None:
        """The last words on this connection, unless a reply is under way."""
        if not self.transport.is_closing() and not self.is_answering:
            body = json.dumps(RequestError(message, status=status).body()).encode()
            head = (
                f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\n"
                f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self._end()

    def _end(self) -> None:
        """End our side and read no more of theirs; a reset would take the reply with it."""
        if self._ended or self.transport.is_closing():
            return
        self._ended = True
        self._stop_timers()
        if self.is_answering:
            self.transport.close()
            return
        try:
            self.transport.write_eof()
        except (OSError, RuntimeError):  # they have reset it
            self.transport.close()
            return
        self._timer = self.loop.call_later(_LINGER_S, self.transport.abort)
