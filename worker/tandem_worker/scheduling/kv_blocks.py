"""Which KV block belongs to whom: allocation, sharing of prefixes, and what to forget first.

A pure state machine over block numbers; no tensor, no clock. Every block is in exactly one of
three states, so that ``num_free + num_cached + num_used == num_blocks`` always:

- free: holds nothing of value;
- cached: nobody uses it, but it holds a known prefix and may be hit;
- used: at least one sequence (or a transfer still in flight) refers to it.

A full block is known by the hash of its tokens chained to the hash of the block before it, so
equal hashes mean equal prefixes. What is forgotten first is in `scheduling.eviction`; leaves go
before their parents, because a block whose parent is gone cannot be hit. Owners (tenants) have
equal shares of what is known: who holds no more than that loses nothing to who holds more.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tandem_worker.errors import InvariantError
from tandem_worker.scheduling.eviction import ReuseOrder
from tandem_worker.scheduling.leaves import Leaf, Leaves

ROOT = b""
"""Parent of a sequence's first block."""


def hash_block(parent: bytes, token_ids: Sequence[int], salt: bytes = b"") -> bytes:
    """Hash of one full block, chained to its parent's hash; 16 bytes. A salt has at most 64."""
    digest = hashlib.blake2b(parent, digest_size=16, key=salt)
    digest.update(array("q", token_ids).tobytes())
    return digest.digest()


@dataclass(slots=True)
class _Known:
    """A block whose content is known by its hash."""

    block_id: int
    parent: bytes
    num_children: int = 0
    owner: str = ""
    priority: float = 0.0
    stamp: int = 0


