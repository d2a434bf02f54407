"""Keep the answers whose reuse saves most, and choose tiers knowing that answers are reused.

Worth of an entry per byte, `frequency * cost / size`, with the cost that was really paid to the
tier that really answered (Zhu et al. 2023, "On Optimal Caching and Model Multiplexing"):

* LEC, least expected cost: evict the entry with the least worth;
* GDSF (Cherkasova 1998): the same plus a clock that rises with evictions, so old fame ages;
* LRU: for comparison.

With admission, an answer enters only by displacing entries of less worth. Every operation is
O(log entries). Invariant: `used_bytes <= capacity_bytes`, after every call.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from tandem_router.cache.frequency import FrequencySketch

# What an entry costs beside its body: key, bookkeeping, heap slot.
ENTRY_OVERHEAD_BYTES = 256


class Eviction(StrEnum):
    """Order in which entries leave."""

    LEC = "lec"
    GDSF = "gdsf"
    LRU = "lru"


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """An answer and what it took to get it."""

    body: bytes
    tier: str
    tier_rank: int  # 0 is the cheapest tier; a higher rank serves every lower demand
    cost_usd: float  # realised, what a hit saves
    stored_at_s: float

    @property
    def size_bytes(self) -> int:
        """Memory it is charged for."""
        return len(self.body) + ENTRY_OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request accepts from the cache."""

    min_rank: int = 0  # the lowest tier whose answer will do
    exact_tier: str | None = None  # a forced tier accepts its own answers only

    def accepts(self, answer: CachedAnswer) -> bool:
        """Whether an answer may serve the request."""
        if self.exact_tier is not None:
            return answer.tier == self.exact_tier
        return answer.tier_rank >= self.min_rank


@dataclass(slots=True)
class CacheStats:
    """Counters since the start."""

    hits: int = 0
    misses: int = 0
    refused_by_demand: int = 0
    expired: int = 0
    stored: int = 0
    rejected: int = 0
    evicted: int = 0
    saved_usd: float = 0.0


@dataclass(slots=True)
class _Slot:
    answer: CachedAnswer
    priority: float
    version: int


