"""The receiving end of tcp against hostile, broken and dying writers."""

from __future__ import annotations

import asyncio
import os
import random
import tracemalloc
import zlib

import pytest

from tandem_worker.transfer import KVPool, ReservationState, kv_link_check
from tandem_worker.transfer.errors import (
    AuthenticationError,
    ChecksumError,
    CreditError,
    PeerUnreachableError,
    ProtocolError,
    ReservationAbortedError,
    TransferError,
    UnknownReservationError,
    WriterGoneError,
)
from tandem_worker.transfer.frames import (
    HEADER_BYTES,
    Abort,
    Blocks,
    Challenge,
    Credit,
    Error,
    Finish,
    Frame,
    Hello,
    Open,
    Opened,
    Stopped,
    encode,
    sender_mac,
)
from tandem_worker.transfer.tcp_receiver import TcpReceiver
from tandem_worker.transfer.tcp_sender import TcpSender
from tandem_worker.transfer.wire import format_address, parse_address
from tcp_kit import TOKEN, UNIT, RawPeer, blocks, push_works
from transfer_kit import FINAL, LAYOUT, soon


@pytest.mark.parametrize("cut", [3, HEADER_BYTES + 2, HEADER_BYTES + 30, 2 * UNIT])
async def test_a_link_cut_inside_a_frame_fails_and_releases_the_reservation(
    target: TcpReceiver, raw: RawPeer, sender: TcpSender, cut: int
) -> None:
    reservation = target.reserve("r1", 1, [3, 4], soon())
    await raw.opened("r1")
    data = b"x" * (2 * UNIT)
    raw.writer.write((encode(blocks(0, (3, 4)), len(data)) + data)[:cut])
    await raw.writer.drain()

    raw.close()

    with pytest.raises(WriterGoneError, match="'r1' epoch 1"):
        await reservation.completed()
    await reservation.released()
    await push_works(target, sender)


async def test_a_writer_that_stalls_inside_a_frame_is_cut_off() -> None:
    target = TcpReceiver(KVPool.allocate(LAYOUT, 4), token=TOKEN, stall_s=0.3)
    await target.start("127.0.0.1", 0)
    reservation = target.reserve("r1", 1, [3], soon())
    raw = await RawPeer.connect(target.address)
    await raw.greet()
    await raw.opened("r1")
    raw.writer.write(encode(blocks(0, (3,)), UNIT) + b"x" * 100)

    with pytest.raises(TransferError, match=r"sent no byte for 0\.3 s"):
        await reservation.completed()

    await reservation.released()
    assert await raw.ends()
    await target.aclose()


@pytest.mark.parametrize(
    "noise", [b"GET / HTTP/1.1\r\nHost: kv\r\n\r\n    ", b"\x00" * 64, b"TNKV\x01\x63" + b"\0" * 40]
)
async def test_noise_is_answered_with_an_error_frame_and_the_end(
    target: TcpReceiver, sender: TcpSender, noise: bytes
) -> None:
    peer = await RawPeer.connect(target.address)
    await peer.read()
    peer.writer.write(noise)

    answer = await peer.read()

    assert isinstance(answer, Error)
    assert answer.code == ProtocolError.code
    assert await peer.ends()
    await push_works(target, sender)


async def test_a_silent_peer_is_cut_off_after_the_handshake_time() -> None:
    target = TcpReceiver(KVPool.allocate(LAYOUT, 2), handshake_s=0.2)
    await target.start("127.0.0.1", 0)
    peer = await RawPeer.connect(target.address)
    await peer.read()

    answer = await peer.read()

    assert isinstance(answer, Error)
    assert "handshake within 0.2 s" in answer.message
    assert target.stats().num_refused_connections == 1
    await target.aclose()


async def test_a_recorded_hello_cannot_be_replayed(target: TcpReceiver) -> None:
    first = await RawPeer.connect(target.address)
    challenge = await first.read()
    assert isinstance(challenge, Challenge)
    hello = Hello(b"n" * 16, sender_mac(TOKEN, challenge.nonce, b"n" * 16, LAYOUT, ""), LAYOUT, "")
    second = await RawPeer.connect(target.address)
    await second.read()

    await second.send(hello)

    answer = await second.read()
    assert isinstance(answer, Error)
    assert answer.code == AuthenticationError.code


