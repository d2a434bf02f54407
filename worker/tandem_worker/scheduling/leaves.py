"""Which unused leaf goes next: of whoever holds more than its share, else of anybody.

A queue for each owner, and two queues of the owners' firsts: of all, and of those above the share.
Entries are never searched for when a block is hit, grows a child or goes; what is no longer true
is found out when it comes to the front. So one eviction costs the logarithm of blocks and owners,
and not a look at every tenant. Pure.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

Leaf = tuple[float, int, bytes]
"""An unused block without children: priority, stamp, hash. The smallest goes first."""


class Leaves:
    """Candidates for eviction.

    Args:
        num_blocks: Size of the pool; at most four entries for each of its blocks are kept.
        held: How many blocks each owner has, leaves or not.
        is_true: Whether a leaf is as it was when it was offered.
    """

    def __init__(
        self, num_blocks: int, held: Mapping[str, int], is_true: Callable[[Leaf], bool]
    ) -> None:
        self._most = 4 * num_blocks
        self._is_true = is_true
        self._of: dict[str, list[Leaf]] = {}
        self._firsts: list[tuple[Leaf, str]] = []
        self._above: list[tuple[Leaf, str]] = []
        self._share = num_blocks
        self._held = held
        self.num_entries = 0
        """Of all queues, those that are no longer true included."""

    def share(self, num_blocks: int) -> None:
        """What is everybody's share from now on."""
        fewer, self._share = num_blocks < self._share, num_blocks
        if fewer:
            # More of them are above it. Whoever falls below one that grows is found out later.
            for owner in self._of:
                self._show(owner)

    def grew(self, owner: str) -> None:
        """An owner holds one more block than before."""
        if self._held[owner] == self._share + 1:
            self._show(owner)

    def offer(self, owner: str, leaf: Leaf) -> None:
        """One more candidate."""
        leaves = self._of.setdefault(owner, [])
        heapq.heappush(leaves, leaf)
        self.num_entries += 1
        if leaves[0] is leaf:
            self._show(owner)
        if self.num_entries > self._most:
            self._drop_stale()

    def take(self) -> Leaf | None:
        """The one that goes next, which is no candidate any more."""
        queue = self._above
        if not self._settle(queue):
            queue = self._firsts
            if not self._settle(queue):
                return None
        leaf, owner = heapq.heappop(queue)
        heapq.heappop(self._of[owner])
        self.num_entries -= 2
        self._show(owner)
        return leaf

    def _show(self, owner: str) -> None:
        """Put an owner's first into the queues of firsts; earlier ones of it become untrue."""
        leaves = self._of.get(owner)
        if not leaves:
            self._of.pop(owner, None)
            return
        heapq.heappush(self._firsts, (leaves[0], owner))
        self.num_entries += 1
        if self._held[owner] > self._share:
            heapq.heappush(self._above, (leaves[0], owner))
            self.num_entries += 1

    def _settle(self, queue: list[tuple[Leaf, str]]) -> bool:
        """Whether a queue of firsts has one that is true, which is in front then."""
        while queue:
            leaf, owner = queue[0]
            leaves = self._of.get(owner)
            if (
                not leaves
                or leaves[0] is not leaf
                or (queue is self._above and self._held[owner] <= self._share)
            ):
                heapq.heappop(queue)
                self.num_entries -= 1
            elif not self._is_true(leaf):
                heapq.heappop(leaves)
                self.num_entries -= 1
                self._show(owner)
            else:
                return True
        return False

    def _drop_stale(self) -> None:
        """Where hits are many and evictions rare, what is untrue would pile up for ever."""
        self._firsts, self._above = [], []
        self.num_entries = 0
        for owner, leaves in list(self._of.items()):
            leaves[:] = filter(self._is_true, leaves)
            heapq.heapify(leaves)
            self.num_entries += len(leaves)
            self._show(owner)
