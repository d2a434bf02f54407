"""The KV cache of a worker over several processes, as one: each block's heads lie with their ranks.

The other ranks' caches are memory that rank 0 maps too, so a transfer reads and writes them where
they are, in the order of heads that any peer uses: prefill and decode workers may be cut into
different numbers of ranks. Where ranks share a KV head, the first of them is read and all are
written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tandem_worker.transfer.kv_memory import KVPool, ScatterTarget


class ShardedKVPool(KVPool):
    """Pools of one shape, rank by rank, that together hold ``num_kv_heads`` heads."""

    def __init__(self, parts: Sequence[KVPool], num_kv_heads: int) -> None:
        first = parts[0]
        copies = len(parts) * first.layout.num_kv_heads // num_kv_heads
        assert copies * num_kv_heads == len(parts) * first.layout.num_kv_heads
        assert all(part.layout == first.layout for part in parts)
        self.caches = []
        self.num_blocks = first.num_blocks
        self.layout = replace(first.layout, num_kv_heads=num_kv_heads)
        self.device = first.device
        self._bytes = []
        self._owners = list(parts[::copies])
        self._copies = [parts[at : at + copies] for at in range(0, len(parts), copies)]

    def scatter(self, layer: int, block_ids: Sequence[int]) -> ScatterTarget:
        """See `KVPool.scatter`; `commit` gives ranks that share a head their copies."""
        target = super().scatter(layer, block_ids)
        index = torch.as_tensor(list(block_ids), dtype=torch.int64)

        def commit() -> None:
            for owner, *others in self._copies:
                for other in others:
                    for mine, theirs in zip(owner.caches[layer], other.caches[layer], strict=True):
                        source = mine.view(torch.uint8).index_select(0, index)
                        theirs.view(torch.uint8).index_copy_(0, index, source)

        return ScatterTarget(target.views, commit)

    def _views(self, layer: int, block_ids: Sequence[int]) -> list[memoryview]:
        pieces = [part.boxes(layer) for part in self._owners]
        size = self._owners[0].layout.box_bytes
        return [
            caches[which][block * size : (block + 1) * size]
            for which in (0, 1)
            for block in block_ids
            for caches in pieces
        ]
