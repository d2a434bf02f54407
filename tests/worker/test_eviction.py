"""The order of forgetting learns whether a second use tells anything; else it is LRU."""

from __future__ import annotations

import random
from collections import OrderedDict

from tandem_worker.scheduling.kv_blocks import ROOT, BlockManager


def hits(stream: list[int], capacity: int) -> int:
    """Hits of single-block requests in a pool of the block manager."""
    blocks = BlockManager(capacity, block_size=1)
    count = 0
    for item in stream:
        block_hash = item.to_bytes(8, "big")
        found = blocks.lookup([block_hash])
        count += len(found)
        blocks.acquire(found)
        fresh = blocks.allocate(1 - len(found))
        assert fresh is not None
        for block in fresh:
            blocks.publish(block, block_hash, ROOT)
        blocks.release(found + fresh)
    blocks.check()
    return count


def lru_hits(stream: list[int], capacity: int) -> int:
    cache: OrderedDict[int, None] = OrderedDict()
    count = 0
    for item in stream:
        count += item in cache
        cache[item] = None
        cache.move_to_end(item)
        if len(cache) > capacity:
            cache.popitem(last=False)
    return count


def test_prompts_used_once_do_not_push_out_those_that_come_back() -> None:
    rng = random.Random(1)
    once = iter(range(1_000, 10**6))
    stream = [rng.randrange(60) if rng.random() < 0.3 else next(once) for _ in range(20_000)]

    assert hits(stream, 100) > 1.3 * lru_hits(stream, 100)


def test_where_only_recency_tells_anything_it_is_within_a_hundredth_of_lru() -> None:
    rng = random.Random(2)
    # Each item comes a few times soon after another and never again.
    stream = [max(0, position - int(rng.expovariate(1 / 40.0))) for position in range(20_000)]

    assert hits(stream, 60) > lru_hits(stream, 60) - 0.01 * len(stream)


def test_memory_of_what_left_is_bounded() -> None:
    blocks = BlockManager(10, block_size=1)
    for item in range(1_000):
        (block,) = blocks.allocate(1) or ()
        blocks.publish(block, item.to_bytes(8, "big"), ROOT)
        blocks.release([block])

    assert blocks.num_remembered <= 5 * 10