class ResponseCache:
    """Exact responses by key (see `cache_key`), one per key: the dearest tier's wins.

    Args:
        capacity_bytes: bound on bodies plus overhead.
        eviction: order of leaving; GDSF by default, it needs no window to be tuned.
        ttl_s: an answer older than this is not served; None: no limit.
        admission: whether a new answer must be worth more than what it displaces.
        sketch: request frequencies; counted by `get`.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        eviction: Eviction = Eviction.GDSF,
        ttl_s: float | None = None,
        admission: bool = True,
        sketch: FrequencySketch | None = None,
    ) -> None:
        if capacity_bytes < 0:
            raise ValueError(f"capacity_bytes={capacity_bytes} must not be negative")
        self.capacity_bytes = capacity_bytes
        self.eviction = eviction
        self.ttl_s = ttl_s
        self.admission = admission
        self.sketch = sketch or FrequencySketch()
        self.used_bytes = 0
        self.stats = CacheStats()
        self._slots: dict[bytes, _Slot] = {}
        self._heap: list[tuple[float, int, bytes]] = []  # lazy: stale versions are skipped
        self._clock = 0.0
        self._tick = 0

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[CachedAnswer]:
        """The answers that are kept."""
        return (slot.answer for slot in self._slots.values())

    def get(self, key: bytes, now: float, demand: Demand | None = None) -> CachedAnswer | None:
        """The answer for a key, if there is one that the request accepts. Counts the request."""
        self.sketch.count(key)
        slot = self._slots.get(key)
        if slot is None:
            self.stats.misses += 1
            return None
        if self.ttl_s is not None and now - slot.answer.stored_at_s > self.ttl_s:
            self._remove(key)
            self.stats.expired += 1
            self.stats.misses += 1
            return None
        if demand is not None and not demand.accepts(slot.answer):
            self.stats.refused_by_demand += 1
            self.stats.misses += 1
            return None
        self._rank(key, slot)
        self.stats.hits += 1
        self.stats.saved_usd += slot.answer.cost_usd
        return slot.answer

    def put(self, key: bytes, answer: CachedAnswer) -> bool:
        """Offer an answer; False when it was not worth its bytes.

        An answer of a lower tier never replaces a dearer tier's. One that cannot be priced
        (negative or NaN cost) is refused.
        """
        worthless = not (math.isfinite(answer.cost_usd) and answer.cost_usd >= 0.0)
        if worthless or answer.size_bytes > self.capacity_bytes:
            self.stats.rejected += 1
            return False
        old = self._slots.get(key)
        fresh = False
        if old is not None:
            fresh = self.ttl_s is None or answer.stored_at_s - old.answer.stored_at_s <= self.ttl_s
            if fresh and old.answer.tier_rank > answer.tier_rank:
                self.stats.rejected += 1
                return False
            self._remove(key)
        priority = self._priority(key, answer)
        victims = self._victims(answer.size_bytes, priority)
        if victims is None:
            if old is not None and fresh:  # its bytes are still free: nothing took them
                self._slots[key] = old
                self.used_bytes += old.answer.size_bytes
                self._rank(key, old)
            self.stats.rejected += 1
            return False
        for victim in victims:
            self._clock = max(self._clock, self._slots[victim].priority)
            self._remove(victim)
            self.stats.evicted += 1
        slot = _Slot(answer, 0.0, 0)
        self._slots[key] = slot
        self.used_bytes += answer.size_bytes
        self._rank(key, slot)
        self.stats.stored += 1
        return True

    def expected_uses(self, key: bytes) -> float:
        """How often an answer to this key will be served, this time included, at least 1.

        For `RouteRequest.num_expected_uses`. A key asked for n times lately is expected about n
        times again (the Poisson-gamma forecast over an equal horizon).
        """
        return max(1.0, self.sketch.estimate(key))

    def resize(self, capacity_bytes: int, *, eviction: Eviction, ttl_s: float | None) -> None:
        """Other bounds from now on; what is worth least leaves until the rest fits."""
        self.capacity_bytes, self.ttl_s = capacity_bytes, ttl_s
        if eviction is not self.eviction:
            self.eviction, self._clock = eviction, 0.0
            for key, slot in self._slots.items():
                self._rank(key, slot)
        while self.used_bytes > capacity_bytes:
            _, version, key = heapq.heappop(self._heap)
            found = self._slots.get(key)
            if found is not None and found.version == version:
                self._remove(key)
                self.stats.evicted += 1

    def rerank(self, ranks: Mapping[str, int]) -> None:
        """Tiers have other places by price; answers of tiers that are not named are dropped."""
        for key, slot in list(self._slots.items()):
            rank = ranks.get(slot.answer.tier)
            if rank is None:
                self._remove(key)
            elif rank != slot.answer.tier_rank:
                slot.answer = replace(slot.answer, tier_rank=rank)

    def clear(self) -> None:
        """Forget every answer; frequencies stay."""
        self._slots.clear()
        self._heap.clear()
        self.used_bytes = 0

    # ------------------------------------------------------------------ order

    def _priority(self, key: bytes, answer: CachedAnswer) -> float:
        if self.eviction is Eviction.LRU:
            self._tick += 1
            return float(self._tick)
        worth = self.sketch.estimate(key) * answer.cost_usd / answer.size_bytes
        return worth + self._clock if self.eviction is Eviction.GDSF else worth

    def _rank(self, key: bytes, slot: _Slot) -> None:
        self._tick += 1
        slot.priority = self._priority(key, slot.answer)
        slot.version = self._tick
        heapq.heappush(self._heap, (slot.priority, slot.version, key))
        if len(self._heap) > 64 + 4 * len(self._slots):
            self._heap = [(s.priority, s.version, k) for k, s in self._slots.items()]
            heapq.heapify(self._heap)

    def _victims(self, size: int, priority: float) -> list[bytes] | None:
        """Entries to evict so that `size` bytes fit; None when they are worth more."""
        free = self.capacity_bytes - self.used_bytes
        popped: list[tuple[float, int, bytes]] = []
        victims: list[bytes] = []
        while free < size:
            entry = heapq.heappop(self._heap)
            slot = self._slots.get(entry[2])
            if slot is None or slot.version != entry[1]:
                continue
            popped.append(entry)
            if self.admission and self.eviction is not Eviction.LRU and entry[0] > priority:
                for one in popped:
                    heapq.heappush(self._heap, one)
                return None
            victims.append(entry[2])
            free += slot.answer.size_bytes
        return victims

    def _remove(self, key: bytes) -> None:
        slot = self._slots.pop(key)
        self.used_bytes -= slot.answer.size_bytes


def worth_upgrading(
    answer: CachedAnswer, rank: int, gain: float | None, priced_cost: float, uses: float
) -> bool:
    """Whether a cached answer of a lower tier should be replaced instead of served.

    Serving it is free, so asking the dearer tier has to pay its whole price, spread over the
    times the better answer will be served.

    Args:
        answer: what the cache holds.
        rank: tier rank of the policy's decision for this request.
        gain: predicted quality of that tier over the cached one's; None: unknown, keep.
        priced_cost: lambda times the expected cost of that tier, quality points.
        uses: `ResponseCache.expected_uses`.
    """
    if gain is None or rank <= answer.tier_rank or not math.isfinite(gain * uses):
        return False
    return gain * uses > priced_cost
