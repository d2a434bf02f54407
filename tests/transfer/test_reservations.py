"""The reservation table: who may write which block, and when a block may be used again."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tandem_worker.transfer.errors import (
    BlockConflictError,
    IncompleteError,
    ReservationAbortedError,
    ReservationBusyError,
    StaleEpochError,
    UnknownReservationError,
    WriterGoneError,
)
from tandem_worker.transfer.interface import ReservationState
from tandem_worker.transfer.reservations import Entry, EventKind, ReservationTable
from transfer_kit import FINAL

LAYERS, BLOCKS = 3, 8


def test_layers_and_blocks_complete_a_reservation_in_any_order() -> None:
    table = ReservationTable(LAYERS, BLOCKS)
    entry = table.reserve("r", 1, [5, 2], deadline=10, now=0)
    table.attach("r", 1, writer=1)

    for layer, block in [(2, 5), (0, 2), (1, 2), (2, 2), (1, 5), (0, 5)]:
        table.arrived(entry.key, layer, [block])
    table.finish(entry.key, FINAL)

    assert entry.state is ReservationState.COMPLETE
    assert table.held_blocks == frozenset()


def test_an_incomplete_finish_counts_and_names_what_is_missing() -> None:
    table = ReservationTable(LAYERS, BLOCKS)
    entry = table.reserve("r", 1, [5, 2], deadline=10, now=0)
    table.attach("r", 1, writer=1)
    table.arrived(entry.key, 0, [5, 2])
    table.arrived(entry.key, 0, [5])

    with pytest.raises(IncompleteError, match=r"4 of 6 .* first is layer 1 block 5"):
        table.finish(entry.key, FINAL)


@pytest.mark.parametrize(
    ("request_id", "blocks", "error", "text"),
    [
        ("r", [], BlockConflictError, "at least one"),
        ("r", [8], BlockConflictError, r"8 is outside 0\.\.7"),
        ("r", [-1], BlockConflictError, "-1 is outside"),
        ("r", [1, 1], BlockConflictError, "twice"),
        ("", [1], UnknownReservationError, "0 bytes"),
        ("x" * 257, [1], UnknownReservationError, "257 bytes"),
    ],
)
def test_impossible_reservations_are_refused_and_change_nothing(
    request_id: str, blocks: list[int], error: type[Exception], text: str
) -> None:
    table = ReservationTable(LAYERS, BLOCKS)

    with pytest.raises(error, match=text):
        table.reserve(request_id, 1, blocks, deadline=10, now=0)

    assert table.entries == []
    assert table.take_events() == []


def test_superseding_a_waiting_reservation_may_take_over_its_blocks() -> None:
    table = ReservationTable(LAYERS, BLOCKS)
    table.reserve("r", 1, [1, 2], deadline=10, now=0)

    table.reserve("r", 2, [2, 3], deadline=10, now=0)

    assert table.held_blocks == frozenset([2, 3])


def test_superseding_a_written_reservation_may_not_take_over_its_blocks() -> None:
    table = ReservationTable(LAYERS, BLOCKS)
    table.reserve("r", 1, [1, 2], deadline=10, now=0)
    table.attach("r", 1, writer=1)

    with pytest.raises(BlockConflictError, match="block 2 is held by the writing"):
        table.reserve("r", 2, [2, 3], deadline=10, now=0)

    assert table.held_blocks == frozenset([1, 2])


def test_a_silent_writer_of_an_aborted_reservation_is_overdue_after_the_grace() -> None:
    table = ReservationTable(LAYERS, BLOCKS)
    table.reserve("r", 1, [1], deadline=10, now=0)
    table.attach("r", 1, writer=7)
    table.expire(now=10)

    assert table.next_wake(grace_s=2) == 12
    assert table.overdue_writers(now=11.9, grace_s=2) == []
    assert table.overdue_writers(now=12, grace_s=2) == [7]


class TableMachine(RuleBasedStateMachine):
    """Random owners, writers and clocks against a model that knows who may hold which block."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ReservationTable(LAYERS, BLOCKS)
        self.now = 0.0
        self.live: dict[int, Entry] = {}
        self.arrived: dict[int, set[tuple[int, int]]] = {}
        self.writers = 0
        self.released: list[int] = []
        self.failed: list[int] = []

    def settle(self) -> None:
        for event in self.table.take_events():
            key = event.entry.key
            if event.kind is EventKind.FAILED:
                assert event.entry.error is not None
                self.failed.append(key)
            else:
                del self.live[key]
                if event.kind is EventKind.RELEASED:
                    self.released.append(key)
                    assert key in self.failed

    def pick(self, data: st.DataObject, *states: ReservationState) -> Entry | None:
        found = [entry for entry in self.live.values() if entry.state in states]
        return data.draw(st.sampled_from(found)) if found else None

    @rule(
        name=st.sampled_from("abc"),
        epoch=st.integers(0, 4),
        blocks=st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=3, unique=True),
        life=st.floats(0.5, 20),
    )
    def reserve(self, name: str, epoch: int, blocks: list[int], life: float) -> None:
        active = (ReservationState.WAITING, ReservationState.WRITING)
        older = next(
            (e for e in self.live.values() if e.request_id == name and e.state in active), None
        )
        reusable = set(older.block_ids if older and older.state is ReservationState.WAITING else ())
        taken = {b for e in self.live.values() for b in e.block_ids} - reusable
        if older is not None and epoch <= older.epoch:
            with pytest.raises(StaleEpochError):
                self.table.reserve(name, epoch, blocks, self.now + life, self.now)
        elif taken & set(blocks):
            with pytest.raises(BlockConflictError):
                self.table.reserve(name, epoch, blocks, self.now + life, self.now)
        else:
            entry = self.table.reserve(name, epoch, blocks, self.now + life, self.now)
            self.live[entry.key] = entry
            self.arrived[entry.key] = set()
            if older is not None:
                assert isinstance(older.error, ReservationAbortedError)
        self.settle()

    @rule(data=st.data())
    def attach(self, data: st.DataObject) -> None:
        entry = self.pick(data, ReservationState.WAITING, ReservationState.WRITING)
        if entry is None:
            return
        with pytest.raises(StaleEpochError):
            self.table.attach(entry.request_id, entry.epoch + 1, 0)
        if entry.state is ReservationState.WRITING:
            with pytest.raises(ReservationBusyError):
                self.table.attach(entry.request_id, entry.epoch, 0)
            return
        self.writers += 1
        assert self.table.attach(entry.request_id, entry.epoch, self.writers) is entry

    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1), again=st.booleans())
    def arrive(self, data: st.DataObject, layer: int, again: bool) -> None:
        entry = self.pick(data, ReservationState.WRITING, ReservationState.QUARANTINED)
        if entry is None:
            return
        blocks = data.draw(st.lists(st.sampled_from(entry.block_ids), min_size=1, unique=True))
        for _ in range(1 + again):
            self.table.arrived(entry.key, layer, blocks)
        if entry.state is ReservationState.WRITING:
            self.arrived[entry.key] |= {(layer, block) for block in blocks}

    @rule(data=st.data())
    def arrive_everything_and_finish(self, data: st.DataObject) -> None:
        entry = self.pick(data, ReservationState.WRITING)
        if entry is None:
            return
        for layer in range(LAYERS):
            self.table.arrived(entry.key, layer, entry.block_ids)
        self.table.finish(entry.key, FINAL)
        assert entry.state is ReservationState.COMPLETE
        self.settle()

    @rule(data=st.data())
    def finish_early(self, data: st.DataObject) -> None:
        entry = self.pick(data, ReservationState.WRITING, ReservationState.QUARANTINED)
        if entry is None:
            return
        missing = LAYERS * len(entry.block_ids) - len(self.arrived[entry.key])
        if entry.state is ReservationState.WRITING and missing:
            with pytest.raises(IncompleteError, match=f"{missing} of "):
                self.table.finish(entry.key, FINAL)
        else:
            self.table.finish(entry.key, FINAL)
        self.settle()

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        entry = self.pick(data, ReservationState.WAITING, ReservationState.WRITING)
        if entry is None:
            return
        had_writer = entry.writer is not None
        self.table.abort(entry.key, ReservationAbortedError("test"), self.now)
        expected = ReservationState.QUARANTINED if had_writer else ReservationState.RELEASED
        assert entry.state is expected
        self.settle()

    @rule(data=st.data())
    def writer_confirms(self, data: st.DataObject) -> None:
        entry = self.pick(data, ReservationState.QUARANTINED)
        if entry is None:
            return
        self.table.writer_stopped(entry.key)
        assert entry.state is ReservationState.RELEASED
        self.settle()

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def writer_dies(self, data: st.DataObject) -> None:
        writer = data.draw(st.integers(1, self.writers))
        hit = [entry for entry in self.live.values() if entry.writer == writer]
        writing = [entry for entry in hit if entry.state is ReservationState.WRITING]
        self.table.writer_gone(writer, "died", self.now)
        self.settle()
        assert all(entry.state is ReservationState.RELEASED for entry in hit)
        assert all(isinstance(entry.error, WriterGoneError) for entry in writing)

    @rule(seconds=st.floats(0, 8))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.table.expire(self.now)
        self.settle()
        active = (ReservationState.WAITING, ReservationState.WRITING)
        assert all(e.deadline > self.now for e in self.live.values() if e.state in active)

    @invariant()
    def each_held_block_has_one_holder(self) -> None:
        held = [block for entry in self.live.values() for block in entry.block_ids]
        assert len(held) == len(set(held))
        assert self.table.held_blocks == frozenset(held)
        assert {entry.key for entry in self.table.entries} == set(self.live)

    @invariant()
    def nothing_is_released_or_failed_twice(self) -> None:
        assert len(self.released) == len(set(self.released))
        assert len(self.failed) == len(set(self.failed))

    @invariant()
    def missing_counts_what_has_not_arrived(self) -> None:
        for key, entry in self.live.items():
            assert entry.num_missing == LAYERS * len(entry.block_ids) - len(self.arrived[key])


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
