"""Many requests that end in every way at random moments, on both transports.

The allocator of this test writes a guard pattern into blocks the moment they are released. A late
write would show in it.
"""

from __future__ import annotations

import asyncio
import random
import threading

import pytest

from tandem_worker.transfer import TransferError
from tandem_worker.transfer.interface import ReservationState
from transfer_kit import FINAL, LAYOUT, Pair, soon

NUM_REQUESTS = 120
GUARD = bytes([0xA5]) * LAYOUT.unit_bytes


class Blocks:
    """Free blocks of the decode worker; what is free holds the guard pattern."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.free = list(range(16))
        self.freed = asyncio.Condition()
        self.guard(self.free)

    def guard(self, block_ids: list[int]) -> None:
        for layer in range(LAYOUT.num_layers):
            for block in block_ids:
                self.pair.target.put_bytes(layer, [block], GUARD)

    async def take(self, count: int, rng: random.Random) -> list[int]:
        async with self.freed:
            await self.freed.wait_for(lambda: len(self.free) >= count)
            rng.shuffle(self.free)
            taken = [self.free.pop() for _ in range(count)]
        for layer in range(LAYOUT.num_layers):
            for block in taken:
                found = self.pair.target.get_bytes(layer, [block])
                assert found == GUARD, f"a late write reached free block {block}"
        return taken

    async def give(self, block_ids: list[int]) -> None:
        self.guard(block_ids)
        async with self.freed:
            self.free += block_ids
            self.freed.notify_all()


async def one_life(pair: Pair, blocks: Blocks, number: int, seed: int) -> str:
    """Reserve, push, and meet a random fate; says which one it was in the end."""
    rng = random.Random(seed * 1000 + number)
    count = rng.randint(1, 4)
    local = [rng.randrange(12) for _ in range(count)]
    remote = await blocks.take(count, rng)
    fate = rng.choice(["finish", "finish", "owner", "owner thread", "writer", "drop", "deadline"])
    lifetime_s = 0.02 if fate == "deadline" else 30.0
    reservation = pair.receiver.reserve(f"r{number}", number, remote, soon(lifetime_s))

    async def write() -> None:
        push = await pair.sender.open(pair.receiver.address, f"r{number}", number)
        try:
            for layer in rng.sample(range(LAYOUT.num_layers), LAYOUT.num_layers):
                if rng.random() < 0.5:
                    push.layer_blocks_nowait(layer, local, remote)
                else:
                    await push.layer_blocks(layer, local, remote)
                if rng.random() < 0.3:
                    await asyncio.sleep(rng.random() * 0.01)
                if fate == "writer":
                    push.abort("tired")
                if fate == "drop":
                    return
            await push.finish(FINAL)
        finally:
            await push.aclose()

    writer = asyncio.ensure_future(write())
    if fate.startswith("owner"):
        await asyncio.wait({writer}, timeout=rng.random() * 0.01)
        if fate == "owner":
            reservation.abort()
        else:
            threading.Thread(target=reservation.abort).start()
    try:
        await reservation.completed()
        assert reservation.state is ReservationState.COMPLETE
        for layer in range(LAYOUT.num_layers):
            assert pair.source.get_bytes(layer, local) == pair.target.get_bytes(layer, remote)
    except TransferError:
        await reservation.released()
        assert reservation.state is ReservationState.RELEASED
    await blocks.give(remote)
    await asyncio.gather(writer, return_exceptions=True)
    return reservation.state.value


@pytest.mark.parametrize("seed", [1, 2])
async def test_no_late_write_reaches_a_free_block_and_nothing_is_lost(
    pair: Pair, seed: int
) -> None:
    blocks = Blocks(pair)

    async with asyncio.timeout(60):
        ends = await asyncio.gather(
            *(one_life(pair, blocks, number, seed) for number in range(NUM_REQUESTS))
        )

    assert sorted(blocks.free) == list(range(16))
    assert ends.count("complete") >= NUM_REQUESTS // 5
    assert ends.count("released") >= NUM_REQUESTS // 5
    stats = pair.receiver.stats()
    assert (stats.num_reserved, stats.num_quarantined) == (0, 0)
    assert stats.num_completed == ends.count("complete")
    assert stats.num_failed == ends.count("released")
    rng = random.Random(seed)
    await blocks.take(16, rng)
