"""What every transport promises, run against each of them."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import pytest
import torch

from tandem_worker.transfer import (
    FinalState,
    KVPool,
    ReservationState,
    create_receiver,
    create_sender,
    kv_link_check,
)
from tandem_worker.transfer.errors import (
    AuthenticationError,
    BlockConflictError,
    ClosedError,
    IncompleteError,
    LayoutMismatchError,
    PeerUnreachableError,
    ReservationAbortedError,
    ReservationBusyError,
    StaleEpochError,
    TransferError,
    UnknownReservationError,
    WriterGoneError,
)
from transfer_kit import FINAL, LAYOUT, Pair, random_pool, soon


async def test_pushed_blocks_and_final_state_arrive_unchanged(pair: Pair) -> None:
    reservation = pair.receiver.reserve("r1", 1, [3, 4, 9], soon())
    push = await pair.sender.open(pair.receiver.address, "r1", 1)

    await pair.push_all(push, [0, 5, 2], [9, 3, 4])
    await push.finish(FINAL)

    assert await reservation.completed() == FINAL
    assert reservation.state is ReservationState.COMPLETE
    assert pair.same_bytes([0, 5, 2], [9, 3, 4])
    stats = pair.receiver.stats()
    assert (stats.num_completed, stats.num_reserved) == (1, 0)
    assert stats.bytes_received == 3 * LAYOUT.num_layers * LAYOUT.unit_bytes


async def test_blocks_outside_the_reservation_stay_as_they_were(pair: Pair) -> None:
    before = pair.target.get_bytes(1, [0, 1, 2, 4, 5])
    pair.receiver.reserve("r1", 1, [3], soon())
    push = await pair.sender.open(pair.receiver.address, "r1", 1)

    await pair.push_all(push, [7], [3])
    await push.finish(FINAL)

    assert pair.target.get_bytes(1, [0, 1, 2, 4, 5]) == before


async def test_a_partly_filled_block_may_be_pushed_again_and_the_last_push_wins(pair: Pair) -> None:
    reservation = pair.receiver.reserve("r1", 1, [3], soon())
    push = await pair.sender.open(pair.receiver.address, "r1", 1)

    await pair.push_all(push, [1], [3])
    pair.source.put_bytes(0, [1], bytes(LAYOUT.unit_bytes))
    await pair.push_all(push, [1], [3])
    await push.finish(FINAL)

    await reservation.completed()
    assert pair.same_bytes([1], [3])


async def test_the_engine_thread_may_hand_over_layers_without_waiting(pair: Pair) -> None:
    reservation = pair.receiver.reserve("r1", 1, [3, 4], soon())
    push = await pair.sender.open(pair.receiver.address, "r1", 1)

    def engine() -> None:
        for layer in range(LAYOUT.num_layers):
            push.layer_blocks_nowait(layer, [1, 2], [3, 4])

    thread = threading.Thread(target=engine)
    thread.start()
    await asyncio.to_thread(thread.join)
    await push.finish(FINAL)

    assert await reservation.completed() == FINAL
    assert pair.same_bytes([1, 2], [3, 4])


async def test_pushes_of_several_requests_run_side_by_side(pair: Pair) -> None:
    async def one(number: int) -> FinalState:
        state = dataclasses.replace(FINAL, first_token=number)
        reservation = pair.receiver.reserve(f"r{number}", 1, [number], soon())
        push = await pair.sender.open(pair.receiver.address, f"r{number}", 1)
        await pair.push_all(push, [number], [number])
        await push.finish(state)
        return await reservation.completed()

    states = await asyncio.gather(*(one(number) for number in range(12)))

    assert [state.first_token for state in states] == list(range(12))
    assert pair.same_bytes(list(range(12)), list(range(12)))


async def test_finishing_with_a_block_missing_fails_both_sides_and_names_it(pair: Pair) -> None:
    released: list[tuple[int, ...]] = []
    reservation = pair.receiver.reserve("r1", 1, [3, 4], soon(), on_released=released.append)
    push = await pair.sender.open(pair.receiver.address, "r1", 1)
    await pair.push_all(push, [1], [3])

    with pytest.raises(IncompleteError, match=r"3 of 6.*layer 0 block 4"):
        await push.finish(FINAL)

    with pytest.raises(IncompleteError, match="layer 0 block 4"):
        await reservation.completed()
    await reservation.released()
    assert released == [(3, 4)]


async def test_an_unknown_request_is_refused(pair: Pair) -> None:
    with pytest.raises(UnknownReservationError, match="'nobody'"):
        await pair.sender.open(pair.receiver.address, "nobody", 1)


@pytest.mark.parametrize("epoch", [1, 3])
async def test_another_epoch_is_refused_and_both_are_named(pair: Pair, epoch: int) -> None:
    pair.receiver.reserve("r1", 2, [3], soon())

    with pytest.raises(StaleEpochError, match=f"epoch 2.*{epoch}"):
        await pair.sender.open(pair.receiver.address, "r1", epoch)


async def test_a_second_writer_is_refused(pair: Pair) -> None:
    pair.receiver.reserve("r1", 1, [3], soon())
    await pair.sender.open(pair.receiver.address, "r1", 1)

    with pytest.raises(ReservationBusyError):
        await pair.sender.open(pair.receiver.address, "r1", 1)


async def test_while_a_token_is_changed_both_are_proved_and_then_one() -> None:
    """The receiver takes every token that holds now; which ones do is asked at each connection."""
    accepted = [b"old"]
    pool = random_pool(4)
    receiver = create_receiver(random_pool(4), token=lambda: tuple(accepted))
    await receiver.start("127.0.0.1", 0)

    async def connects(token: bytes) -> bool:
        sender = create_sender(pool, token=lambda: (token, b"another"))
        try:
            return (await kv_link_check(sender, receiver.address, LAYOUT)).ok
        finally:
            await sender.aclose()

    found = []
    for now in ([b"old"], [b"old", b"new"], [b"new", b"old"], [b"new"]):
        accepted[:] = now
        found.append((await connects(b"old"), await connects(b"new")))
    await receiver.aclose()

    assert found == [(True, False), (True, True), (True, True), (False, True)]


async def test_a_writer_with_another_token_is_refused(pair: Pair) -> None:
    reservation = pair.receiver.reserve("r1", 1, [3], soon())
    stranger = pair.make_sender(token=b"wrong")

    with pytest.raises(AuthenticationError, match="peer-token-file"):
        await stranger.open(pair.receiver.address, "r1", 1)

    assert reservation.state is ReservationState.WAITING
    assert pair.receiver.stats().num_refused_connections == 1


async def test_a_writer_with_another_cache_shape_is_refused_and_the_field_named(
    pair: Pair,
) -> None:
    pair.receiver.reserve("r1", 1, [3], soon())
    other = pair.make_sender(pool=random_pool(2, dataclasses.replace(LAYOUT, head_dim=8)))

    with pytest.raises(LayoutMismatchError, match=r"head_dim=8.*4"):
        await other.open(pair.receiver.address, "r1", 1)


async def test_an_unreachable_receiver_is_named(pair: Pair) -> None:
    gone = pair.receiver.address
    await pair.receiver.aclose()

    with pytest.raises(PeerUnreachableError, match=gone):
        await pair.sender.open(gone, "r1", 1)


async def test_a_writer_may_not_touch_blocks_that_are_not_reserved_for_it(pair: Pair) -> None:
    before = pair.target.get_bytes(0, [5])
    reservation = pair.receiver.reserve("r1", 1, [3], soon())
    push = await pair.sender.open(pair.receiver.address, "r1", 1)

    push.layer_blocks_nowait(0, [1], [5])
    with pytest.raises(BlockConflictError, match="block 5"):
        await push.finish(FINAL)

    with pytest.raises(BlockConflictError, match="block 5"):
        await reservation.completed()
    await reservation.released()
    assert pair.target.get_bytes(0, [5]) == before


async def test_a_writer_may_not_name_a_layer_that_is_not_there(pair: Pair) -> None:
    pair.receiver.reserve("r1", 1, [3], soon())
    push = await pair.sender.open(pair.receiver.address, "r1", 1)

    with pytest.raises(BlockConflictError, match="layer 3"):
        await push.layer_blocks(3, [1], [3])


async def test_an_abort_without_writer_releases_the_blocks_at_once(pair: Pair) -> None:
    released: list[tuple[int, ...]] = []
    reservation = pair.receiver.reserve("r1", 1, [3, 4], soon(), on_released=released.append)

    reservation.abort()

    assert reservation.state is ReservationState.RELEASED
    assert released == [(3, 4)]
    with pytest.raises(ReservationAbortedError, match="aborted by its owner"):
        await reservation.completed()


async def test_an_abort_quarantines_the_blocks_until_the_writer_confirms(pair: Pair) -> None:
    reservation = pair.receiver.reserve("r1", 1, [3, 4], soon())
    push = await pair.sender.open(pair.receiver.address, "r1", 1)
    await pair.push_all(push, [1], [3])

    reservation.abort("cancelled by the client")

    assert reservation.state is ReservationState.QUARANTINED
    with pytest.raises(BlockConflictError, match="quarantined"):
        pair.receiver.reserve("r2", 1, [4], soon())
    await reservation.released()
    assert reservation.state is ReservationState.RELEASED
    with pytest.raises(ReservationAbortedError, match="cancelled by the client"):
        await push.finish(FINAL)
    assert isinstance(push.failure, ReservationAbortedError)


async def test_late_writes_of_an_aborted_push_stay_out_of_reused_blocks(pair: Pair) -> None:
    reservation = pair.receiver.reserve("r1", 1, [3, 4], soon())
    late = await pair.sender.open(pair.receiver.address, "r1", 1)
    await late.layer_blocks(0, [1, 2], [3, 4])

    reservation.abort()
    for layer in range(LAYOUT.num_layers):
        late.layer_blocks_nowait(layer, [1, 2], [3, 4])
    await reservation.released()
    again = pair.receiver.reserve("r2", 1, [3, 4], soon())
    push = await pair.sender.open(pair.receiver.address, "r2", 1)
    await pair.push_all(push, [7, 8], [3, 4])
    late.layer_blocks_nowait(0, [1, 2], [3, 4])
    await push.finish(FINAL)

    await again.completed()
    await asyncio.sleep(0.02)
    assert pair.same_bytes([7, 8], [3, 4])


async def test_a_higher_epoch_supersedes_the_older_attempt(pair: Pair) -> None:
    first = pair.receiver.reserve("r1", 1, [3], soon())
    late = await pair.sender.open(pair.receiver.address, "r1", 1)

    second = pair.receiver.reserve("r1", 2, [4], soon())
    push = await pair.sender.open(pair.receiver.address, "r1", 2)
    await pair.push_all(push, [1], [4])
    await push.finish(FINAL)

    assert await second.completed() == FINAL
    with pytest.raises(ReservationAbortedError, match="superseded by epoch 2"):
        await first.completed()
    await first.released()
    with pytest.raises(TransferError):
        await late.finish(FINAL)


async def test_the_same_or_a_lower_epoch_cannot_be_reserved_again(pair: Pair) -> None:
    pair.receiver.reserve("r1", 5, [3], soon())

    for epoch in (5, 4):
        with pytest.raises(StaleEpochError):
            pair.receiver.reserve("r1", epoch, [4], soon())


async def test_the_deadline_ends_a_reservation(pair: Pair) -> None:
    reservation = pair.receiver.reserve("r1", 1, [3], soon(0.5))
    push = await pair.sender.open(pair.receiver.address, "r1", 1)

    with pytest.raises(ReservationAbortedError, match="deadline with 3"):
        await reservation.completed()

    await reservation.released()
    with pytest.raises(ReservationAbortedError, match="deadline"):
        await push.finish(FINAL)


async def test_a_writer_that_aborts_fails_the_reservation_with_its_reason(pair: Pair) -> None:
    reservation = pair.receiver.reserve("r1", 1, [3], soon())
    push = await pair.sender.open(pair.receiver.address, "r1", 1)
    await push.layer_blocks(0, [1], [3])

    push.abort("out of blocks")

    with pytest.raises(ReservationAbortedError, match="out of blocks"):
        await reservation.completed()
    await reservation.released()
    await push.aclose()


async def test_a_writer_that_goes_away_releases_the_blocks(pair: Pair) -> None:
    reservation = pair.receiver.reserve("r1", 1, [3], soon())
    push = await pair.sender.open(pair.receiver.address, "r1", 1)
    await push.layer_blocks(0, [1], [3])

    await pair.sender.aclose()

    with pytest.raises((WriterGoneError, ReservationAbortedError)):
        await reservation.completed()
    await reservation.released()


async def test_a_receiver_that_closes_fails_pushes_and_reservations(pair: Pair) -> None:
    reservation = pair.receiver.reserve("r1", 1, [3], soon())
    push = await pair.sender.open(pair.receiver.address, "r1", 1)

    await pair.receiver.aclose()

    with pytest.raises(TransferError):
        await reservation.completed()
    await reservation.released()
    with pytest.raises(TransferError):
        await push.finish(FINAL)
    with pytest.raises(ClosedError):
        pair.receiver.reserve("r2", 1, [4], soon())


async def test_an_abort_from_another_thread_works(pair: Pair) -> None:
    reservation = pair.receiver.reserve("r1", 1, [3], soon())

    await asyncio.to_thread(reservation.abort)

    with pytest.raises(ReservationAbortedError):
        await reservation.completed()


async def test_the_link_check_agrees_on_the_checksum(pair: Pair) -> None:
    before = [pair.target.get_bytes(layer, list(range(16))) for layer in range(3)]

    report = await kv_link_check(pair.sender, pair.receiver.address, LAYOUT)

    assert report.ok
    assert report.received_crc32 == report.sent_crc32
    assert report.num_bytes == LAYOUT.unit_bytes
    assert before == [pair.target.get_bytes(layer, list(range(16))) for layer in range(3)]


async def test_the_link_check_says_why_it_failed(pair: Pair) -> None:
    stranger = pair.make_sender(token=b"wrong")

    report = await kv_link_check(stranger, pair.receiver.address, LAYOUT)

    assert not report.ok
    assert report.error is not None
    assert "peer token" in report.error


async def test_link_checks_one_after_the_other_do_not_disturb_a_push(pair: Pair) -> None:
    reservation = pair.receiver.reserve("r1", 1, [3], soon())
    push = await pair.sender.open(pair.receiver.address, "r1", 1)
    await push.layer_blocks(0, [1], [3])

    reports = [await kv_link_check(pair.sender, pair.receiver.address, LAYOUT) for _ in range(3)]
    await pair.push_all(push, [1], [3])
    await push.finish(FINAL)

    assert [report.ok for report in reports] == [True] * 3
    await reservation.completed()
    assert pair.same_bytes([1], [3])


async def test_caches_that_are_staged_through_host_memory_travel() -> None:
    """The way of a GPU's cache, on a cache in host memory."""
    source, k, v = torch.randn(4, 2, 64, 8), torch.zeros(4, 2, 64, 8), torch.zeros(4, 2, 64, 8)
    receiver = create_receiver(KVPool([(k, v)], staged=True))
    await receiver.start("127.0.0.1", 0)
    sender = create_sender(KVPool([(source, source + 1)], staged=True), checksum=True)
    reservation = receiver.reserve("r1", 0, [3, 1], soon())

    push = await sender.open(receiver.address, "r1", 0)
    await push.layer_blocks(0, [0, 2], [3, 1])
    await push.finish(FINAL)
    await reservation.completed()

    assert torch.equal(k[[3, 1]], source[[0, 2]])
    assert torch.equal(v[[3, 1]], source[[0, 2]] + 1)
    assert torch.equal(k[[0, 2]], torch.zeros(2, 2, 64, 8))
    await sender.aclose()
    await receiver.aclose()


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn], ids=str
)
async def test_caches_of_every_type_travel(dtype: torch.dtype, staged: bool) -> None:
    """Staged, as from a GPU, too; the eight numbers of an int8 token are four codes and a scale."""
    made = [torch.randint(0, 100, (4, 2, 64, 8)).to(dtype) for _ in "kv"]
    source = KVPool([(made[0], made[1])], staged=staged)
    k, v = torch.zeros(4, 2, 64, 8, dtype=dtype), torch.zeros(4, 2, 64, 8, dtype=dtype)
    receiver = create_receiver(KVPool([(k, v)], staged=staged))
    await receiver.start("127.0.0.1", 0)
    sender = create_sender(source)
    receiver.reserve("r1", 0, [1], soon())

    push = await sender.open(receiver.address, "r1", 0)
    await push.layer_blocks(0, [2], [1])
    await push.finish(FINAL)

    assert torch.equal(k[1].float(), made[0][2].float())
    assert torch.equal(v[1].float(), made[1][2].float())
    assert source.layout.head_dim == (4 if dtype == torch.int8 else 8)
    await sender.aclose()
    await receiver.aclose()
