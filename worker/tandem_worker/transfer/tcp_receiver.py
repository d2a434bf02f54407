"""Receives pushed KV blocks over TCP, straight into the cache."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import itertools
import logging
import os
import socket
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tandem_worker.transfer.async_reservations import Clock, ReservationDesk, ReservationHandle
from tandem_worker.transfer.credits import CreditWindows
from tandem_worker.transfer.errors import (
    AuthenticationError,
    BlockConflictError,
    ChecksumError,
    ClosedError,
    IncompleteError,
    PeerUnreachableError,
    ProtocolError,
    ReservationBusyError,
    TransferError,
    error_from_wire,
    printable,
)
from tandem_worker.transfer.frames import (
    NONCE_BYTES,
    VERSION,
    Abort,
    Blocks,
    Challenge,
    Credit,
    Error,
    Finish,
    Finished,
    Header,
    Hello,
    Open,
    Opened,
    Stopped,
    Tokens,
    Welcome,
    receiver_mac,
    sender_mac,
    tokens_of,
)
from tandem_worker.transfer.interface import TransferStats
from tandem_worker.transfer.kv_memory import KVPool
from tandem_worker.transfer.layout import KVLayout
from tandem_worker.transfer.wire import Wire, format_address, read_frame, tune

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class _Target:
    """What an open push of a connection writes to."""

    push: int
    key: int
    desk: ReservationDesk
    pool: KVPool
    probe: bool


class TcpReceiver:
    """A `KVReceiver`.

    `max_inflight_bytes` bounds the bytes that all senders together may have under way;
    `max_connections` the peers, `max_strangers` the connections that have not proved the token yet:
    the oldest of those goes where one more comes, so that silent ones keep nobody out. A peer has
    `handshake_s` to prove the token, and `stall_s` for the next byte inside a frame.
    """

    def __init__(
        self,
        pool: KVPool,
        *,
        token: Tokens | bytes | None = None,
        max_inflight_bytes: int = 64 << 20,
        max_connections: int = 256,
        max_strangers: int = 64,
        handshake_s: float = 5.0,
        stall_s: float = 15.0,
        quarantine_grace_s: float = 2.0,
        clock: Clock = time.monotonic,
    ) -> None:
        self.pool = pool
        self._tokens = tokens_of(token)
        self._max_connections = max_connections
        self._max_strangers = max_strangers
        self._strangers: dict[int, _Connection] = {}
        self._handshake_s = handshake_s
        self._stall_s = stall_s
        self._clock = clock
        self.credits = CreditWindows(max_inflight_bytes, pool.layout.unit_bytes)
        self._scratch: KVPool | None = None
        self._desk = self._new_desk(pool, quarantine_grace_s)
        self._probe_desk: ReservationDesk | None = None
        self._quarantine_grace_s = quarantine_grace_s
        self._writers = itertools.count(1)
        self.connections: dict[int, _Connection] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._address = ""
        self._bytes_received = 0
        self._num_refused = 0
        self._probes = itertools.count(1)

    @property
    def address(self) -> str:
        """`IP:PORT` after `start`."""
        return self._address

    @property
    def layout(self) -> KVLayout:
        """The shape of the pool's cache."""
        return self.pool.layout

    async def start(self, host: str, port: int) -> None:
        """Listen on one address; raises `PeerUnreachableError` when it cannot be taken."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(128)
        except OSError as error:
            listener.close()
            raise PeerUnreachableError(
                f"cannot listen for KV blocks on {format_address(host, port)}: {error.strerror}; "
                "choose another kv_port or end the process that holds it"
            ) from error
        listener.setblocking(False)
        self._listener = listener
        self._address = format_address(*listener.getsockname()[:2])
        self._desk.start()
        self._spawn(self._accept(listener))

    def reserve(
        self,
        request_id: str,
        epoch: int,
        block_ids: Sequence[int],
        deadline: float,
        *,
        on_released: Callable[[tuple[int, ...]], None] | None = None,
    ) -> ReservationHandle:
        """See `KVReceiver.reserve`."""
        return self._desk.reserve(request_id, epoch, block_ids, deadline, on_released)

    def stats(self) -> TransferStats:
        """Counters since `start`."""
        return self._desk.stats(self._bytes_received, self._num_refused)

    async def aclose(self) -> None:
        """Abort every reservation, close every connection, release every block."""
        for desk in (self._desk, self._probe_desk):
            if desk is not None:
                desk.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self.connections.values()):
            connection.wire.close()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for desk in (self._desk, self._probe_desk):
            if desk is not None:
                desk.stop_timer()

    def _new_desk(self, pool: KVPool, grace_s: float) -> ReservationDesk:
        return ReservationDesk(
            pool,
            stop_writer=self._stop_writer,
            cut_writer=self._cut_writer,
            clock=self._clock,
            quarantine_grace_s=grace_s,
        )

    def _spawn(self, coroutine: object) -> None:
        task = asyncio.ensure_future(coroutine)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, peer = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EINVAL):
                    logger.error("the KV port closed: %s", error.strerror)
                    return
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    continue  # the peer went away between connect and accept
                logger.error("cannot accept a KV connection: %s", error.strerror)
                await asyncio.sleep(0.2)
                continue
            if len(self.connections) - len(self._strangers) >= self._max_connections:
                self._num_refused += 1
                logger.warning(
                    "refused a KV connection from %s: max_connections=%d are open",
                    peer[0],
                    self._max_connections,
                )
                sock.close()
                continue
            tune(sock)
            writer = next(self._writers)
            wire = Wire(sock, self._stall_s)
            connection = _Connection(self, writer, wire, format_address(*peer[:2]))
            self.connections[writer] = self._strangers[writer] = connection
            if len(self._strangers) > self._max_strangers:
                self._num_refused += 1
                self._strangers.pop(next(iter(self._strangers))).wire.close()
            self._spawn(self._serve(connection))

    def proved(self, connection: _Connection) -> None:
        """A connection has shown that it knows the token."""
        self._strangers.pop(connection.writer, None)

    async def _serve(self, connection: _Connection) -> None:
        reason = "closed its connection"
        try:
            await connection.run()
        except TransferError as error:
            reason = "broke the protocol"
            await connection.refuse(error)
        except OSError as error:
            reason = f"lost its connection ({error.strerror or error})"
        finally:
            connection.wire.close()
            self.connections.pop(connection.writer, None)
            self._strangers.pop(connection.writer, None)
            connection.gone(reason)

    def _stop_writer(self, writer: int, key: int, error: TransferError) -> None:
        connection = self.connections.get(writer)
        if connection is not None:
            self._spawn(connection.tell_abort(key, error))

    def _cut_writer(self, writer: int) -> None:
        connection = self.connections.get(writer)
        if connection is not None:
            connection.wire.close()
            connection.gone("did not confirm an abort and was cut off")

    def _grant(self, grants: list[tuple[int, int]]) -> None:
        for writer, num_bytes in grants:
            connection = self.connections.get(writer)
            if connection is not None:
                connection.grant(num_bytes)

    def _probe_target(self) -> tuple[ReservationDesk, KVPool, str]:
        """A reservation of the scratch block, for one link check at a time."""
        if self._scratch is None or self._probe_desk is None:
            layout = self.pool.layout
            one_layer = KVLayout(
                1, layout.num_kv_heads, layout.block_size, layout.head_dim, layout.dtype
            )
            self._scratch = KVPool.allocate(one_layer, 1)
            self._probe_desk = self._new_desk(self._scratch, self._quarantine_grace_s)
            self._probe_desk.start()
        request_id = f"link-check-{next(self._probes)}"
        try:
            self._probe_desk.reserve(
                request_id, 0, [0], self._clock() + _PROBE_TIMEOUT_S, on_released=None
            )
        except BlockConflictError as error:
            raise ReservationBusyError(
                "another KV link check is running on this worker; try again in a second"
            ) from error
        return self._probe_desk, self._scratch, request_id


class _Connection:
    """One sender's connection: handshake, then one push after the other."""

    def __init__(self, receiver: TcpReceiver, writer: int, wire: Wire, peer: str) -> None:
        self.writer = writer
        self.wire = wire
        self._receiver = receiver
        self._peer = peer
        self._target: _Target | None = None
        self._last_push = 0
        self._authenticated = False

    async def run(self) -> None:
        try:
            async with asyncio.timeout(self._receiver._handshake_s):
                await self._handshake()
        except TimeoutError as error:
            raise AuthenticationError(
                f"{self._peer} did not finish the KV handshake within "
                f"{self._receiver._handshake_s:g} s"
            ) from error
        while (header := await self.wire.read_header()) is not None:
            frame = await self.wire.read_meta(header)
            match frame:
                case Blocks():
                    await self._on_blocks(header, frame)
                case Finish():
                    await self._on_finish(frame)
                case Open():
                    await self._on_open(frame)
                case Stopped() | Abort():
                    self._on_stop(frame)
                case Error():
                    raise error_from_wire(frame.code, f"the writer reports: {frame.message}")
                case _:
                    raise ProtocolError(f"{header.kind.name} frame from a sender")

    async def refuse(self, error: TransferError) -> None:
        """Tell the peer why the connection ends."""
        if self._target is not None:
            self._target.desk.writer_failed(self.writer, self._target.key, error)
        self._close_target()
        if not self._authenticated:
            self._receiver._num_refused += 1
        logger.warning("closed the KV connection from %s: %s", self._peer, error)
        with contextlib.suppress(OSError, TransferError):
            await self.wire.send(Error(error.code, str(error)))
            await self.wire.linger()

    def gone(self, reason: str) -> None:
        """No byte is read any more."""
        if self._target is not None:
            self._target.desk.writer_gone(self.writer, reason)
        self._close_target()

    async def tell_abort(self, key: int, error: TransferError) -> None:
        """Ask the writer to stop; it answers with STOPPED."""
        target = self._target
        if target is not None and target.key == key:
            with contextlib.suppress(OSError, TransferError):
                await self.wire.send(Abort(target.push, error.code, str(error)))

    def grant(self, num_bytes: int) -> None:
        """Lend a window that became free to the push that is open now."""
        if self._target is not None:
            self._receiver._spawn(self._tell_credit(self._target, num_bytes))

    async def _tell_credit(self, target: _Target, num_bytes: int) -> None:
        if self._target is target:  # else its window was taken back meanwhile
            with contextlib.suppress(OSError, TransferError):
                await self.wire.send(Credit(target.push, num_bytes))

    async def _handshake(self) -> None:
        receiver = self._receiver
        challenge = os.urandom(NONCE_BYTES)
        await self.wire.send(Challenge(VERSION, VERSION, challenge))
        hello = await read_frame(self.wire)
        if not isinstance(hello, Hello):
            raise ProtocolError(f"{type(hello).__name__.upper()} frame before HELLO")
        proved = None
        for token in receiver._tokens():
            expected = sender_mac(token, challenge, hello.nonce, hello.layout, hello.name)
            if hmac.compare_digest(expected, hello.mac):
                proved = token
        if proved is None:
            raise AuthenticationError(
                f"{self._peer} did not prove the peer token; start both workers with the same "
                "--peer-token-file"
            )
        self._authenticated = True
        receiver.proved(self)
        if hello.name:
            self._peer = f"{printable(hello.name)} ({self._peer})"
        receiver.layout.require_equal(hello.layout, f"sender {self._peer}")
        mac = receiver_mac(proved, challenge, hello.nonce, receiver.layout)
        await self.wire.send(Welcome(mac, receiver.layout))

    async def _on_open(self, frame: Open) -> None:
        if self._target is not None:
            raise ProtocolError(f"OPEN of push {frame.push} while push {self._target.push} is open")
        if frame.push <= self._last_push:
            raise ProtocolError(
                f"OPEN of push {frame.push} after push {self._last_push}; numbers must rise"
            )
        self._last_push = frame.push
        receiver = self._receiver
        try:
            desk, pool, request_id = receiver._desk, receiver.pool, frame.request_id
            if frame.probe:
                desk, pool, request_id = receiver._probe_target()
            entry = desk.table.attach(request_id, frame.epoch, self.writer)
        except TransferError as error:
            await self.wire.send(Abort(frame.push, error.code, str(error)))
            return
        self._target = _Target(frame.push, entry.key, desk, pool, frame.probe)
        credit = receiver.credits.open(self.writer)
        await self.wire.send(Opened(frame.push, credit, receiver.credits.max_frame_bytes))

    async def _on_blocks(self, header: Header, frame: Blocks) -> None:
        target = self._require_target(frame.push, "BLOCKS")
        layout = target.pool.layout
        shape = (frame.num_kv_heads, frame.block_size, frame.head_dim, frame.dtype)
        expected = (layout.num_kv_heads, layout.block_size, layout.head_dim, layout.dtype)
        if shape != expected:
            raise ProtocolError(f"BLOCKS frame has shape {shape}, this worker's cache {expected}")
        credits = self._receiver.credits
        credits.arriving(self.writer, header.data_length)
        if not target.desk.table.accepts(target.key):
            await self.wire.discard(header.data_length)
            credits.consumed(self.writer, header.data_length)
            return
        target.desk.table.check_blocks(target.key, frame.layer, frame.block_ids)
        memory = target.pool.scatter(frame.layer, frame.block_ids)
        await self.wire.read_into(memory.views)
        if header.data_crc32 is not None:
            actual = 0
            for view in memory.views:
                actual = zlib.crc32(view, actual)
            if actual != header.data_crc32:
                raise ChecksumError(
                    f"layer {frame.layer} blocks {_shorten(frame.block_ids)} arrived with crc32 "
                    f"{actual:#010x} instead of {header.data_crc32:#010x}"
                )
        if target.desk.table.accepts(target.key):
            memory.commit()
        target.desk.table.arrived(target.key, frame.layer, frame.block_ids)
        self._receiver._bytes_received += header.data_length
        granted = credits.consumed(self.writer, header.data_length)
        if granted:
            await self.wire.send(Credit(target.push, granted))

    async def _on_finish(self, frame: Finish) -> None:
        target = self._require_target(frame.push, "FINISH")
        if not target.desk.table.accepts(target.key):
            return  # ABORT is on its way; the writer answers with STOPPED
        crc = zlib.crc32(target.pool.get_bytes(0, [0])) if target.probe else None
        try:
            target.desk.table.finish(target.key, frame.state)
        except IncompleteError as error:
            target.desk.writer_failed(self.writer, target.key, error)
            self._close_target()
            await self.wire.send(Abort(frame.push, error.code, str(error)))
            return
        self._close_target()
        # the ack first: the owner's coroutine may keep the event loop busy
        await self.wire.send(Finished(frame.push, crc))
        target.desk.settle()

    def _on_stop(self, frame: Stopped | Abort) -> None:
        target = self._target
        if target is None or frame.push != target.push:
            if frame.push > self._last_push:
                raise ProtocolError(f"push {frame.push} was never opened")
            return  # crossed our FINISHED or ABORT on the way
        if isinstance(frame, Abort):
            error = error_from_wire(frame.code, f"the writer gave up: {frame.message}")
        else:
            if target.desk.table.accepts(target.key):
                raise ProtocolError(f"STOPPED for push {frame.push}, which was not aborted")
            error = ClosedError("the writer stopped")
        target.desk.writer_failed(self.writer, target.key, error)
        self._close_target()

    def _require_target(self, push: int, what: str) -> _Target:
        if self._target is None or push != self._target.push:
            opened = "none" if self._target is None else str(self._target.push)
            raise ProtocolError(f"{what} frame for push {push}; open is {opened}")
        return self._target

    def _close_target(self) -> None:
        if self._target is not None:
            self._target = None
            self._receiver._grant(self._receiver.credits.close(self.writer))


def _shorten(block_ids: Sequence[int]) -> str:
    shown = ", ".join(str(block) for block in block_ids[:8])
    return f"[{shown}{', ...' if len(block_ids) > 8 else ''}]"