async def test_nothing_but_hello_is_heard_before_authentication(target: TcpReceiver) -> None:
    reservation = target.reserve("r1", 1, [3], soon())
    peer = await RawPeer.connect(target.address)
    await peer.read()

    await peer.send(Open(1, "r1", 1))

    answer = await peer.read()
    assert isinstance(answer, Error)
    assert "OPEN frame before HELLO" in answer.message
    assert reservation.state is ReservationState.WAITING


@pytest.mark.parametrize(
    ("frame", "data", "text"),
    [
        (blocks(0, (3,)), UNIT, "BLOCKS frame for push 1; open is none"),
        (Finish(1, FINAL), 0, "FINISH frame for push 1; open is none"),
        (Stopped(4), 0, "push 4 was never opened"),
        (Credit(1, 5), 0, "CREDIT frame from a sender"),
        (Open(0, "r1", 1), 0, "numbers must rise"),
    ],
)
async def test_frames_out_of_turn_are_refused_and_named(
    target: TcpReceiver, raw: RawPeer, frame: Frame, data: int, text: str
) -> None:
    await raw.send(frame, bytes(data))

    answer = await raw.read()

    assert isinstance(answer, Error)
    assert text in answer.message


async def test_a_second_open_on_a_busy_connection_is_refused(
    target: TcpReceiver, raw: RawPeer
) -> None:
    reservation = target.reserve("r1", 1, [3], soon())
    await raw.opened("r1")

    await raw.send(Open(2, "r1", 1))

    answer = await raw.read()
    assert isinstance(answer, Error)
    assert "OPEN of push 2 while push 1 is open" in answer.message
    with pytest.raises(ProtocolError):
        await reservation.completed()


async def test_confirming_an_abort_that_never_was_is_refused(
    target: TcpReceiver, raw: RawPeer
) -> None:
    reservation = target.reserve("r1", 1, [3], soon())
    await raw.opened("r1")

    await raw.send(Stopped(1))

    with pytest.raises(ProtocolError, match="was not aborted"):
        await reservation.completed()


async def test_a_frame_of_another_shape_is_refused_and_both_shapes_are_named(
    target: TcpReceiver, raw: RawPeer
) -> None:
    reservation = target.reserve("r1", 1, [3], soon())
    await raw.opened("r1")

    await raw.send(Blocks(1, 0, 2, 64, 8, "float32", (3,)), bytes(2 * UNIT))

    with pytest.raises(ProtocolError, match=r"shape \(2, 64, 8, 'float32'\).*\(2, 64, 4"):
        await reservation.completed()


async def test_more_data_than_granted_is_refused_and_never_written(
    target: TcpReceiver, raw: RawPeer
) -> None:
    reservation = target.reserve("r1", 1, list(range(8)), soon())
    opened = await raw.opened("r1")
    num_blocks = opened.credit_bytes // UNIT + 1
    await raw.send(blocks(0, tuple(range(num_blocks))), b"x" * (num_blocks * UNIT))

    with pytest.raises(CreditError, match="was granted"):
        await reservation.completed()

    assert target.pool.get_bytes(0, [0]) == bytes(UNIT)


async def test_a_huge_length_is_refused_without_allocating(
    target: TcpReceiver, raw: RawPeer
) -> None:
    target.reserve("r1", 1, [3], soon())
    await raw.opened("r1")
    hostile = Blocks(1, 0, 65535, 65535, 65535, "float32", tuple(range(4096)))
    length = 4096 * 2 * 65535**3 * 4
    tracemalloc.start()

    raw.writer.write(encode(hostile, length))
    answer = await raw.read()

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(answer, Error)
    assert peak < 4 << 20


async def test_damaged_data_fails_the_push_and_names_layer_and_blocks(
    target: TcpReceiver, raw: RawPeer
) -> None:
    reservation = target.reserve("r1", 1, [3], soon())
    await raw.opened("r1")
    data = os.urandom(UNIT)

    await raw.send(blocks(1, (3,)), data, zlib.crc32(data) ^ 1)

    with pytest.raises(ChecksumError, match=r"layer 1 blocks \[3\]"):
        await reservation.completed()
    answer = await raw.read()
    assert isinstance(answer, Error)
    assert answer.code == ChecksumError.code


