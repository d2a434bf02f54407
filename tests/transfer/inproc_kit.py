"""Pushes KV blocks between pools of one process: the second implementation of the interface.

The same reservations, errors and interface as tcp; a push is a memory copy in the event loop, so
nothing is in flight between two awaits and no credit is needed.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import time
import zlib
from collections.abc import Callable, Sequence

from tandem_worker.transfer.async_reservations import Clock, ReservationDesk, ReservationHandle
from tandem_worker.transfer.errors import (
    AuthenticationError,
    BlockConflictError,
    ClosedError,
    PeerUnreachableError,
    ReservationAbortedError,
    TransferError,
)
from tandem_worker.transfer.interface import FinalState, TransferStats
from tandem_worker.transfer.kv_memory import KVPool
from tandem_worker.transfer.layout import KVLayout

_receivers: dict[str, InprocReceiver] = {}
_ports = itertools.count(1)


class InprocReceiver:
    """A `KVReceiver`; its address is `inproc:HOST:PORT`."""

    def __init__(
        self, pool: KVPool, *, token: bytes | None = None, clock: Clock = time.monotonic
    ) -> None:
        self.pool = pool
        self.token = token or b""
        self.desk = ReservationDesk(
            pool, stop_writer=self._stop_writer, cut_writer=self._cut_writer, clock=clock
        )
        self.writers: dict[int, InprocPush] = {}
        self.bytes_received = 0
        self.num_refused = 0
        self._numbers = itertools.count(1)
        self._address = ""

    @property
    def address(self) -> str:
        """`inproc:HOST:PORT` after `start`."""
        return self._address

    async def start(self, host: str, port: int) -> None:
        """Be found under a name of this process."""
        address = f"inproc:{host}:{port or next(_ports)}"
        if address in _receivers:
            raise PeerUnreachableError(f"{address} is taken by another receiver of this process")
        self.desk.start()
        self._address = address
        _receivers[address] = self

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
        return self.desk.reserve(request_id, epoch, block_ids, deadline, on_released)

    def stats(self) -> TransferStats:
        """Counters since `start`."""
        return self.desk.stats(self.bytes_received, self.num_refused)

    async def aclose(self) -> None:
        """Abort every reservation and release every block."""
        _receivers.pop(self._address, None)
        self.desk.close()
        for number in list(self.writers):
            self._cut_writer(number)
        self.desk.stop_timer()

    def attach(self, push: InprocPush) -> int:
        """Give a push its reservation; returns the reservation's key."""
        number = next(self._numbers)
        entry = self.desk.table.attach(push.request_id, push.epoch, number)
        push.number = number
        self.writers[number] = push
        return entry.key

    def detach(self, push: InprocPush, key: int, error: TransferError) -> None:
        """A push ended without finishing."""
        if self.writers.pop(push.number, None) is not None:
            self.desk.writer_failed(push.number, key, error)

    def _stop_writer(self, writer: int, key: int, error: TransferError) -> None:
        push = self.writers.get(writer)
        if push is not None:
            # soon, not now: as with tcp the blocks are quarantined until the writer has answered
            asyncio.get_running_loop().call_soon(push.fail, error)

    def _cut_writer(self, writer: int) -> None:
        push = self.writers.pop(writer, None)
        if push is not None:
            push.fail(PeerUnreachableError(f"KV receiver {self._address} closed"))
            self.desk.writer_gone(writer, "was cut off")


