"""The tcp transport against hostile, broken and dying peers."""

from __future__ import annotations

import asyncio
import os
import random
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from transfer_kit import FINAL, LAYOUT, random_pool, soon

from tandem_worker.transfer import KVPool, ReservationState, kv_link_check
from tandem_worker.transfer.errors import (
    AuthenticationError,
    ChecksumError,
    ClosedError,
    CreditError,
    LayoutMismatchError,
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
    Finished,
    Frame,
    Hello,
    Open,
    Opened,
    Stopped,
    Welcome,
    decode_header,
    decode_meta,
    encode,
    receiver_mac,
    sender_mac,
)
from tandem_worker.transfer.tcp_receiver import TcpReceiver
from tandem_worker.transfer.tcp_sender import TcpSender
from tandem_worker.transfer.wire import format_address, parse_address

TOKEN = b"secret"
UNIT = LAYOUT.unit_bytes


class RawPeer:
    """A peer that says exactly what a test wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, address: str) -> RawPeer:
        return cls(*await asyncio.open_connection(*parse_address(address)))

    async def read(self) -> Frame:
        async with asyncio.timeout(5):
            header = decode_header(await self.reader.readexactly(HEADER_BYTES))
            return decode_meta(header, await self.reader.readexactly(header.meta_length))

    async def send(self, frame: Frame, data: bytes = b"", crc: int | None = None) -> None:
        self.writer.write(encode(frame, len(data), crc) + data)
        await self.writer.drain()

    async def greet(self, token: bytes = TOKEN) -> None:
        challenge = await self.read()
        assert isinstance(challenge, Challenge)
        nonce = os.urandom(16)
        mac = sender_mac(token, challenge.nonce, nonce, LAYOUT, "raw")
        await self.send(Hello(nonce, mac, LAYOUT, "raw"))
        assert isinstance(await self.read(), Welcome)

    async def opened(self, request_id: str, epoch: int = 1, push: int = 1) -> Opened:
        await self.send(Open(push, request_id, epoch))
        answer = await self.read()
        assert isinstance(answer, Opened)
        return answer

    async def ends(self) -> bool:
        async with asyncio.timeout(5):
            try:
                while await self.reader.read(65536):
                    pass
            except ConnectionResetError:
                pass
            return True

    def close(self) -> None:
        self.writer.close()


def blocks(layer: int, block_ids: tuple[int, ...], push: int = 1) -> Blocks:
    return Blocks(
        push,
        layer,
        LAYOUT.num_kv_heads,
        LAYOUT.block_size,
        LAYOUT.head_dim,
        LAYOUT.dtype,
        block_ids,
    )


@pytest.fixture
async def target() -> AsyncIterator[TcpReceiver]:
    receiver = TcpReceiver(
        KVPool.allocate(LAYOUT, 24),
        token=TOKEN,
        max_inflight_bytes=32 * UNIT,  # 16 windows of two blocks
        stall_s=0.3,
        quarantine_grace_s=0.1,
        max_connections=24,
    )
    await receiver.start("127.0.0.1", 0)
    yield receiver
    await receiver.aclose()


@pytest.fixture
async def raw(target: TcpReceiver) -> AsyncIterator[RawPeer]:
    peer = await RawPeer.connect(target.address)
    await peer.greet()
    yield peer
    peer.close()


@pytest.fixture
async def sender() -> AsyncIterator[TcpSender]:
    sender = TcpSender(random_pool(12), token=TOKEN, abort_grace_s=0.1)
    yield sender
    await sender.aclose()


@pytest.fixture
async def hasty_sender() -> AsyncIterator[TcpSender]:
    """For receivers that never answer."""
    sender = TcpSender(
        random_pool(12), token=TOKEN, connect_s=0.3, stall_s=0.3, patience_s=0.3, abort_grace_s=0.1
    )
    yield sender
    await sender.aclose()


async def push_works(receiver: TcpReceiver, sender: TcpSender, request_id: str = "ok") -> None:
    """The receiver still serves a well-behaved writer, into block 15."""
    reservation = receiver.reserve(request_id, 1, [15], soon())
    push = await sender.open(receiver.address, request_id, 1)
    for layer in range(LAYOUT.num_layers):
        await push.layer_blocks(layer, [3], [15])
    await push.finish(FINAL)
    assert await reservation.completed() == FINAL
    for layer in range(LAYOUT.num_layers):
        assert receiver._pool.get_bytes(layer, [15]) == sender.pool.get_bytes(layer, [3])


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


async def test_a_writer_that_stalls_inside_a_frame_is_cut_off(
    target: TcpReceiver, raw: RawPeer
) -> None:
    reservation = target.reserve("r1", 1, [3], soon())
    await raw.opened("r1")
    raw.writer.write(encode(blocks(0, (3,)), UNIT) + b"x" * 100)

    with pytest.raises(TransferError, match=r"sent no byte for 0\.3 s"):
        await reservation.completed()
    await reservation.released()
    assert await raw.ends()


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

    assert target._pool.get_bytes(0, [0]) == bytes(UNIT)


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
    assert target._pool.get_bytes(0, [3]) == bytes(UNIT)


async def test_a_writer_that_ignores_an_abort_is_cut_off_and_only_then_released(
    target: TcpReceiver, raw: RawPeer
) -> None:
    reservation = target.reserve("r1", 1, [3], soon())
    await raw.opened("r1")

    reservation.abort("cancelled")
    await asyncio.sleep(0.05)
    assert reservation.state is ReservationState.QUARANTINED

    await asyncio.wait_for(reservation.released(), 5)
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
        await peer.read()

    extra = await RawPeer.connect(target.address)

    assert await extra.ends()
    for peer in peers:
        peer.close()


async def test_random_damage_to_a_whole_conversation_never_stops_the_receiver(
    target: TcpReceiver, sender: TcpSender
) -> None:
    rng = random.Random(5)
    outside = [block for block in range(15) if block != 3]
    before = [target._pool.get_bytes(layer, outside) for layer in range(3)]
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

    assert before == [target._pool.get_bytes(layer, outside) for layer in range(3)]
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

    assert target._credits.outstanding_bytes == 0
    await push_works(target, sender)


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

    assert target._credits.outstanding_bytes == 0


async def test_a_connection_is_used_again_and_a_dead_one_is_replaced(
    target: TcpReceiver, sender: TcpSender
) -> None:
    await push_works(target, sender, "one")
    await push_works(target, sender, "two")
    assert len(target._connections) == 1

    for connection in list(target._connections.values()):
        connection.wire.close()

    await push_works(target, sender, "three")


async def test_a_cancelled_open_gives_the_reservation_back(target: TcpReceiver) -> None:
    reservation = target.reserve("r1", 1, [3], soon())
    sender = TcpSender(random_pool(12), token=TOKEN)
    task = asyncio.ensure_future(sender.open(target.address, "r1", 1))
    while reservation.state is ReservationState.WAITING:  # noqa: ASYNC110 - no event tells
        await asyncio.sleep(0)

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(WriterGoneError):
        await reservation.completed()
    await reservation.released()
    await sender.aclose()


async def test_cancelling_finish_aborts_the_push(target: TcpReceiver, sender: TcpSender) -> None:
    reservation = target.reserve("r1", 1, [3], soon())
    push = await sender.open(target.address, "r1", 1)
    for layer in range(2):
        await push.layer_blocks(layer, [1], [3])
    push.layer_blocks_nowait(2, [1], [3])
    task = asyncio.ensure_future(push.finish(FINAL))
    await asyncio.sleep(0)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await push.aclose()

    assert push.failure is not None or reservation.state is ReservationState.COMPLETE


Script = Callable[[RawPeer], Awaitable[None]]


async def fake_receiver(script: Script) -> tuple[asyncio.Server, str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await script(RawPeer(reader, writer))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server, format_address(*server.sockets[0].getsockname()[:2])


async def accept(peer: RawPeer, token: bytes = TOKEN) -> None:
    await peer.send(Challenge(1, 1, b"c" * 16))
    hello = await peer.read()
    assert isinstance(hello, Hello)
    await peer.send(Welcome(receiver_mac(token, b"c" * 16, hello.nonce, LAYOUT), LAYOUT))


async def says_noise(peer: RawPeer) -> None:
    peer.writer.write(b"220 smtp.example.org ESMTP ready, hello there")
    await peer.reader.read()


async def says_nothing(peer: RawPeer) -> None:
    await peer.reader.read()


async def hangs_up(peer: RawPeer) -> None:
    return None


async def speaks_version_two(peer: RawPeer) -> None:
    await peer.send(Challenge(2, 3, b"c" * 16))
    await peer.reader.read()


async def knows_no_token(peer: RawPeer) -> None:
    await accept(peer, b"guess")
    await peer.reader.read()


async def has_another_cache(peer: RawPeer) -> None:
    await peer.send(Challenge(1, 1, b"c" * 16))
    hello = await peer.read()
    assert isinstance(hello, Hello)
    other = random_pool(1).layout.__class__(3, 2, 64, 8, "float32")
    await peer.send(Welcome(receiver_mac(TOKEN, b"c" * 16, hello.nonce, other), other))
    await peer.reader.read()


async def finishes_out_of_turn(peer: RawPeer) -> None:
    await accept(peer)
    await peer.read()
    await peer.send(Finished(1))
    await peer.reader.read()


async def takes_tiny_frames(peer: RawPeer) -> None:
    await accept(peer)
    await peer.read()
    await peer.send(Opened(1, 1 << 30, 5))
    await peer.reader.read()


async def names_a_future_push(peer: RawPeer) -> None:
    await accept(peer)
    await peer.read()
    await peer.send(Credit(9, 9))
    await peer.reader.read()


async def never_opens(peer: RawPeer) -> None:
    await accept(peer)
    await peer.reader.read()


@pytest.mark.parametrize(
    ("script", "error", "text"),
    [
        (says_noise, ProtocolError, "is this port a tandem KV port"),
        (says_nothing, PeerUnreachableError, r"did not answer within 0\.3 s"),
        (hangs_up, PeerUnreachableError, "closed the connection"),
        (speaks_version_two, ProtocolError, "versions 2 to 3, this worker 1"),
        (knows_no_token, AuthenticationError, "did not prove the peer token"),
        (has_another_cache, LayoutMismatchError, "head_dim=8"),
        (finishes_out_of_turn, ProtocolError, "FINISHED out of turn"),
        (takes_tiny_frames, ProtocolError, "frames of 5 bytes"),
        (names_a_future_push, ProtocolError, "push 9, which was never opened"),
        (never_opens, PeerUnreachableError, r"did not answer .* within 0\.3 s"),
    ],
)
async def test_a_sender_says_what_is_wrong_with_a_receiver(
    hasty_sender: TcpSender, script: Script, error: type[TransferError], text: str
) -> None:
    server, address = await fake_receiver(script)

    with pytest.raises(error, match=text):
        await hasty_sender.open(address, "r1", 1)

    await hasty_sender.aclose()
    server.close()


async def opens_then(peer: RawPeer, credit: int) -> None:
    await accept(peer)
    await peer.read()
    await peer.send(Opened(1, credit, UNIT))


async def dies_inside_a_frame(peer: RawPeer) -> None:
    await opens_then(peer, 1 << 30)
    await peer.reader.readexactly(HEADER_BYTES + 100)
    peer.writer.transport.abort()


async def gives_no_credit(peer: RawPeer) -> None:
    await opens_then(peer, 0)
    await peer.reader.read()


async def gives_no_ack(peer: RawPeer) -> None:
    await opens_then(peer, 1 << 30)
    await peer.reader.read()


async def aborts(peer: RawPeer) -> None:
    await opens_then(peer, 1 << 30)
    await peer.send(Abort(1, ReservationAbortedError.code, "out of patience"))
    await peer.reader.read()


async def reports_an_error(peer: RawPeer) -> None:
    await opens_then(peer, 1 << 30)
    await peer.send(Error(999, "an error of tomorrow"))
    await peer.reader.read()


@pytest.mark.parametrize(
    ("script", "error", "text"),
    [
        (dies_inside_a_frame, PeerUnreachableError, "lost the connection|closed the connection"),
        (gives_no_credit, PeerUnreachableError, r"gave no credit for 0\.3 s"),
        (gives_no_ack, PeerUnreachableError, r"gave no ack for 0\.3 s"),
        (aborts, ReservationAbortedError, "out of patience"),
        (reports_an_error, TransferError, "an error of tomorrow"),
    ],
)
async def test_a_push_ends_with_the_reason_when_its_receiver_fails(
    hasty_sender: TcpSender, script: Script, error: type[TransferError], text: str
) -> None:
    server, address = await fake_receiver(script)
    push = await hasty_sender.open(address, "r1", 1)
    for layer in range(LAYOUT.num_layers):
        push.layer_blocks_nowait(layer, [1, 2], [3, 4])

    with pytest.raises(error, match=text):
        await push.finish(FINAL)

    assert isinstance(push.failure, error)
    with pytest.raises(error, match=text):
        await push.layer_blocks(0, [1], [3])
    await hasty_sender.aclose()
    server.close()


async def test_closing_a_push_whose_receiver_takes_no_bytes_ends_soon(
    hasty_sender: TcpSender,
) -> None:
    server, address = await fake_receiver(gives_no_ack_and_reads_nothing)
    push = await hasty_sender.open(address, "r1", 1)
    for _ in range(2000):
        push.layer_blocks_nowait(0, list(range(12)), list(range(12)))
    await asyncio.sleep(0.05)

    await asyncio.wait_for(push.aclose(), 2)

    assert push.failure is not None
    server.close()


async def gives_no_ack_and_reads_nothing(peer: RawPeer) -> None:
    await opens_then(peer, 1 << 40)
    await asyncio.sleep(3)


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("10.0.0.7", "is not IP:PORT"),
        (":8200", "is not IP:PORT"),
        ("10.0.0.7:http", "is not IP:PORT"),
        ("10.0.0.7:70000", "port 70000"),
        ("127.0.0.1:1", "cannot reach KV receiver 127.0.0.1:1"),
    ],
)
async def test_an_address_that_leads_nowhere_is_named(
    sender: TcpSender, address: str, text: str
) -> None:
    with pytest.raises(PeerUnreachableError, match=text):
        await sender.open(address, "r1", 1)

    report = await kv_link_check(sender, address, LAYOUT)
    assert report.error is not None
    assert text in report.error


async def test_a_taken_port_is_named(target: TcpReceiver) -> None:
    second = TcpReceiver(KVPool.allocate(LAYOUT, 2))

    with pytest.raises(PeerUnreachableError, match="choose another kv_port"):
        await second.start(*parse_address(target.address))


async def test_ipv6_addresses_are_written_with_brackets() -> None:
    assert parse_address("[::1]:8200") == ("::1", 8200)
    assert format_address("::1", 8200) == "[::1]:8200"


async def test_a_closed_sender_opens_nothing(target: TcpReceiver, sender: TcpSender) -> None:
    target.reserve("r1", 1, [3], soon())
    await sender.aclose()

    with pytest.raises(ClosedError):
        await sender.open(target.address, "r1", 1)


async def test_too_little_room_for_one_block_is_refused_at_start() -> None:
    with pytest.raises(CreditError, match="max_inflight_bytes=10 "):
        TcpReceiver(KVPool.allocate(LAYOUT, 2), max_inflight_bytes=10)


async def test_what_a_peer_writes_into_a_log_stays_on_one_line(
    hasty_sender: TcpSender,
) -> None:
    async def forges_a_log_line(peer: RawPeer) -> None:
        await peer.send(Error(3, "no\nERROR root: all is lost\x1b[2J"))
        await peer.reader.read()

    server, address = await fake_receiver(forges_a_log_line)

    with pytest.raises(AuthenticationError, match=r"no[?]ERROR root: all is lost[?]"):
        await hasty_sender.open(address, "r1", 1)

    server.close()


async def test_two_link_checks_at_once_take_turns_or_say_so(
    target: TcpReceiver, sender: TcpSender
) -> None:
    reports = await asyncio.gather(
        *(kv_link_check(sender, target.address, LAYOUT) for _ in range(4))
    )

    assert any(report.ok for report in reports)
    for report in reports:
        assert report.ok or "try again" in str(report.error)