async def test_late_data_after_an_abort_is_thrown_away(target: TcpReceiver, raw: RawPeer) -> None:
    reservation = target.reserve("r1", 1, [3], soon())
    await raw.opened("r1")
    reservation.abort("cancelled")
    assert isinstance(await raw.read(), Abort)

    await raw.send(blocks(0, (3,)), b"x" * UNIT)
    await raw.send(Finish(1, FINAL))

    assert reservation.state is ReservationState.QUARANTINED
    await raw.send(Stopped(1))
    await reservation.released()
    assert target.pool.get_bytes(0, [3]) == bytes(UNIT)


async def test_a_writer_that_ignores_an_abort_is_cut_off_and_only_then_released(
    target: TcpReceiver, raw: RawPeer
) -> None:
    reservation = target.reserve("r1", 1, [3], soon())
    await raw.opened("r1")

    reservation.abort("cancelled")
    released = asyncio.ensure_future(reservation.released())
    done, _ = await asyncio.wait({released}, timeout=0.05)
    assert not done
    assert reservation.state is ReservationState.QUARANTINED

    await asyncio.wait_for(released, 5)
    assert await raw.ends()


async def test_a_writer_stuck_inside_a_frame_cannot_hold_aborted_blocks(
    target: TcpReceiver, raw: RawPeer
) -> None:
    reservation = target.reserve("r1", 1, [3], soon())
    await raw.opened("r1")
    raw.writer.write(encode(blocks(0, (3,)), UNIT) + b"x" * 100)
    await asyncio.sleep(0.02)

    reservation.abort("cancelled")

    await asyncio.wait_for(reservation.released(), 5)
    with pytest.raises(ReservationAbortedError, match="cancelled"):
        await reservation.completed()


async def test_a_new_push_on_a_connection_after_a_refused_one_works(
    target: TcpReceiver, raw: RawPeer
) -> None:
    await raw.send(Open(1, "nobody", 1))
    answer = await raw.read()
    assert isinstance(answer, Abort)
    assert answer.code == UnknownReservationError.code

    target.reserve("r1", 1, [3], soon())
    await raw.opened("r1", push=2)


async def test_connections_beyond_the_limit_are_closed(target: TcpReceiver) -> None:
    peers = [await RawPeer.connect(target.address) for _ in range(24)]
    for peer in peers:
        await peer.greet()

    extra = await RawPeer.connect(target.address)

    assert await extra.ends()
    for peer in peers:
        peer.close()


@pytest.mark.parametrize("seed", range(8))
async def test_a_conversation_cut_into_any_pieces_arrives_unchanged(
    target: TcpReceiver, raw: RawPeer, seed: int
) -> None:
    rng = random.Random(seed)
    opened_bytes = 2 * UNIT  # the window of this receiver: no credit is needed
    block_ids = rng.sample(range(24), 2)
    reservation = target.reserve("r1", 1, block_ids, soon())
    opened = await raw.opened("r1")
    assert opened.credit_bytes == opened_bytes
    expected: dict[tuple[int, int], bytes] = {}
    frames = [(layer, block) for layer in range(3) for block in block_ids]
    rng.shuffle(frames)
    for number, (layer, block) in enumerate(frames):
        data = rng.randbytes(UNIT)
        expected[layer, block] = data
        script = encode(blocks(layer, (block,)), UNIT, zlib.crc32(data)) + data
        if number == len(frames) - 1:
            script += encode(Finish(1, FINAL))
        while script:
            size = rng.choice([1, 27, 28, 29, 60, 1000, 4095, 4097, len(script)])
            raw.writer.write(script[:size])
            script = script[size:]
            if rng.random() < 0.5:
                await raw.writer.drain()
                await asyncio.sleep(0)
        if number < len(frames) - 1 and number % 2:
            await raw.credit(opened_bytes)

    assert await reservation.completed() == FINAL

    for (layer, block), data in expected.items():
        assert target.pool.get_bytes(layer, [block]) == data


