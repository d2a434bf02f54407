"""Credits: bytes in flight never exceed the capacity, and everyone gets a turn."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_worker.transfer.credits import CreditWindows
from tandem_worker.transfer.errors import CreditError


def test_a_capacity_below_one_block_is_refused_with_the_number_to_raise() -> None:
    with pytest.raises(CreditError, match=r"max_inflight_bytes=100 does not hold .*128 bytes"):
        CreditWindows(capacity_bytes=100, unit_bytes=128)


def test_a_window_is_never_smaller_than_one_block() -> None:
    assert CreditWindows(capacity_bytes=300, unit_bytes=128).window_bytes == 128


def test_more_than_was_granted_is_an_error_that_names_both_numbers() -> None:
    windows = CreditWindows(capacity_bytes=256, unit_bytes=128, num_windows=2)
    windows.open(1)
    windows.arriving(1, 100)

    with pytest.raises(CreditError, match="sends 29 bytes but was granted 28"):
        windows.arriving(1, 29)


def test_a_push_beyond_the_last_window_waits_for_one_that_closes() -> None:
    windows = CreditWindows(capacity_bytes=256, unit_bytes=128, num_windows=2)
    windows.open(1)
    windows.open(2)

    assert windows.open(3) == 0
    assert windows.open(4) == 0
    assert windows.close(4) == []
    assert windows.close(1) == [(3, 128)]


@settings(max_examples=100, deadline=None)
@given(
    capacity=st.integers(1, 1000),
    unit=st.integers(1, 1000),
    num_windows=st.integers(1, 5),
    data=st.data(),
)
def test_outstanding_bytes_stay_within_capacity_and_nobody_waits_for_ever(
    capacity: int, unit: int, num_windows: int, data: st.DataObject
) -> None:
    if capacity < unit:
        return
    windows = CreditWindows(capacity, unit, num_windows)
    may_send: dict[int, int] = {}
    in_flight: dict[int, int] = {}
    for push in range(12):
        may_send[push] = windows.open(push)
        in_flight[push] = 0
        mover = data.draw(st.sampled_from(sorted(may_send)))
        sent = data.draw(st.integers(0, may_send[mover]))
        if sent:
            windows.arriving(mover, sent)
        may_send[mover] -= sent
        in_flight[mover] += sent
        done = data.draw(st.integers(0, in_flight[mover]))
        in_flight[mover] -= done
        may_send[mover] += windows.consumed(mover, done)
        if in_flight[mover] == 0 and mover in windows.granted:
            assert may_send[mover] >= windows.max_frame_bytes, "a sender waits for ever"
        assert windows.outstanding_bytes <= capacity
        if data.draw(st.booleans()):
            closing = data.draw(st.sampled_from(sorted(may_send)))
            del may_send[closing], in_flight[closing]
            for successor, grant in windows.close(closing):
                may_send[successor] += grant
        assert windows.outstanding_bytes == sum(may_send.values()) + sum(in_flight.values())

    while may_send:
        closing = next(push for push in may_send if may_send[push] or in_flight[push])
        del may_send[closing], in_flight[closing]
        for successor, grant in windows.close(closing):
            assert grant >= unit
            may_send[successor] += grant
    assert windows.outstanding_bytes == 0
