"""Connections that never prove the token keep no peer of the KV port out."""

from __future__ import annotations

import asyncio

from tandem_worker.transfer.kv_memory import KVPool
from tandem_worker.transfer.tcp_receiver import TcpReceiver
from tcp_kit import LAYOUT, TOKEN, RawPeer


async def test_silent_connections_take_no_place_of_peers() -> None:
    receiver = TcpReceiver(
        KVPool.allocate(LAYOUT, 4), token=TOKEN, max_connections=2, max_strangers=3
    )
    await receiver.start("127.0.0.1", 0)
    try:
        first = await RawPeer.connect(receiver.address)
        await first.greet()
        silent = [await RawPeer.connect(receiver.address) for _ in range(20)]
        late = await RawPeer.connect(receiver.address)
        await late.greet()
        await asyncio.sleep(0.02)

        assert len(receiver.connections) <= 2 + 3
        third = await RawPeer.connect(receiver.address)
        assert await third.reader.read() == b""  # max_connections is of those who proved it
        for peer in (first, late, third, *silent):
            peer.close()
    finally:
        await receiver.aclose()