class InprocPush:
    """A `Push`."""

    def __init__(
        self, sender: InprocSender, receiver: InprocReceiver, request_id: str, epoch: int
    ) -> None:
        self.request_id = request_id
        self.epoch = epoch
        self.number = 0
        self._sender = sender
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()
        self._failure: TransferError | None = None
        self._finished = False
        self._key = receiver.attach(self)

    @property
    def failure(self) -> TransferError | None:
        """Why the push failed, or None."""
        return self._failure

    async def layer_blocks(
        self, layer: int, local_block_ids: Sequence[int], remote_block_ids: Sequence[int]
    ) -> None:
        """Copy one layer's K and V of some blocks."""
        if self._failure is not None:
            raise self._failure
        self._check(layer, local_block_ids, remote_block_ids)
        await asyncio.sleep(0)
        self._copy(layer, tuple(local_block_ids), tuple(remote_block_ids))
        if self._failure is not None:
            raise self._failure

    def layer_blocks_nowait(
        self, layer: int, local_block_ids: Sequence[int], remote_block_ids: Sequence[int]
    ) -> None:
        """As `layer_blocks`, from any thread, without waiting."""
        if self._failure is not None:
            return
        self._check(layer, local_block_ids, remote_block_ids)
        local, remote = tuple(local_block_ids), tuple(remote_block_ids)
        self._loop.call_soon_threadsafe(self._copy, layer, local, remote)

    async def finish(self, state: FinalState) -> None:
        """Complete the far reservation."""
        await asyncio.sleep(0)  # what other threads handed over is copied first
        if self._failure is not None:
            raise self._failure
        if self._finished:
            raise ClosedError(f"the push of request {self.request_id!r} is finished already")
        desk = self._receiver.desk
        if not desk.table.accepts(self._key):
            await asyncio.sleep(0)  # the abort is on its way to `fail`
            raise self._failure or ClosedError(f"the push of {self.request_id!r} is over")
        try:
            desk.table.finish(self._key, state)
        except TransferError as error:
            self.fail(error)
            raise
        self._finished = True
        self._sender.pushes.discard(self)
        self._receiver.writers.pop(self.number)
        desk.settle()

    def abort(self, reason: str = "aborted by the writer") -> None:
        """Stop pushing, from any thread."""
        error = ReservationAbortedError(
            f"the push of request {self.request_id!r} epoch {self.epoch} was {reason}"
        )
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is self._loop:
            self.fail(error)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.fail, error)

    async def aclose(self) -> None:
        """Abort if not finished; nothing reads the local blocks afterwards."""
        self.abort("closed before it was finished")

    def fail(self, error: TransferError) -> None:
        """End the push unless it is over."""
        if self._finished or self._failure is not None:
            return
        self._failure = error
        self._sender.pushes.discard(self)
        self._receiver.detach(self, self._key, error)

    def _check(self, layer: int, local: Sequence[int], remote: Sequence[int]) -> None:
        if self._finished:
            raise ClosedError(f"the push of request {self.request_id!r} is finished already")
        if len(local) != len(remote):
            raise BlockConflictError(
                f"{len(local)} local blocks for {len(remote)} remote blocks of layer {layer}"
            )
        self._sender.pool.check(layer, local)

    def _copy(self, layer: int, local: tuple[int, ...], remote: tuple[int, ...]) -> None:
        table = self._receiver.desk.table
        if self._failure is not None or not table.accepts(self._key):
            return
        try:
            table.check_blocks(self._key, layer, remote)
        except TransferError as error:
            self.fail(error)
            return
        data = self._sender.pool.get_bytes(layer, local)
        self._receiver.pool.put_bytes(layer, remote, data)
        self._receiver.bytes_received += len(data)
        table.arrived(self._key, layer, remote)


class InprocSender:
    """A `KVSender`."""

    def __init__(self, pool: KVPool, *, token: bytes | None = None) -> None:
        self.pool = pool
        self.pushes: set[InprocPush] = set()
        self._token = token or b""
        self._closed = False

    async def open(self, address: str, request_id: str, epoch: int) -> InprocPush:
        """Take a reservation; see `KVSender.open`."""
        push = InprocPush(self, self._find(address), request_id, epoch)
        self.pushes.add(push)
        return push

    async def probe(self, address: str, data: bytes) -> int:
        """Copy one test block through a scratch block; see `KVSender.probe`."""
        layout = self._find(address).pool.layout
        one_layer = KVLayout(
            1, layout.num_kv_heads, layout.block_size, layout.head_dim, layout.dtype
        )
        scratch = KVPool.allocate(one_layer, 1)
        scratch.put_bytes(0, [0], data)
        return zlib.crc32(scratch.get_bytes(0, [0]))

    async def aclose(self) -> None:
        """Abort every push."""
        self._closed = True
        for push in list(self.pushes):
            await push.aclose()

    def _find(self, address: str) -> InprocReceiver:
        if self._closed:
            raise ClosedError(f"cannot push KV blocks to {address}: the KV sender is closed")
        receiver = _receivers.get(address)
        if receiver is None:
            raise PeerUnreachableError(f"no KV receiver of this process is called {address!r}")
        if not hmac.compare_digest(receiver.token, self._token):
            receiver.num_refused += 1
            raise AuthenticationError(
                f"the sender to {address} did not prove the peer token; start both workers with "
                "the same --peer-token-file"
            )
        receiver.pool.layout.require_equal(self.pool.layout, f"sender to {address}")
        return receiver
