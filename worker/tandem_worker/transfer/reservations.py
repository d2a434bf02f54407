"""Which blocks may be written by whom, what has arrived, and when a block may be used again.

Pure state machine; `now` is passed in. The moves of a reservation:

    WAITING  --attach-->          WRITING
    WRITING  --finish, all here--> COMPLETE      (blocks belong to the owner)
    WAITING  --abort, deadline-->  RELEASED      (no writer: nobody can write late)
    WRITING  --abort, deadline-->  QUARANTINED   (the writer may still write)
    QUARANTINED --stopped, gone--> RELEASED
    WRITING  --writer gone-->      RELEASED      (failed with WriterGoneError)

What happened since the last look is taken with `take_events`; the asyncio side turns events into
futures and callbacks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from tandem_worker.transfer.errors import (
    BlockConflictError,
    IncompleteError,
    ReservationAbortedError,
    ReservationBusyError,
    StaleEpochError,
    TransferError,
    UnknownReservationError,
    WriterGoneError,
)
from tandem_worker.transfer.interface import FinalState, ReservationState

MAX_REQUEST_ID_BYTES = 256


class EventKind(Enum):
    """What the owner of a reservation learns."""

    COMPLETED = "completed"
    FAILED = "failed"
    RELEASED = "released"


@dataclass(eq=False)
class Entry:
    """One reservation. Read it; only the table changes it."""

    key: int
    request_id: str
    epoch: int
    block_ids: tuple[int, ...]
    deadline: float
    state: ReservationState = ReservationState.WAITING
    writer: int | None = None
    final: FinalState | None = None
    error: TransferError | None = None
    quarantined_at: float | None = None
    num_missing: int = 0  # (layer, block) pairs
    _index: dict[int, int] = field(default_factory=dict)
    _arrived: list[int] = field(default_factory=list)  # one bit set per layer, bit = block index

    @property
    def name(self) -> str:
        """How errors call it."""
        return f"reservation of request {self.request_id!r} epoch {self.epoch}"


@dataclass(frozen=True)
class Event:
    """A move that someone waits for."""

    kind: EventKind
    entry: Entry


class ReservationTable:
    """All reservations of one KV pool of `num_layers` layers and `num_blocks` blocks."""

    def __init__(self, num_layers: int, num_blocks: int) -> None:
        self._num_layers = num_layers
        self._num_blocks = num_blocks
        self._keys = itertools.count(1)
        self._entries: dict[int, Entry] = {}  # WAITING, WRITING, QUARANTINED
        self._by_request: dict[str, int] = {}  # WAITING, WRITING
        self._holder: dict[int, int] = {}  # block -> key
        self._events: list[Event] = []

    @property
    def entries(self) -> list[Entry]:
        """Reservations that hold blocks."""
        return list(self._entries.values())

    @property
    def held_blocks(self) -> frozenset[int]:
        """Blocks that a writer may write, or might still be writing."""
        return frozenset(self._holder)

    def take_events(self) -> list[Event]:
        """Events since the last call, oldest first."""
        events, self._events = self._events, []
        return events

    def reserve(
        self, request_id: str, epoch: int, block_ids: Sequence[int], deadline: float, now: float
    ) -> Entry:
        """Open blocks to one writer; see `KVReceiver.reserve` for the errors."""
        size = len(request_id.encode())
        if not 1 <= size <= MAX_REQUEST_ID_BYTES:
            raise UnknownReservationError(
                f"request_id of {size} bytes; it must have between 1 and {MAX_REQUEST_ID_BYTES}"
            )
        if not 0 <= epoch < 2**64:
            raise StaleEpochError(f"epoch={epoch} is outside 0..2**64-1")
        if not block_ids:
            raise BlockConflictError(f"request {request_id!r} reserves no block; name at least one")
        older = self._entries.get(self._by_request.get(request_id, 0))
        if older is not None and epoch <= older.epoch:
            raise StaleEpochError(
                f"request {request_id!r} is reserved with epoch {older.epoch}; epoch {epoch} must "
                "be higher"
            )
        index: dict[int, int] = {}
        for position, block in enumerate(block_ids):
            if not 0 <= block < self._num_blocks:
                raise BlockConflictError(
                    f"block {block} is outside 0..{self._num_blocks - 1} of this KV pool"
                )
            if block in index:
                raise BlockConflictError(f"block {block} is named twice by request {request_id!r}")
            if block in self._holder and not self._freed_by_superseding(block, older):
                holder = self._entries[self._holder[block]]
                raise BlockConflictError(
                    f"block {block} is held by the {holder.state.value} {holder.name}; wait until "
                    "it is released"
                )
            index[block] = position
        if older is not None:
            self.abort(
                older.key,
                ReservationAbortedError(f"{older.name} was superseded by epoch {epoch}"),
                now,
            )
        entry = Entry(
            key=next(self._keys),
            request_id=request_id,
            epoch=epoch,
            block_ids=tuple(block_ids),
            deadline=deadline,
            num_missing=self._num_layers * len(block_ids),
            _index=index,
            _arrived=[0] * self._num_layers,
        )
        self._entries[entry.key] = entry
        self._by_request[request_id] = entry.key
        for block in block_ids:
            self._holder[block] = entry.key
        return entry

    def _freed_by_superseding(self, block: int, older: Entry | None) -> bool:
        # without a writer the older epoch is released at once, so its blocks may move on
        return (
            older is not None
            and older.state is ReservationState.WAITING
            and self._holder[block] == older.key
        )

    def attach(self, request_id: str, epoch: int, writer: int) -> Entry:
        """Give a reservation to the writer that names its request and epoch."""
        entry = self._entries.get(self._by_request.get(request_id, 0))
        if entry is None:
            raise UnknownReservationError(
                f"no reservation of request {request_id!r} is open; it was completed, aborted or "
                "never made"
            )
        if epoch != entry.epoch:
            raise StaleEpochError(
                f"request {request_id!r} is reserved with epoch {entry.epoch}, the writer has "
                f"{epoch}; it belongs to an earlier attempt"
            )
        if entry.writer is not None:
            raise ReservationBusyError(f"the {entry.name} has a writer already")
        entry.writer = writer
        entry.state = ReservationState.WRITING
        return entry

    def check_blocks(self, key: int, layer: int, block_ids: Sequence[int]) -> None:
        """Raise `BlockConflictError` unless all of it lies inside the reservation."""
        entry = self._entries[key]
        if not 0 <= layer < self._num_layers:
            raise BlockConflictError(
                f"the writer of the {entry.name} names layer {layer}; the model has layers "
                f"0..{self._num_layers - 1}"
            )
        for block in block_ids:
            if block not in entry._index:
                raise BlockConflictError(
                    f"the writer of the {entry.name} names block {block}, which is not reserved "
                    "for it"
                )
        if len(set(block_ids)) != len(block_ids):
            raise BlockConflictError(f"the writer of the {entry.name} names a block twice")

    def accepts(self, key: int) -> bool:
        """Whether data for this reservation is wanted (else it is read and thrown away)."""
        entry = self._entries.get(key)
        return entry is not None and entry.state is ReservationState.WRITING

    def arrived(self, key: int, layer: int, block_ids: Sequence[int]) -> None:
        """Mark (layer, block) pairs as in place. Layers and blocks in any order, also again."""
        if not self.accepts(key):
            return
        entry = self._entries[key]
        mask = 0
        for block in block_ids:
            mask |= 1 << entry._index[block]
        new = mask & ~entry._arrived[layer]
        entry._arrived[layer] |= mask
        entry.num_missing -= new.bit_count()

    def finish(self, key: int, final: FinalState) -> None:
        """The writer has sent everything; raises `IncompleteError` when something is missing."""
        if not self.accepts(key):
            return
        entry = self._entries[key]
        if entry.num_missing:
            layer, block = self._first_missing(entry)
            raise IncompleteError(
                f"the writer of the {entry.name} finished, but {entry.num_missing} of "
                f"{self._num_layers * len(entry.block_ids)} (layer, block) pairs are missing, the "
                f"first is layer {layer} block {block}"
            )
        entry.final = final
        entry.state = ReservationState.COMPLETE
        self._forget(entry)
        self._events.append(Event(EventKind.COMPLETED, entry))

    def abort(self, key: int, error: TransferError, now: float) -> None:
        """Fail a reservation; its blocks are released, or quarantined while it has a writer."""
        entry = self._entries.get(key)
        if entry is None or entry.state is ReservationState.QUARANTINED:
            return
        entry.error = error
        if self._by_request.get(entry.request_id) == key:
            del self._by_request[entry.request_id]
        self._events.append(Event(EventKind.FAILED, entry))
        if entry.writer is None:
            self._release(entry)
        else:
            entry.state = ReservationState.QUARANTINED
            entry.quarantined_at = now

    def writer_stopped(self, key: int) -> None:
        """The writer confirmed that no byte of this reservation follows."""
        entry = self._entries.get(key)
        if entry is not None and entry.state is ReservationState.QUARANTINED:
            self._release(entry)

    def writer_gone(self, writer: int, reason: str, now: float) -> None:
        """The writer's connection ended; what it was writing fails and is released."""
        for entry in self.entries:
            if entry.writer == writer:
                self.abort(
                    entry.key, WriterGoneError(f"the writer of the {entry.name} {reason}"), now
                )
                self.writer_stopped(entry.key)

    def expire(self, now: float) -> None:
        """Abort what is past its deadline."""
        for entry in self.entries:
            if entry.state is not ReservationState.QUARANTINED and entry.deadline <= now:
                where = (
                    "before a writer came"
                    if entry.writer is None
                    else f"with {entry.num_missing} (layer, block) pairs missing"
                )
                self.abort(
                    entry.key,
                    ReservationAbortedError(f"the {entry.name} passed its deadline {where}"),
                    now,
                )

    def overdue_writers(self, now: float, grace_s: float) -> list[int]:
        """Writers that have not confirmed an abort within `grace_s`: cut their connection."""
        return [
            entry.writer
            for entry in self._entries.values()
            if entry.writer is not None
            and entry.quarantined_at is not None
            and entry.quarantined_at + grace_s <= now
        ]

    def next_wake(self, grace_s: float) -> float | None:
        """When `expire` or `overdue_writers` has something to do, or None."""
        times = [
            entry.deadline if entry.quarantined_at is None else entry.quarantined_at + grace_s
            for entry in self._entries.values()
        ]
        return min(times, default=None)

    def _first_missing(self, entry: Entry) -> tuple[int, int]:
        for layer, arrived in enumerate(entry._arrived):
            for block, position in entry._index.items():
                if not arrived >> position & 1:
                    return layer, block
        raise AssertionError("num_missing disagrees with the bitmap")

    def _release(self, entry: Entry) -> None:
        entry.state = ReservationState.RELEASED
        self._forget(entry)
        self._events.append(Event(EventKind.RELEASED, entry))

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.key]
        if self._by_request.get(entry.request_id) == entry.key:
            del self._by_request[entry.request_id]
        for block in entry.block_ids:
            if self._holder.get(block) == entry.key:
                del self._holder[block]
