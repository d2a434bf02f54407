"""What the prefix cache forgets first: the least recently used, with credit for what came back.

A block that was wanted a second time is worth keeping longer than one that was computed once:
its priority is its last use plus a credit. How much credit pays depends on the traffic and on the
size of the pool, so it is learnt: a list of what plain LRU would hold (hashes only) runs beside
the cache, each hit that LRU would have missed raises the credit, each miss that LRU would have
hit lowers it. Where recency is all there is to know, the credit goes to nothing and this is LRU.

On the Mooncake conversation trace it is above LRU at every pool size but one (there 0.002 below);
RAGCache's PGDSF (Jin et al. 2024), which stood here before, is 0.05 to 0.07 below LRU where the
pool holds 5 to 20 % of the trace (`benchmarks/eviction.py`). The idea of a shadow that tells two
orders apart is ARC's (Megiddo and Modha 2003); that of a second use as the mark of worth is
LRU-2's (O'Neil et al. 1993).

Pure; time is the number of blocks touched.
"""

from __future__ import annotations

from collections import OrderedDict

START_CREDIT = 0.3
# Events in a quarter of a pool's blocks take the credit from nothing to its most.
LEARNING_RATE = 4.0
# Blocks that left the pool are remembered for this many pools: a second use may come later.
MEMORY_POOLS = 4
AGE_SMOOTHING = 0.001


class ReuseOrder:
    """Priorities of known blocks; the lowest is forgotten first.

    Args:
        num_blocks: Size of the pool.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._now = 0
        self._last_use: OrderedDict[bytes, int] = OrderedDict()
        self._came_back: set[bytes] = set()
        self._lru: OrderedDict[bytes, None] = OrderedDict()
        self._step = LEARNING_RATE / num_blocks
        self.credit = START_CREDIT
        """Credit for a second use, as a share of the age at which single-use blocks go."""
        self._age = float(num_blocks)
        self._num_aged = 0

    @property
    def num_remembered(self) -> int:
        """Hashes kept in mind."""
        return len(self._last_use)

    def hit(self, block_hash: bytes) -> None:
        """A known block was wanted again."""
        if block_hash not in self._lru:
            self.credit = min(1.0, self.credit + self._step)
        self._came_back.add(block_hash)
        self._touch(block_hash)

    def computed(self, block_hash: bytes) -> None:
        """A block's content was computed, because the cache did not hold it."""
        if block_hash in self._lru:
            self.credit = max(0.0, self.credit - self._step)
        if block_hash in self._last_use:
            self._came_back.add(block_hash)
        self._touch(block_hash)

    def priority(self, block_hash: bytes) -> float:
        """Of a block that is not in use; higher stays longer."""
        used = float(self._last_use.get(block_hash, 0))
        return used + self.credit * self._age if block_hash in self._came_back else used

    def released(self, block_hash: bytes) -> None:
        """A use of the block has ended: this is its last use so far."""
        self._now += 1
        self._last_use[block_hash] = self._now
        self._last_use.move_to_end(block_hash)

    def forgotten(self, block_hash: bytes) -> None:
        """A block has left the cache."""
        if block_hash not in self._came_back:
            age = self._now - self._last_use.get(block_hash, 0)
            self._num_aged += 1
            self._age += max(AGE_SMOOTHING, 1.0 / self._num_aged) * (age - self._age)

    def _touch(self, block_hash: bytes) -> None:
        self._now += 1
        self._last_use[block_hash] = self._now
        self._last_use.move_to_end(block_hash)
        self._lru[block_hash] = None
        self._lru.move_to_end(block_hash)
        if len(self._lru) > self._num_blocks:
            self._lru.popitem(last=False)
        while len(self._last_use) > (MEMORY_POOLS + 1) * self._num_blocks:
            oldest, _ = self._last_use.popitem(last=False)
            self._came_back.discard(oldest)
