"""A socket that sends many buffers in one call and receives into many, without copies.

asyncio streams copy every byte through their own buffers; KV blocks are read from and written to
the cache tensors themselves (sendmsg and recvmsg_into).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Sequence

from tandem_worker.transfer.errors import PeerUnreachableError, ProtocolError
from tandem_worker.transfer.frame_reader import decode_header, decode_meta
from tandem_worker.transfer.frames import (
    HEADER_BYTES,
    Frame,
    Header,
    encode,
)

try:
    _IOV_MAX = min(1024, os.sysconf("SC_IOV_MAX"))
except (ValueError, OSError, AttributeError):
    _IOV_MAX = 16

# one call moves at most this much, then other tasks of the event loop get a turn
_SLICE_BYTES = (1 << 20) + (1 << 16)
_DISCARD = bytearray(1 << 16)
# headers and fields of several small frames; data beyond this is received where it belongs
_SPILL_BYTES = 1 << 12


def parse_address(address: str) -> tuple[str, int]:
    """`10.0.0.7:8200` or `[::1]:8200` as host and port; raises `PeerUnreachableError`."""
    host, separator, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isascii() or not port.isdigit():
        raise PeerUnreachableError(f"KV address {address!r} is not IP:PORT, as in 10.0.0.7:8200")
    number = int(port)
    if not 1 <= number <= 65535:
        raise PeerUnreachableError(f"KV address {address!r} has port {number}, outside 1..65535")
    return host, number


def format_address(host: str, port: int) -> str:
    """The inverse of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def tune(sock: socket.socket) -> None:
    """No delay for small frames; a peer whose machine vanished is noticed within 15 s."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 5),
        ("TCP_KEEPINTVL", 3),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 15000),
    ):
        option = getattr(socket, name, None)
        if option is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


class Wire:
    """One connected, non-blocking stream socket.

    One task reads; sending is serialised by a lock. Every wait without progress is bounded by
    `stall_s` (`PeerUnreachableError`), except the wait for the first byte of a frame, which may be
    long. `ConnectionError` (an `OSError`) means that the connection ended.
    """

    def __init__(self, sock: socket.socket, stall_s: float = 30.0) -> None:
        self._sock = sock
        self._fd = sock.fileno()
        self._stall_s = stall_s
        self._loop = asyncio.get_running_loop()
        self._send_lock = asyncio.Lock()
        self._waits: dict[bool, asyncio.Future[None]] = {}  # writable? -> waiter
        self._spill = memoryview(bytearray(_SPILL_BYTES))
        self._spilled = (0, 0)  # start and end of what is read and not yet used
        self.closed = False

    async def read_header(self) -> Header | None:
        """The next frame's header, or None when the peer closed between frames."""
        start, end = self._spilled
        if start == end:
            end = await self._recv([self._spill], None)
            if end == 0:
                return None
            self._spilled = (0, end)
        raw = bytearray(HEADER_BYTES)
        await self._fill([memoryview(raw)])
        return decode_header(bytes(raw))

    async def read_meta(self, header: Header) -> Frame:
        """The fields that follow a header."""
        raw = bytearray(header.meta_length)
        await self._fill([memoryview(raw)])
        return decode_meta(header, bytes(raw))

    async def read_into(self, views: Sequence[memoryview]) -> None:
        """Fill the views in order with the data of a frame."""
        await self._fill(list(views))

    async def discard(self, num_bytes: int) -> None:
        """Read data that nobody wants."""
        view = memoryview(_DISCARD)
        while num_bytes:
            part = min(num_bytes, len(view))
            await self._fill([view[:part]])
            num_bytes -= part

    async def send(self, frame: Frame) -> None:
        """Send a frame without data; see `send_views`."""
        await self.send_views([memoryview(encode(frame))])

    async def send_views(self, views: Sequence[memoryview]) -> None:
        """Send encoded frames and their data; a cancelled or failed send closes the connection."""
        async with self._send_lock:
            try:
                await self._send_views(list(views))
            except BaseException:
                self.close()  # the peer waits for the rest of a frame that never comes
                raise

    async def linger(self, timeout_s: float = 0.5) -> None:
        """Let the peer read what was sent last (closing at once would reset it away)."""
        with contextlib.suppress(OSError, TimeoutError, PeerUnreachableError):
            self._sock.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(timeout_s):
                while await self._recv([memoryview(_DISCARD)], timeout_s):
                    pass

    def close(self) -> None:
        """End the connection at once and wake every waiter with `ConnectionResetError`."""
        if self.closed:
            return
        self.closed = True
        if not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
        for future in self._waits.values():
            if not future.done():
                future.set_exception(ConnectionResetError("the connection was closed"))
        self._waits.clear()
        self._sock.close()

    async def _fill(self, views: list[memoryview]) -> None:
        """Fill the views in order; what comes after them in the same call is kept in the spill.

        So a small frame costs one call, and large data still goes straight into the views.
        """
        views = [view for view in views if len(view)]
        start, end = self._spilled
        while views and start < end:
            count = min(len(views[0]), end - start)
            views[0][:count] = self._spill[start : start + count]
            start += count
            _advance(views, count)
        self._spilled = (start, end)
        while views:
            head, num_wanted, is_all = _head(views)
            if is_all:
                head.append(self._spill)
            count = await self._recv(head, self._stall_s)
            if count == 0:
                raise ConnectionResetError("the peer closed the connection inside a frame")
            if count >= num_wanted:
                self._spilled = (0, count - num_wanted)
            _advance(views, min(count, num_wanted))
            if views and count >= _SLICE_BYTES:
                await asyncio.sleep(0)

    async def _recv(self, views: list[memoryview], stall_s: float | None) -> int:
        while True:
            if self.closed:
                raise ConnectionResetError("the connection was closed")
            try:
                return self._sock.recvmsg_into(views)[0]
            except (BlockingIOError, InterruptedError):
                await self._ready(False, stall_s)

    async def _send_views(self, views: list[memoryview]) -> None:
        views = [view for view in views if len(view)]
        while views:
            if self.closed:
                raise ConnectionResetError("the connection was closed")
            try:
                count = self._sock.sendmsg(_head(views)[0])
            except (BlockingIOError, InterruptedError):
                await self._ready(True, self._stall_s)
                continue
            _advance(views, count)
            if views and count >= _SLICE_BYTES:
                await asyncio.sleep(0)

    async def _ready(self, writable: bool, stall_s: float | None) -> None:
        if self.closed:
            raise ConnectionResetError("the connection was closed")
        future: asyncio.Future[None] = self._loop.create_future()
        self._waits[writable] = future
        add: Callable[..., object] = self._loop.add_writer if writable else self._loop.add_reader
        add(self._fd, _wake, future)
        timer = None
        if stall_s is not None:
            timer = self._loop.call_later(stall_s, _stalled, future, stall_s, writable)
        try:
            await future
        finally:
            if timer is not None:
                timer.cancel()
            if not self.closed:
                self._waits.pop(writable, None)
                remove = self._loop.remove_writer if writable else self._loop.remove_reader
                remove(self._fd)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _stalled(future: asyncio.Future[None], stall_s: float, writable: bool) -> None:
    if not future.done():
        what = "took no byte" if writable else "sent no byte"
        future.set_exception(
            PeerUnreachableError(f"the KV peer {what} for {stall_s:g} s inside a frame")
        )


def _head(views: list[memoryview]) -> tuple[list[memoryview], int, bool]:
    """The first views, at most a slice of bytes and as many as one call takes.

    Returns them, their bytes, and whether they are all there is.
    """
    head: list[memoryview] = []
    room = _SLICE_BYTES
    for view in views[: _IOV_MAX - 1]:
        head.append(view[:room])
        room -= len(head[-1])
        if room == 0:
            break
    is_all = len(head) == len(views) and len(head[-1]) == len(views[-1])
    return head, _SLICE_BYTES - room, is_all


def _advance(views: list[memoryview], count: int) -> None:
    """Drop `count` bytes from the front, in place."""
    done = 0
    while count and count >= len(views[done]):
        count -= len(views[done])
        done += 1
    del views[:done]
    if count:
        views[0] = views[0][count:]


async def read_frame(wire: Wire) -> Frame:
    """The next frame, which must carry no data and must come within the stall time."""
    async with asyncio.timeout(wire._stall_s):
        header = await wire.read_header()
        if header is None:
            raise ConnectionResetError("the peer closed the connection")
        if header.data_length:
            raise ProtocolError(f"{header.kind.name} frame where a reply was expected")
        return await wire.read_meta(header)