class BlockManager:
    """Hands out KV blocks and remembers the prefixes they hold.

    Args:
        num_blocks: Size of the pool.
        block_size: Tokens per block.
        prefix_cache: Keep released full blocks for later hits.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        block_size: int = 64,
        prefix_cache: bool = True,
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks} must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._order = ReuseOrder(num_blocks)
        self._free: list[int] = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._known: dict[bytes, _Known] = {}
        # Known blocks whose parent is not known any more, by the parent's hash.
        self._parentless: dict[bytes, set[bytes]] = {}
        self._num_known: Counter[str] = Counter()
        self._leaves = Leaves(num_blocks, self._num_known, self.is_leaf)
        self._num_cached = 0
        self._stamp = 0
        self.num_evictions = 0

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks nobody uses that hold a known prefix."""
        return self._num_cached

    @property
    def num_used(self) -> int:
        """Blocks that someone refers to."""
        return self.num_blocks - len(self._free) - self._num_cached

    @property
    def num_available(self) -> int:
        """Blocks that :meth:`allocate` could hand out now."""
        return len(self._free) + self._num_cached

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix; takes no reference."""
        block_ids: list[int] = []
        for block_hash in hashes:
            known = self._known.get(block_hash)
            if known is None:
                break
            block_ids.append(known.block_id)
        return block_ids

    def num_idle(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks are cached, that is: would stop being available if acquired."""
        return sum(1 for block_id in block_ids if self._references[block_id] == 0)

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Refer to blocks found by :meth:`lookup`; counts as a hit of each."""
        for block_id in block_ids:
            block_hash = self._hash_of[block_id]
            if self._references[block_id] == 0:
                if block_hash is None:
                    raise InvariantError(f"block {block_id} is free and cannot be acquired")
                self._num_cached -= 1
            if block_hash is not None:
                self._order.hit(block_hash)
            self._references[block_id] += 1

    def allocate(self, count: int) -> list[int] | None:
        """Take ``count`` blocks, forgetting cached ones if need be; None if there are too few."""
        if count > self.num_available:
            return None
        while len(self._free) < count:
            self.evict_one()
        block_ids = [self._free.pop() for _ in range(count)]
        for block_id in block_ids:
            self._references[block_id] = 1
        return block_ids

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one reference of each block; the last one makes it cached or free."""
        for block_id in reversed(block_ids):
            references = self._references[block_id] - 1
            if references < 0:
                raise InvariantError(f"block {block_id} was released more often than acquired")
            self._references[block_id] = references
            if references > 0:
                continue
            block_hash = self._hash_of[block_id]
            if block_hash is None:
                self._free.append(block_id)
            else:
                self._num_cached += 1
                self._order.released(block_hash)
                self._offer(block_hash, self._known[block_hash])

    def publish(self, block_id: int, block_hash: bytes, parent: bytes, owner: str = "") -> None:
        """Declare a used block full and known.

        Args:
            block_id: A block the caller refers to.
            block_hash: From :func:`hash_block`.
            parent: Hash of the block before it, or ROOT.
            owner: To whose share of the cache it counts.

        When another block already holds the same prefix, that one stays the known one.
        """
        if not self.prefix_cache or block_hash in self._known:
            return
        if self._references[block_id] == 0 or self._hash_of[block_id] is not None:
            raise InvariantError(f"block {block_id} cannot be published: unused or already known")
        self._hash_of[block_id] = block_hash
        self._order.computed(block_hash)
        known = _Known(block_id=block_id, parent=parent, owner=owner)
        self._num_known[owner] += 1
        if self._num_known[owner] == 1:
            self._share_anew()
        self._leaves.grew(owner)
        # Children may have outlived an evicted parent; they can be hit again from now on.
        known.num_children = len(self._parentless.pop(block_hash, ()))
        self._known[block_hash] = known
        above = self._known.get(parent)
        if above is not None:
            above.num_children += 1
        elif parent != ROOT:
            self._parentless.setdefault(parent, set()).add(block_hash)

    @property
    def num_remembered(self) -> int:
        """Hashes that the order of forgetting keeps in mind, those of blocks that left included."""
        return self._order.num_remembered

    def forget_cached(self) -> None:
        """Empty the prefix cache of blocks nobody uses."""
        while self._num_cached:
            self.evict_one()

    def check(self) -> None:
        """Recount everything.

        Raises:
            InvariantError: a count or an index disagrees with the blocks' states.
        """
        free = set(self._free)
        cached = {k.block_id for k in self._known.values() if self._references[k.block_id] == 0}
        used = {i for i, references in enumerate(self._references) if references > 0}
        if len(free) != len(self._free) or free & cached or free & used or cached & used:
            raise InvariantError("a block is in two states at once")
        if len(free) + len(cached) + len(used) != self.num_blocks:
            raise InvariantError(
                f"{len(free)} free + {len(cached)} cached + {len(used)} used "
                f"is not {self.num_blocks}"
            )
        if len(cached) != self._num_cached or len(used) != self.num_used:
            raise InvariantError("the counters disagree with the blocks")
        if Counter(known.owner for known in self._known.values()) != self._num_known:
            raise InvariantError("an owner's known blocks are miscounted")
        children = Counter(known.parent for known in self._known.values())
        for block_hash, known in self._known.items():
            if self._hash_of[known.block_id] != block_hash:
                raise InvariantError(f"block {known.block_id} has lost its hash")
            if children[block_hash] != known.num_children:
                raise InvariantError(f"block {known.block_id} miscounts its children")

    def _offer(self, block_hash: bytes, known: _Known) -> None:
        """Make an unused block a candidate for eviction, if it is a leaf."""
        known.priority = self._order.priority(block_hash)
        self._stamp += 1
        known.stamp = self._stamp
        if known.num_children == 0:
            self._leaves.offer(known.owner, (known.priority, known.stamp, block_hash))

    @property
    def num_leaf_entries(self) -> int:
        """Length of the queues of blocks to evict, entries that are no longer true included."""
        return self._leaves.num_entries

    def is_leaf(self, leaf: Leaf) -> bool:
        """Whether it is unused and without children since it was offered."""
        known = self._known.get(leaf[2])
        return (
            known is not None
            and known.stamp == leaf[1]
            and known.num_children == 0
            and self._references[known.block_id] == 0
        )

    def _share_anew(self) -> None:
        """An owner came or went."""
        self._leaves.share(self.num_blocks // max(1, len(self._num_known)))

    def evict_one(self) -> None:
        """Forget the cached block that goes next. Raises InvariantError where none is cached."""
        leaf = self._leaves.take()
        if leaf is not None:
            self._forget(leaf[2], self._known[leaf[2]])
            return
        # Only parents of used blocks are left (a twin of the parent is in use): give up the
        # cheapest one; its children wait as orphans until the parent is published again.
        idle = [
            (known.priority, block_hash)
            for block_hash, known in self._known.items()
            if self._references[known.block_id] == 0
        ]
        if not idle:
            raise InvariantError("nothing is cached, so nothing can be evicted")
        _, block_hash = min(idle)
        self._forget(block_hash, self._known[block_hash])

    def _forget(self, block_hash: bytes, known: _Known) -> None:
        self._order.forgotten(block_hash)
        self.num_evictions += 1
        del self._known[block_hash]
        self._hash_of[known.block_id] = None
        self._num_cached -= 1
        self._num_known[known.owner] -= 1
        if not self._num_known[known.owner]:
            del self._num_known[known.owner]
            self._share_anew()
        self._free.append(known.block_id)
        if known.num_children:
            children = {h for h, other in self._known.items() if other.parent == block_hash}
            self._parentless.setdefault(block_hash, set()).update(children)
        above = self._known.get(known.parent)
        if above is None:
            siblings = self._parentless.get(known.parent)
            if siblings is not None:
                siblings.discard(block_hash)
                if not siblings:
                    del self._parentless[known.parent]
            return
        above.num_children -= 1
        if above.num_children == 0 and self._references[above.block_id] == 0:
            self._offer(known.parent, above)
