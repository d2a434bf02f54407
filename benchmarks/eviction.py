"""Prefix cache hits on real traces: the worker's own order against LRU and PGDSF, by pool size.

    python benchmarks/eviction.py [--json FILE]

Replays the block ids of Mooncake's traces (512 tokens each) through the worker's BlockManager, one
request at a time, and beside it through plain LRU and through RAGCache's PGDSF. The figure is the
share of prompt blocks found in the cache; "cost" weighs each by what recomputing it costs
(1 + 0.01 per block before it). The pool is a share of the distinct blocks of the trace.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections import Counter
from pathlib import Path

from tandem_worker.scheduling.kv_blocks import ROOT, BlockManager

TRACES = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces" / "mooncake"
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)
ATTENTION_COST = 0.01


def read(name: str) -> list[list[int]]:
    """Block ids of each request."""
    with (TRACES / f"{name}_trace.jsonl").open() as f:
        return [json.loads(line)["hash_ids"] for line in f]


def tandem(trace: list[list[int]], capacity: int) -> tuple[int, float]:
    """Hits of the worker's block manager, and their recomputation cost."""
    blocks = BlockManager(capacity, block_size=512)
    hits, cost = 0, 0.0
    for ids in trace:
        hashes = [i.to_bytes(8, "big") for i in ids][:capacity]
        found = blocks.lookup(hashes)
        hits += len(found)
        cost += sum(1.0 + ATTENTION_COST * depth for depth in range(len(found)))
        blocks.acquire(found)
        fresh = blocks.allocate(len(hashes) - len(found))
        assert fresh is not None
        for depth, block in enumerate(fresh, start=len(found)):
            blocks.publish(block, hashes[depth], hashes[depth - 1] if depth else ROOT)
        blocks.release(found + fresh)
    return hits, cost


class _Peer:
    """A cache of leaves-first eviction with a priority of its own."""

    def __init__(self, kind: str, capacity: int) -> None:
        self.kind, self.capacity = kind, capacity
        self.parent: dict[int, int | None] = {}
        self.children: Counter[int] = Counter()
        self.frequency: Counter[int] = Counter()
        self.depth: dict[int, int] = {}
        self.current: dict[int, tuple[float, int]] = {}
        self.heap: list[tuple[float, int, int]] = []
        self.used: dict[int, int] = {}
        self.clock, self.now, self.stamp = 0.0, 0, 0

    def _offer(self, block: int) -> None:
        self.stamp += 1
        if self.kind == "lru":
            priority = float(self.used[block])
        else:
            priority = self.clock + self.frequency[block] * (
                1.0 + ATTENTION_COST * self.depth[block]
            )
        self.current[block] = (priority, self.stamp)
        heapq.heappush(self.heap, (priority, self.stamp, block))

    def _evict(self, keep: set[int]) -> bool:
        put_back = []
        while self.heap:
            priority, stamp, block = heapq.heappop(self.heap)
            if self.current.get(block) != (priority, stamp) or self.children[block]:
                continue
            if block in keep:
                put_back.append((priority, stamp, block))
                continue
            parent = self.parent.pop(block)
            del self.current[block], self.frequency[block]
            self.clock = max(self.clock, priority)
            if parent is not None:
                self.children[parent] -= 1
                if not self.children[parent] and parent in self.parent and parent not in keep:
                    self._offer(parent)
            for entry in put_back:
                heapq.heappush(self.heap, entry)
            return True
        for entry in put_back:
            heapq.heappush(self.heap, entry)
        return False

    def request(self, ids: list[int]) -> int:
        ids = ids[: self.capacity]
        found = 0
        while found < len(ids) and ids[found] in self.parent:
            found += 1
        keep = set(ids)
        for depth, block in enumerate(ids):
            if block not in self.parent:
                if len(self.parent) >= self.capacity and not self._evict(keep):
                    break
                before = ids[depth - 1] if depth else None
                self.parent[block] = before
                if before is not None:
                    self.children[before] += 1
            self.frequency[block] += 1
            self.depth[block] = depth
        for block in reversed(ids):
            if block in self.parent:
                self.now += 1
                self.used[block] = self.now
                self._offer(block)
        return found


def peer(kind: str, trace: list[list[int]], capacity: int) -> tuple[int, float]:
    """Hits of LRU or PGDSF, and their recomputation cost."""
    cache = _Peer(kind, capacity)
    found = [cache.request(ids) for ids in trace]
    return sum(found), sum(
        1.0 + ATTENTION_COST * depth for count in found for depth in range(count)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print(f"{'trace':14}{'pool':>6}{'LRU':>9}{'PGDSF':>9}{'Tandem':>9}   cost-weighted")
    for name in ("conversation", "synthetic"):
        trace = read(name)
        distinct = len({block for ids in trace for block in ids})
        total = sum(map(len, trace))
        weight = sum(1.0 + ATTENTION_COST * d for ids in trace for d in range(len(ids)))
        for share in SHARES:
            capacity = int(share * distinct)
            results = {
                "lru": peer("lru", trace, capacity),
                "pgdsf": peer("pgdsf", trace, capacity),
                "tandem": tandem(trace, capacity),
            }
            hit = {k: h / total for k, (h, _) in results.items()}
            cost = {k: c / weight for k, (_, c) in results.items()}
            rows.append({"trace": name, "pool": share, "hit": hit, "cost": cost})
            cells = "".join(f"{hit[k]:9.4f}" for k in ("lru", "pgdsf", "tandem"))
            weighed = " ".join(f"{cost[k]:.4f}" for k in ("lru", "pgdsf", "tandem"))
            print(f"{name:14}{share:6.2f}{cells}   {weighed}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