async def test_random_damage_to_a_whole_conversation_never_stops_the_receiver(
    target: TcpReceiver, sender: TcpSender
) -> None:
    rng = random.Random(5)
    outside = [block for block in range(15) if block != 3]
    before = [target.pool.get_bytes(layer, outside) for layer in range(3)]
    for attempt in range(40):
        request_id = f"r{attempt}"
        reservation = target.reserve(request_id, 1, [3], soon())
        peer = await RawPeer.connect(target.address)
        await peer.greet()
        script = bytearray(encode(Open(1, request_id, 1)))
        for layer in range(3):
            data = rng.randbytes(UNIT)
            script += encode(blocks(layer, (3,)), UNIT, zlib.crc32(data)) + data
        script += encode(Finish(1, FINAL))
        for _ in range(rng.randint(1, 3)):
            script[rng.randrange(len(script))] ^= rng.randint(1, 255)
        peer.writer.write(script[: rng.choice([len(script), rng.randrange(len(script))])])
        peer.writer.write_eof()

        if reservation.state is ReservationState.WAITING:
            await peer.ends()
            reservation.abort()
        with pytest.raises(TransferError):
            await asyncio.wait_for(reservation.completed(), 5)
        await reservation.released()
        peer.close()

    assert before == [target.pool.get_bytes(layer, outside) for layer in range(3)]
    assert target.stats().num_reserved == 0
    await push_works(target, sender)


async def test_credits_come_back_from_pushes_that_failed(
    target: TcpReceiver, sender: TcpSender
) -> None:
    for attempt in range(40):
        reservation = target.reserve(f"r{attempt}", 1, [3], soon())
        push = await sender.open(target.address, f"r{attempt}", 1)
        await push.layer_blocks(0, [1], [3])
        if attempt % 2:
            push.abort()
        else:
            reservation.abort()
        await push.aclose()
        await reservation.released()

    assert target.credits.outstanding_bytes == 0
    await push_works(target, sender)


async def test_a_window_that_comes_free_goes_to_the_push_that_waited_and_to_no_later_one() -> None:
    """The later push has a window of its own; with both it could send more than is allowed."""
    pool = KVPool.allocate(LAYOUT, 8)
    receiver = TcpReceiver(pool, token=TOKEN, max_inflight_bytes=UNIT)
    await receiver.start("127.0.0.1", 0)
    for name, block in (("holds", 1), ("waits", 2), ("later", 3)):
        receiver.reserve(name, 1, [block], soon())
    first, second = [await RawPeer.connect(receiver.address) for _ in range(2)]
    await first.greet()
    await second.greet()
    held, none = await first.opened("holds"), await second.opened("waits")

    # Both in one turn of the receiver's event loop: the window comes free and is asked for anew.
    first.writer.write(encode(Abort(1, 1, "given up")))
    second.writer.write(encode(Abort(1, 1, "given up")) + encode(Open(2, "later", 1)))
    opened = await second.read()
    await second.send(Finish(2, FINAL))
    answer = await second.read()

    assert (held.credit_bytes, none.credit_bytes) == (UNIT, 0)
    assert isinstance(opened, Opened)
    assert opened.credit_bytes == UNIT
    assert isinstance(answer, Abort)  # incomplete, and no CREDIT came before
    await receiver.aclose()


async def test_more_pushes_than_windows_all_complete(
    target: TcpReceiver, sender: TcpSender
) -> None:
    opened: list[int] = []
    gate = asyncio.Event()

    async def one(number: int) -> None:
        reservation = target.reserve(f"r{number}", 1, [number], soon())
        push = await sender.open(target.address, f"r{number}", 1)
        opened.append(number)
        if len(opened) == 20:
            gate.set()
        await gate.wait()
        for layer in range(LAYOUT.num_layers):
            await push.layer_blocks(layer, [1], [number])
        await push.finish(FINAL)
        await reservation.completed()

    await asyncio.gather(*(one(number) for number in range(20)))

    assert target.credits.outstanding_bytes == 0


async def test_a_taken_port_is_named(target: TcpReceiver) -> None:
    second = TcpReceiver(KVPool.allocate(LAYOUT, 2))

    with pytest.raises(PeerUnreachableError, match="choose another kv_port"):
        await second.start(*parse_address(target.address))


async def test_ipv6_addresses_are_written_with_brackets() -> None:
    assert parse_address("[::1]:8200") == ("::1", 8200)
    assert format_address("::1", 8200) == "[::1]:8200"


async def test_too_little_room_for_one_block_is_refused_at_start() -> None:
    with pytest.raises(CreditError, match="max_inflight_bytes=10 "):
        TcpReceiver(KVPool.allocate(LAYOUT, 2), max_inflight_bytes=10)


async def test_two_link_checks_at_once_take_turns_or_say_so(
    target: TcpReceiver, sender: TcpSender
) -> None:
    reports = await asyncio.gather(
        *(kv_link_check(sender, target.address, LAYOUT) for _ in range(4))
    )

    assert any(report.ok for report in reports)
    for report in reports:
        assert report.ok or "try again" in str(report.error)
