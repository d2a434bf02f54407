"""Two small pools, and a receiver and sender of each transport between them."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tandem_worker.transfer import KVPool, create_receiver, create_sender
from tandem_worker.transfer.interface import KVSender

# importlib mode puts no test folder on the path; the kit beside this file is shared by its tests
sys.path.insert(0, str(Path(__file__).parent))

from transfer_kit import LAYOUT, Pair, random_pool


@pytest.fixture(params=["tcp", "inproc"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    source, target = random_pool(12), KVPool.allocate(LAYOUT, 16)
    receiver = create_receiver(request.param, target, token=b"secret")
    await receiver.start("127.0.0.1", 0)
    senders: list[KVSender] = []

    def make_sender(token: bytes = b"secret", pool: KVPool = source) -> KVSender:
        sender = create_sender(request.param, pool, token=token, checksum=True, name="prefill-0")
        senders.append(sender)
        return sender

    yield Pair(request.param, source, target, make_sender(), receiver, make_sender)
    for sender in senders:
        await sender.aclose()
    await receiver.aclose()
