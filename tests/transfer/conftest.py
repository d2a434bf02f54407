"""Two small pools, and the two ends of each transport between them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest

from inproc_kit import InprocReceiver, InprocSender
from tandem_worker.transfer import KVPool, create_receiver, create_sender
from tandem_worker.transfer.interface import KVReceiver, KVSender
from tandem_worker.transfer.tcp_receiver import TcpReceiver
from tandem_worker.transfer.tcp_sender import TcpSender
from tcp_kit import TOKEN, UNIT, RawPeer
from transfer_kit import LAYOUT, Pair, random_pool


@pytest.fixture(params=["tcp", "inproc"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    source, target = random_pool(12), KVPool.allocate(LAYOUT, 16)
    in_process = request.param == "inproc"
    receiver: KVReceiver = (
        InprocReceiver(target, token=b"secret")
        if in_process
        else create_receiver(target, token=b"secret")
    )
    await receiver.start("127.0.0.1", 0)
    senders: list[KVSender] = []

    def make_sender(token: bytes = b"secret", pool: KVPool = source) -> KVSender:
        sender: KVSender = (
            InprocSender(pool, token=token)
            if in_process
            else create_sender(pool, token=token, checksum=True, name="prefill-0")
        )
        senders.append(sender)
        return sender

    yield Pair(request.param, source, target, make_sender(), receiver, make_sender)
    for sender in senders:
        await sender.aclose()
    await receiver.aclose()


@pytest.fixture
async def target() -> AsyncIterator[TcpReceiver]:
    receiver = TcpReceiver(
        KVPool.allocate(LAYOUT, 24),
        token=TOKEN,
        max_inflight_bytes=32 * UNIT,  # 16 windows of two blocks
        quarantine_grace_s=0.5,
        max_connections=24,
    )
    await receiver.start("127.0.0.1", 0)
    yield receiver
    await receiver.aclose()


@pytest.fixture(autouse=True)
async def no_peer_outlives_its_test() -> AsyncIterator[None]:
    yield
    while RawPeer.connected:
        peer = RawPeer.connected.pop()
        peer.close()
        with contextlib.suppress(OSError):
            await peer.writer.wait_closed()


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
        random_pool(12), token=TOKEN, connect_s=1, stall_s=1, patience_s=1, abort_grace_s=0.1
    )
    yield sender
    await sender.aclose()
