"""The sending end of tcp against hostile, broken and dying receivers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

import pytest

from tandem_worker.transfer import ReservationState, kv_link_check
from tandem_worker.transfer.errors import (
    AuthenticationError,
    ClosedError,
    LayoutMismatchError,
    PeerUnreachableError,
    ProtocolError,
    ReservationAbortedError,
    TransferError,
    WriterGoneError,
)
from tandem_worker.transfer.frames import (
    HEADER_BYTES,
    Abort,
    Challenge,
    Credit,
    Error,
    Finished,
    Hello,
    Opened,
    Stopped,
    Welcome,
    receiver_mac,
)
from tandem_worker.transfer.tcp_receiver import TcpReceiver
from tandem_worker.transfer.tcp_sender import TcpSender
from tandem_worker.transfer.wire import Wire, format_address
from tcp_kit import TOKEN, UNIT, RawPeer, push_works
from transfer_kit import FINAL, LAYOUT, random_pool, soon


async def test_a_connection_is_used_again_and_a_dead_one_is_replaced(
    target: TcpReceiver, sender: TcpSender
) -> None:
    await push_works(target, sender, "one")
    await push_works(target, sender, "two")
    assert len(target.connections) == 1

    for connection in list(target.connections.values()):
        connection.wire.close()

    await push_works(target, sender, "three")


async def test_nothing_is_kept_of_a_receiver_that_is_gone(
    target: TcpReceiver, sender: TcpSender
) -> None:
    """Pods come and go under ever new addresses."""
    await push_works(target, sender, "one")

    await target.aclose()
    async with asyncio.timeout(5):
        while sender.links:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0)

    assert sender.idle == {}


async def test_a_connection_whose_send_did_not_end_is_not_used_again() -> None:
    """The peer waits for the rest of a frame and would take the next one for it."""
    near, far = socket.socketpair()
    near.setblocking(False)
    with near, far:
        wire = Wire(near, stall_s=0.05)
        with contextlib.suppress(BlockingIOError):
            while True:
                near.send(bytes(1 << 16))

        with pytest.raises(PeerUnreachableError, match="took no byte"):
            await wire.send(Stopped(1))

        assert wire.closed


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
    await peer.send(Challenge(2, 2, b"c" * 16))
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


async def speaks_version_three(peer: RawPeer) -> None:
    await peer.send(Challenge(3, 4, b"c" * 16))
    await peer.reader.read()


async def knows_no_token(peer: RawPeer) -> None:
    await accept(peer, b"guess")
    await peer.reader.read()


async def has_another_cache(peer: RawPeer) -> None:
    await peer.send(Challenge(2, 2, b"c" * 16))
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
        (says_nothing, PeerUnreachableError, r"did not answer within 1 s"),
        (hangs_up, PeerUnreachableError, "closed the connection"),
        (speaks_version_three, ProtocolError, "versions 3 to 4, this worker 2"),
        (knows_no_token, AuthenticationError, "did not prove the peer token"),
        (has_another_cache, LayoutMismatchError, "head_dim=8"),
        (finishes_out_of_turn, ProtocolError, "FINISHED out of turn"),
        (takes_tiny_frames, ProtocolError, "frames of 5 bytes"),
        (names_a_future_push, ProtocolError, "push 9, which was never opened"),
        (never_opens, PeerUnreachableError, r"did not answer .* within 1 s"),
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
        (gives_no_credit, PeerUnreachableError, r"gave no credit for 1 s"),
        (gives_no_ack, PeerUnreachableError, r"gave no ack for 1 s"),
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


async def test_a_closed_sender_opens_nothing(target: TcpReceiver, sender: TcpSender) -> None:
    target.reserve("r1", 1, [3], soon())
    await sender.aclose()

    with pytest.raises(ClosedError):
        await sender.open(target.address, "r1", 1)


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
