"""Which prompts share a prefix, and how much of one a worker has probably cached.

A prompt is a chain of block hashes over the request's bytes, so equal entries mean equal
prefixes. Pure, bounded, and nothing of it leaves the process.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence


def block_hashes(data: bytes, block_bytes: int, max_blocks: int, apart: str = "") -> list[int]:
    """Chain of hashes: entry i stands for bytes 0..(i+1)*block_bytes, so equal means covered.

    apart: chains of different names have nothing in common.
    Python's keyed hash: no attacker can aim for collisions, and values never leave the process.
    """
    chain = []
    previous = hash(apart) if apart else 0
    for start in range(0, min(len(data) // block_bytes, max_blocks) * block_bytes, block_bytes):
        previous = hash((previous, data[start : start + block_bytes]))
        chain.append(previous)
    return chain


class PrefixIndex:
    """Prefix blocks one worker has probably cached; the least recently used go first."""

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._seen: dict[int, float] = {}  # when last

    def __len__(self) -> int:
        return len(self._seen)

    def __contains__(self, block: int) -> bool:
        return block in self._seen

    def clear(self) -> None:
        self._seen.clear()

    def num_fresh(self, chain: Sequence[int], since: float) -> int:
        """As `num_covered`, of blocks that were asked for since then."""
        seen, never = self._seen, -math.inf
        return bisect_left(chain, True, key=lambda block: seen.get(block, never) < since)

    def num_covered(self, chain: Sequence[int]) -> int:
        """Blocks in front that are here.

        Whoever is here has all before it here (`add` makes them newer), so halves are looked at.
        """
        seen = self._seen
        if not chain or chain[0] not in seen:
            return 0
        if chain[-1] in seen:
            return len(chain)
        return bisect_left(chain, True, 1, key=lambda block: block not in seen)

    def add(self, chain: Sequence[int], now: float = 0.0) -> None:
        # Deepest first: eviction then takes a chain's tail before the head others may share.
        for block in reversed(chain):
            self._seen.pop(block, None)
            self._seen[block] = now
        while len(self._seen) > self._max_entries:
            del self._seen[next(iter(self._seen))]
