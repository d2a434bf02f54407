"""A reply that is read while it arrives: its consumer waits on it, pauses its worker by being slow,
and gives it up by closing it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Protocol

from tandem_router.errors import TimedOutError, UpstreamError
from tandem_router.http.deadlines import Deadlines
from tandem_router.http.eager import Waited

# A response whose consumer is slower than its worker stops being read beyond this many bytes.
PAUSE_ABOVE_BYTES = 256 * 1024


def _drop(_: bytes) -> None:
    """For what nobody wants to read."""


class ReplyConnection(Protocol):
    """What a reply knows of the connection that it comes on (`connection_pool` has them)."""

    transport: asyncio.Transport | None
    response: Response | None
    deadlines: Deadlines

    @property
    def name(self) -> str: ...
    def abort(self) -> None: ...


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
    encoding: bytes | None = None  # of its content
    _buffered = 0
    _paused = False
    done = False  # nothing more will arrive
    _error: UpstreamError | None = None
    _is_watched = False
    _stall_s = math.inf
    _begin_by = math.inf
    _sent_at = 0.0
    _more_s: Callable[[float, float], float] | None = None
    has_begun = False  # it is an answer, as whoever reads it says
    _sink: Callable[[bytes], None] | None = None
    _pass_on: Callable[[bytes], bool] | None = None

    def __init__(self, connection: ReplyConnection, loop: asyncio.AbstractEventLoop) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.last_data = loop.time()
        self._loop = loop
        self._connection: ReplyConnection | None = connection
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

    def watch(
        self,
        stall_s: float,
        begin_s: float | None = None,
        more_s: Callable[[float, float], float] | None = None,
    ) -> None:
        """Fail the reply after stall_s without a byte, or begin_s without `began` being called.

        A provider that keeps a connection alive and answers nothing sends bytes, too. more_s: asked
        whenever that time is over how much longer it may take, with the time now and when it was
        sent: nearly all have begun by then.
        """
        connection = self._connection
        if connection is None:
            return
        now, self._stall_s, self._is_watched = self.last_data, stall_s, True
        due = now + stall_s
        if begin_s is not None:
            self._sent_at, self._more_s = now, more_s
            begin_by = self._begin_by = now + begin_s
            if begin_by < due:
                due = begin_by
        connection.deadlines.watch(self, due)

    def began(self) -> None:
        """The answer has begun: from here only silence ends it."""
        self._begin_by = math.inf
        self.has_begun = True

    def due(self, now: float) -> float:
        """When it may be late, after `now`; fails a reply that is."""
        due, why = self.last_data + self._stall_s, f"no byte for {self._stall_s:g} s"
        if self._paused:
            due = now + self._stall_s  # it is we who do not read
        more_s = self._more_s
        if more_s is not None and self._begin_by <= now:
            self._begin_by = now + more_s(now, self._sent_at)
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
        self._begin_by, self._more_s = self._loop.time() + within_s, None
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
