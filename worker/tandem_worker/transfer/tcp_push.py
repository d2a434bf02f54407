"""One push over one connection, as the sender sees it: a pump that sends, a reader that listens."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tandem_worker.transfer.errors import (
    BlockConflictError,
    ClosedError,
    PeerUnreachableError,
    ProtocolError,
    ReservationAbortedError,
    TransferError,
    error_from_wire,
)
from tandem_worker.transfer.frames import (
    MAX_BLOCKS_PER_FRAME,
    Abort,
    Blocks,
    Credit,
    Error,
    Finish,
    Finished,
    Frame,
    Open,
    Opened,
    Stopped,
    encode,
)
from tandem_worker.transfer.interface import FinalState
from tandem_worker.transfer.kv_memory import KVPool
from tandem_worker.transfer.wire import Wire

# frames are collected up to this much before they are sent
_BATCH_BYTES = 1 << 18


@dataclass
class _Item:
    """Blocks handed over and not sent yet."""

    layer: int
    local: tuple[int, ...]
    remote: tuple[int, ...]
    sent: asyncio.Future[None] | None


@dataclass(frozen=True)
class LinkSettings:
    """How a sender uses its connections; see `TcpSender`."""

    checksum: bool
    patience_s: float
    abort_grace_s: float


class Link:
    """One authenticated connection; carries one push at a time.

    `on_idle` is called when a push is over and the connection clean, `on_end` when it is closed.
    """

    def __init__(
        self,
        wire: Wire,
        address: str,
        settings: LinkSettings,
        *,
        on_idle: Callable[[Link], None],
        on_end: Callable[[Link], None],
    ) -> None:
        self.wire = wire
        self.address = address
        self.settings = settings
        self._on_idle = on_idle
        self._on_end = on_end
        self._push: TcpPush | None = None
        self._num_pushes = 0
        self._reader = asyncio.ensure_future(self._read())

    async def open(self, request_id: str, epoch: int, pool: KVPool, probe: bool) -> TcpPush:
        self._num_pushes += 1
        push = TcpPush(self, self._num_pushes, request_id, epoch, pool)
        self._push = push
        try:
            await self.wire.send(Open(push.number, request_id, epoch, probe))
            async with asyncio.timeout(self.settings.patience_s):
                await push.opened
        except TransferError:
            if not self.wire.closed:
                self.done(push)  # refused: the connection stays good
            raise
        except TimeoutError as error:
            self.close()
            raise PeerUnreachableError(
                f"KV receiver {self.address} did not answer for request {request_id!r} within "
                f"{self.settings.patience_s:g} s"
            ) from error
        except OSError as error:
            self.close()
            raise PeerUnreachableError(
                f"KV receiver {self.address} went away: {error.strerror or error}"
            ) from error
        except BaseException:
            self.close()  # cancelled: the far side releases the reservation
            raise
        push.start()
        return push

    def done(self, push: TcpPush) -> None:
        """No byte of this push follows, in either direction that matters."""
        if self._push is push:
            self._push = None
            self._on_idle(self)

    def close(self) -> None:
        self.wire.close()
        self._reader.cancel()
        self._on_end(self)

    async def aclose(self) -> None:
        push = self._push
        if push is not None:
            await push.aclose()
        self.close()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        error: TransferError
        try:
            while (header := await self.wire.read_header()) is not None:
                if header.data_length:
                    raise ProtocolError(f"KV receiver {self.address} sent KV data")
                self._dispatch(await self.wire.read_meta(header))
            error = PeerUnreachableError(f"KV receiver {self.address} closed the connection")
        except TransferError as failure:
            error = failure
        except OSError as failure:
            error = PeerUnreachableError(
                f"lost the connection to KV receiver {self.address}: {failure.strerror or failure}"
            )
        self.wire.close()
        self._on_end(self)
        if self._push is not None:
            self._push.fail(error)

    def _dispatch(self, frame: Frame) -> None:
        if isinstance(frame, Error):
            raise error_from_wire(frame.code, f"KV receiver {self.address}: {frame.message}")
        if not isinstance(frame, Opened | Credit | Finished | Abort):
            raise ProtocolError(
                f"KV receiver {self.address} sent a {type(frame).__name__.upper()} frame"
            )
        push = self._push
        if push is None or frame.push != push.number:
            if frame.push > self._num_pushes:
                raise ProtocolError(
                    f"KV receiver {self.address} names push {frame.push}, which was never opened"
                )
            return  # it crossed the end of an earlier push
        push.on_frame(frame)


class TcpPush:
    """A `Push`. A pump task sends what was handed over, in order."""

    def __init__(self, link: Link, number: int, request_id: str, epoch: int, pool: KVPool) -> None:
        self.request_id = request_id
        self.epoch = epoch
        self.number = number
        self.crc32: int | None = None
        self._link = link
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = self._loop.create_future()
        self._items: deque[_Item] = deque()
        self._unsent: list[_Item] = []  # in the batch that is being sent
        self._wake = asyncio.Event()
        self._balance = 0
        self._max_frame_bytes = 0
        self._final: FinalState | None = None
        self._acked = False
        self._failure: TransferError | None = None
        self._told_to_stop = False
        self._pump: asyncio.Task[None] | None = None

    @property
    def failure(self) -> TransferError | None:
        """Why the push failed, or None."""
        return self._failure

    async def layer_blocks(
        self, layer: int, local_block_ids: Sequence[int], remote_block_ids: Sequence[int]
    ) -> None:
        """Send one layer's K and V of some blocks; see `Push.layer_blocks`."""
        if self._failure is not None:
            raise self._failure
        sent: asyncio.Future[None] = self._loop.create_future()
        self._hand_over(layer, local_block_ids, remote_block_ids, sent)
        await sent

    def layer_blocks_nowait(
        self, layer: int, local_block_ids: Sequence[int], remote_block_ids: Sequence[int]
    ) -> None:
        """As `layer_blocks`, from any thread, without waiting."""
        if self._failure is None:
            self._hand_over(layer, local_block_ids, remote_block_ids, None)

    async def finish(self, state: FinalState) -> None:
        """Send the final state and wait for the ack; see `Push.finish`."""
        if self._failure is not None:
            raise self._failure
        if self._final is not None:
            raise ClosedError(f"the push of request {self.request_id!r} is finished already")
        self._final = state
        self._wake.set()
        assert self._pump is not None
        try:
            await asyncio.shield(self._pump)
        except asyncio.CancelledError:
            self.abort("cancelled while finishing")
            raise
        if self._failure is not None:
            raise self._failure

    def abort(self, reason: str = "aborted by the writer") -> None:
        """Stop pushing, from any thread."""
        error = ReservationAbortedError(
            f"the push of request {self.request_id!r} epoch {self.epoch} was {reason}"
        )
        self._run_in_loop(lambda: self.fail(error))

    async def aclose(self) -> None:
        """Wait until the local blocks are no longer read; aborts if not finished."""
        self.abort("closed before it was finished")
        if self._pump is None:
            return
        done, _ = await asyncio.wait([self._pump], timeout=self._link.settings.abort_grace_s)
        if not done:
            self._link.close()  # the receiver takes no bytes: end the frame the hard way
            await asyncio.wait([self._pump])

    def start(self) -> None:
        """Send from now on."""
        self._pump = asyncio.ensure_future(self._run())

    def fail(self, error: TransferError) -> None:
        """End the push unless it is over; waiters get the error."""
        if self._acked or self._failure is not None:
            return
        self._failure = error
        if not self.opened.done():
            self.opened.set_exception(error)
            self.opened.exception()  # seen: `open` may have been cancelled
        self._wake.set()

    def on_frame(self, frame: Opened | Credit | Finished | Abort) -> None:
        """What the receiver says about this push."""
        match frame:
            case Opened() if not self.opened.done():
                unit = self._pool.layout.unit_bytes
                if frame.max_frame_bytes < unit:
                    raise ProtocolError(
                        f"KV receiver {self._link.address} takes frames of "
                        f"{frame.max_frame_bytes} bytes; one block has {unit}"
                    )
                self._balance = frame.credit_bytes
                self._max_frame_bytes = frame.max_frame_bytes
                self.opened.set_result(None)
            case Credit():
                self._balance += frame.num_bytes
                self._wake.set()
            case Finished() if self._final is not None:
                self._acked = True
                self.crc32 = frame.crc32
                self._wake.set()
            case Abort():
                self._told_to_stop = True
                self.fail(error_from_wire(frame.code, frame.message))
            case _:
                raise ProtocolError(
                    f"KV receiver {self._link.address} sent {type(frame).__name__.upper()} out of "
                    "turn"
                )

    def _hand_over(
        self,
        layer: int,
        local: Sequence[int],
        remote: Sequence[int],
        sent: asyncio.Future[None] | None,
    ) -> None:
        if self._final is not None:
            raise ClosedError(f"the push of request {self.request_id!r} is finished already")
        if len(local) != len(remote):
            raise BlockConflictError(
                f"{len(local)} local blocks for {len(remote)} remote blocks of layer {layer}"
            )
        self._pool.check(layer, local)
        for block in remote:
            if not 0 <= block < 2**32:
                raise BlockConflictError(f"remote block {block} is outside 0..2**32-1")
        # append first, wake second: the order of calls is the order on the wire
        self._items.append(_Item(layer, tuple(local), tuple(remote), sent))
        self._run_in_loop(self._wake.set)

    def _run_in_loop(self, action: Callable[[], None]) -> None:
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is self._loop:
            action()
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action)

    async def _run(self) -> None:
        try:
            await self._send_all()
        except TransferError as error:
            self.fail(error)
        except OSError as error:
            # the reader task knows better why, when it has seen an ERROR frame
            await asyncio.sleep(0)
            self.fail(
                PeerUnreachableError(
                    f"lost the connection to KV receiver {self._link.address}: "
                    f"{error.strerror or error}"
                )
            )
        finally:
            if not self._acked:
                await self._say_stopped()
            self._settle_items()

    async def _send_all(self) -> None:
        while self._failure is None:
            if self._items:
                await self._send_items()
            elif self._final is not None:
                await self._link.wire.send(Finish(self.number, self._final))
                await self._wait_until(lambda: self._acked, "the ack")
                if self._acked:
                    self._link.done(self)
                return
            else:
                self._wake.clear()
                if not self._items and self._final is None and self._failure is None:
                    await self._wake.wait()

    async def _send_items(self) -> None:
        """Send what is handed over; small frames of several layers leave in one call."""
        batch: list[memoryview] = []
        size = 0
        while self._items and self._failure is None:
            item = self._items.popleft()
            self._unsent.append(item)
            for local, remote in self._frames_of(item):
                need = len(local) * self._pool.layout.unit_bytes
                if self._balance < need:
                    await self._flush(batch)
                    size = 0
                    await self._wait_until(lambda need=need: self._balance >= need, "credit")  # type: ignore[misc]
                    if self._failure is not None:
                        return
                self._balance -= need
                batch += self._frame(item.layer, local, remote)
                size += need
                if size >= _BATCH_BYTES:
                    await self._flush(batch)
                    size = 0
            if not batch:
                self._mark_sent()
        await self._flush(batch)
        self._mark_sent()

    def _frames_of(self, item: _Item) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        step = min(MAX_BLOCKS_PER_FRAME, self._max_frame_bytes // self._pool.layout.unit_bytes)
        for start in range(0, len(item.local), step):
            yield item.local[start : start + step], item.remote[start : start + step]

    def _frame(
        self, layer: int, local: tuple[int, ...], remote: tuple[int, ...]
    ) -> list[memoryview]:
        layout = self._pool.layout
        views = self._pool.gather(layer, local)
        crc: int | None = None
        if self._link.settings.checksum:
            crc = 0
            for view in views:
                crc = zlib.crc32(view, crc)
        frame = Blocks(
            self.number,
            layer,
            layout.num_kv_heads,
            layout.block_size,
            layout.head_dim,
            layout.dtype,
            remote,
        )
        return [memoryview(encode(frame, len(local) * layout.unit_bytes, crc)), *views]

    async def _flush(self, batch: list[memoryview]) -> None:
        if batch:
            await self._link.wire.send_views(batch)
            batch.clear()

    def _mark_sent(self) -> None:
        for item in self._unsent:
            if item.sent is not None and not item.sent.done():
                item.sent.set_result(None)
        self._unsent.clear()

    async def _wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """Wait for `ready` or a failure, at most `patience_s`."""
        try:
            async with asyncio.timeout(self._link.settings.patience_s):
                while not ready() and self._failure is None:
                    self._wake.clear()
                    await self._wake.wait()
        except TimeoutError as error:
            self._link.close()
            raise PeerUnreachableError(
                f"KV receiver {self._link.address} gave no {what.removeprefix('the ')} for "
                f"{self._link.settings.patience_s:g} s"
            ) from error

    async def _say_stopped(self) -> None:
        """Confirm an abort, or tell the receiver about ours; only then its blocks are free."""
        wire = self._link.wire
        frame: Frame = Stopped(self.number)
        if not self._told_to_stop:
            error = self._failure or ClosedError("cancelled")
            frame = Abort(self.number, error.code, str(error))
        if not wire.closed:
            with contextlib.suppress(OSError, TransferError):
                await wire.send(frame)
                self._link.done(self)
                return
        self._link.close()

    def _settle_items(self) -> None:
        self._unsent += self._items
        self._items.clear()
        for item in self._unsent:
            if item.sent is not None and not item.sent.done():
                item.sent.set_exception(
                    self._failure or ClosedError(f"the push of {self.request_id!r} is over")
                )
                item.sent.exception()  # seen: its waiter may have been cancelled
