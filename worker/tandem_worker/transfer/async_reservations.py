"""Reservations as coroutines see them: futures, callbacks and timers around the pure table."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from tandem_worker.transfer.errors import (
    ClosedError,
    ReservationAbortedError,
    TransferError,
)
from tandem_worker.transfer.interface import FinalState, ReservationState, TransferStats
from tandem_worker.transfer.kv_memory import KVPool
from tandem_worker.transfer.reservations import Entry, EventKind, ReservationTable

logger = logging.getLogger(__name__)

Clock = Callable[[], float]


class ReservationHandle:
    """A `Reservation`."""

    def __init__(
        self,
        desk: ReservationDesk,
        entry: Entry,
        on_released: Callable[[tuple[int, ...]], None] | None,
    ) -> None:
        self.request_id = entry.request_id
        self.epoch = entry.epoch
        self.block_ids = entry.block_ids
        self.key = entry.key
        self._desk = desk
        self._entry = entry
        self._on_released = on_released
        self._settled = asyncio.Event()
        self._released = asyncio.Event()

    @property
    def state(self) -> ReservationState:
        """Where the reservation is in its life."""
        return self._entry.state

    async def completed(self) -> FinalState:
        """Wait until everything has arrived; see `Reservation.completed`."""
        await self._settled.wait()
        if self._entry.error is not None:
            raise self._entry.error
        assert self._entry.final is not None
        return self._entry.final

    def abort(self, reason: str = "aborted by its owner") -> None:
        """Give the reservation up, from any thread."""
        error = ReservationAbortedError(f"the {self._entry.name} was {reason}")
        self._desk.run_in_loop(lambda: self._desk.abort(self.key, error))

    async def released(self) -> None:
        """Wait until the blocks of a failed or aborted reservation may be used again."""
        await self._released.wait()

    def _settle(self) -> None:
        self._settled.set()

    def _release(self) -> None:
        self._released.set()
        if self._entry.state is ReservationState.RELEASED and self._on_released is not None:
            try:
                self._on_released(self.block_ids)
            except Exception:
                logger.exception("on_released of the %s failed", self._entry.name)


class ReservationDesk:
    """One pool's reservations.

    `stop_writer(writer, key, error)` asks a writer to stop, `cut_writer(writer)` ends its
    connection; both are called in the event loop and must not raise. A writer that has not
    confirmed an abort within `quarantine_grace_s` is cut.
    """

    def __init__(
        self,
        pool: KVPool,
        *,
        stop_writer: Callable[[int, int, TransferError], None],
        cut_writer: Callable[[int], None],
        clock: Clock = time.monotonic,
        quarantine_grace_s: float = 2.0,
    ) -> None:
        self.table = ReservationTable(pool.layout.num_layers, pool.num_blocks)
        self.num_completed = 0
        self.num_failed = 0
        self._stop_writer = stop_writer
        self._cut_writer = cut_writer
        self._clock = clock
        self._grace_s = quarantine_grace_s
        self._handles: dict[int, ReservationHandle] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def start(self) -> None:
        """Belong to the running event loop from now on."""
        self._loop = asyncio.get_running_loop()

    def stats(self, bytes_received: int, num_refused_connections: int) -> TransferStats:
        """What the reservations came to; the wire counts bytes and refused connections."""
        entries = self.table.entries
        quarantined = sum(entry.state is ReservationState.QUARANTINED for entry in entries)
        return TransferStats(
            num_reserved=len(entries) - quarantined,
            num_quarantined=quarantined,
            num_completed=self.num_completed,
            num_failed=self.num_failed,
            num_refused_connections=num_refused_connections,
            bytes_received=bytes_received,
        )

    def run_in_loop(self, action: Callable[[], None]) -> None:
        """Run now when called in the event loop, soon when called from another thread."""
        loop = self._loop
        assert loop is not None
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is loop:
            action()
        elif not loop.is_closed():
            loop.call_soon_threadsafe(action)

    def reserve(
        self,
        request_id: str,
        epoch: int,
        block_ids: Sequence[int],
        deadline: float,
        on_released: Callable[[tuple[int, ...]], None] | None,
    ) -> ReservationHandle:
        """See `KVReceiver.reserve`."""
        if self._closed or self._loop is None:
            raise ClosedError(
                f"cannot reserve blocks for request {request_id!r}: the KV receiver is not running"
            )
        entry = self.table.reserve(request_id, epoch, block_ids, deadline, self._clock())
        handle = ReservationHandle(self, entry, on_released)
        self._handles[entry.key] = handle
        self.settle()
        return handle

    def abort(self, key: int, error: TransferError) -> None:
        """Fail a reservation and ask its writer to stop."""
        self.table.abort(key, error, self._clock())
        self.settle()

    def writer_failed(self, writer: int, key: int | None, error: TransferError) -> None:
        """A writer broke a rule: what it was writing fails with that error, released at once.

        Only for writers whose bytes are no longer read.
        """
        if key is not None:
            self.table.abort(key, error, self._clock())
        self.writer_gone(writer, "is gone")

    def writer_gone(self, writer: int, reason: str) -> None:
        """A writer's connection ended."""
        self.table.writer_gone(writer, reason, self._clock())
        for entry in self.table.entries:
            if entry.writer == writer:
                self.table.writer_stopped(entry.key)
        self.settle(tell_writer=False)

    def settle(self, *, tell_writer: bool = True) -> None:
        """Turn the table's events into futures and callbacks, and set the timer."""
        for event in self.table.take_events():
            entry = event.entry
            if event.kind is EventKind.FAILED:
                self.num_failed += 1
                self._handles[entry.key]._settle()
                quarantined = entry.state is ReservationState.QUARANTINED
                if tell_writer and quarantined and entry.writer is not None and entry.error:
                    self._stop_writer(entry.writer, entry.key, entry.error)
                continue
            handle = self._handles.pop(entry.key)
            if event.kind is EventKind.COMPLETED:
                self.num_completed += 1
                handle._settle()
            handle._release()
        self._arm()

    def close(self) -> None:
        """Abort everything; blocks of writers are released when these are gone."""
        self._closed = True
        for entry in self.table.entries:
            error = ClosedError(f"the {entry.name} ended because this worker shuts down")
            self.table.abort(entry.key, error, self._clock())
        self.settle()

    def stop_timer(self) -> None:
        """No timer fires after this."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        wake = self.table.next_wake(self._grace_s)
        if self._timer is not None:
            if wake is not None and wake >= self._timer_at:
                return  # the timer in place fires earlier and looks again
            self.stop_timer()
        if wake is not None:
            assert self._loop is not None
            self._timer_at = wake
            delay = max(0.0, wake - self._clock())
            self._timer = self._loop.call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self._clock()
        self.table.expire(now)
        for writer in self.table.overdue_writers(now, self._grace_s):
            logger.warning(
                "a KV writer did not confirm an abort within %.1f s; closing its connection",
                self._grace_s,
            )
            self._cut_writer(writer)
        self.settle()
