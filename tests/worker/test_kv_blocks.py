"""KV blocks: counts always add up, prefixes are found, and the cheapest are forgotten first."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tandem_worker.errors import InvariantError
from tandem_worker.scheduling.kv_blocks import ROOT, BlockManager, hash_block
from tandem_worker.scheduling.leaves import Leaf

NUM_BLOCKS = 12


def chain_hashes(token_ids: list[int], block_size: int, salt: bytes = b"") -> list[bytes]:
    """Hashes of all full blocks of a token sequence, first to last."""
    hashes: list[bytes] = []
    parent = ROOT
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = hash_block(parent, token_ids[start : start + block_size], salt)
        hashes.append(parent)
    return hashes


class BlockMachine(RuleBasedStateMachine):
    """Sequences come, share prefixes and go in any order."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, block_size=2)
        self.holders: list[list[int]] = []

    @rule(
        target=held,
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        owner=st.sampled_from(["", "a", "b"]),
    )
    def start(self, tokens: list[int], owner: str) -> list[int]:
        """A sequence takes its cached prefix and new blocks, and publishes the full ones."""
        hashes = chain_hashes(tokens, 2)
        hits = self.blocks.lookup(hashes)
        needed = -(-len(tokens) // 2) - len(hits)
        if needed + self.blocks.num_idle(hits) > self.blocks.num_available:
            return []
        self.blocks.acquire(hits)
        fresh = self.blocks.allocate(needed)
        assert fresh is not None
        taken = hits + fresh
        assert len(set(taken)) == len(taken)
        for index in range(len(hits), len(hashes)):
            parent = hashes[index - 1] if index else ROOT
            self.blocks.publish(taken[index], hashes[index], parent, owner)
        self.holders.append(taken)
        return taken

    @rule(block_ids=consumes(held))
    def stop(self, block_ids: list[int]) -> None:
        """A sequence ends."""
        if block_ids:
            self.holders.remove(block_ids)
            self.blocks.release(block_ids)

    @rule()
    def forget(self) -> None:
        """The cache is emptied; what is in use stays."""
        self.blocks.forget_cached()
        assert self.blocks.num_cached == 0

    @invariant()
    def counts_add_up(self) -> None:
        blocks = self.blocks
        blocks.check()
        assert blocks.num_free + blocks.num_cached + blocks.num_used == NUM_BLOCKS
        assert blocks.num_used == len({b for holder in self.holders for b in holder})


TestBlocks = BlockMachine.TestCase
TestBlocks.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def fill(blocks: BlockManager, tokens: list[int], owner: str = "") -> list[int]:
    """Compute and release one sequence, as a finished request does."""
    hashes = chain_hashes(tokens, blocks.block_size)
    hits = blocks.lookup(hashes)
    blocks.acquire(hits)
    fresh = blocks.allocate(len(hashes) - len(hits))
    assert fresh is not None
    taken = hits + fresh
    for index in range(len(hits), len(hashes)):
        blocks.publish(taken[index], hashes[index], hashes[index - 1] if index else ROOT, owner)
    blocks.release(taken)
    return taken


@pytest.mark.parametrize("num_owners", [2, 4])
def test_a_flood_of_the_cache_leaves_others_their_share(num_owners: int) -> None:
    """However much newer its blocks are: less one, that of the sequence that comes when all have
    exactly their share."""
    blocks = BlockManager(32, block_size=1)
    share = 32 // num_owners
    others = [str(number) for number in range(1, num_owners)]
    for owner in others:
        fill(blocks, [int(owner) * 1000 + token for token in range(share)], owner)

    for token in range(500):
        fill(blocks, [token], "hostile")

    for owner in others:
        kept = chain_hashes([int(owner) * 1000 + token for token in range(share)], 1)
        assert len(blocks.lookup(kept)) >= share - 1
    assert blocks.num_cached == 32


class SlowBlocks(BlockManager):
    """Looks at every block for each eviction."""

    def evict_one(self) -> None:
        leaves = [
            (known.priority, known.stamp, block_hash, known.owner)
            for block_hash, known in self._known.items()
            if not known.num_children and not self._references[known.block_id]
        ]
        if not leaves:
            super().evict_one()
            return
        share = self.num_blocks // len(self._num_known)
        above = [each for each in leaves if self._num_known[each[3]] > share]
        block_hash = min(above or leaves)[2]
        self._forget(block_hash, self._known[block_hash])


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", "d", "e", ""]),
        st.lists(st.integers(0, 2), min_size=1, max_size=6),
        st.integers(0, 3),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(REQUESTS, st.integers(3, 14))
def test_what_goes_is_what_a_look_at_every_block_says(
    requests: list[tuple[str, list[int], int]], num_blocks: int
) -> None:
    """Owners come and go, and shares with them; some requests hold their blocks for a while."""
    pair = (BlockManager(num_blocks, block_size=1), SlowBlocks(num_blocks, block_size=1))
    held: list[list[list[int]]] = []
    seen: set[bytes] = set()
    for owner, tokens, kept in requests:
        taken: list[list[int]] = []
        for blocks in pair:
            hashes = chain_hashes(tokens, 1, owner.encode())
            seen.update(hashes)
            hits = blocks.lookup(hashes)
            blocks.acquire(hits)
            fresh = blocks.allocate(len(hashes) - len(hits))
            if fresh is None:
                blocks.release(hits)
                continue
            taken.append(hits + fresh)
            for index in range(len(hits), len(hashes)):
                parent = hashes[index - 1] if index else ROOT
                blocks.publish(taken[-1][index], hashes[index], parent, owner)
        if taken:
            held.append(taken)
        while len(held) > kept:
            for blocks, block_ids in zip(pair, held.pop(0), strict=True):
                blocks.release(block_ids)
        known = [[each for each in seen if blocks.lookup([each])] for blocks in pair]
        assert known[0] == known[1]
        pair[0].check()


def test_an_eviction_does_not_look_at_every_tenant() -> None:
    class Counting(BlockManager):
        num_looks = 0

        def is_leaf(self, leaf: Leaf) -> bool:
            self.num_looks += 1
            return super().is_leaf(leaf)

    blocks = Counting(4000, block_size=1)
    for number in range(1000):
        fill(blocks, [10**6 + 10 * number + token for token in range(4)], str(number))
    blocks.num_looks = 0
    for token in range(2000):
        fill(blocks, [token], "hostile")

    assert blocks.num_evictions == 2000
    assert blocks.num_looks <= 3 * 2000


def test_an_owner_that_left_most_of_its_share_unused_keeps_what_it_has() -> None:
    blocks = BlockManager(32, block_size=1)
    fill(blocks, [1000, 1001], "modest")

    for token in range(500):
        fill(blocks, [token], "hostile")

    assert len(blocks.lookup(chain_hashes([1000, 1001], 1))) == 2


def test_a_finished_sequence_is_found_again_block_by_block() -> None:
    blocks = BlockManager(8, block_size=4)
    taken = fill(blocks, list(range(12)))

    same_start = chain_hashes([*range(8), 99, 99, 99, 99], 4)

    assert blocks.lookup(chain_hashes(list(range(12)), 4)) == taken
    assert blocks.lookup(same_start) == taken[:2]
    assert blocks.lookup(chain_hashes([7, *range(11)], 4)) == []


def test_equal_blocks_after_different_prefixes_are_different() -> None:
    first, second = chain_hashes([1, 2, 5, 6], 2), chain_hashes([3, 4, 5, 6], 2)

    assert first[1] != second[1]


def test_a_salt_keeps_owners_apart() -> None:
    assert hash_block(ROOT, [1, 2], b"a") != hash_block(ROOT, [1, 2], b"b")


def test_too_many_blocks_are_refused_whole() -> None:
    blocks = BlockManager(3)

    assert blocks.allocate(4) is None
    assert blocks.num_free == 3


def test_the_end_of_a_prefix_is_forgotten_before_its_start() -> None:
    blocks = BlockManager(4, block_size=1)
    taken = fill(blocks, [1, 2, 3, 4])

    blocks.allocate(2)

    assert blocks.lookup(chain_hashes([1, 2, 3, 4], 1)) == taken[:2]


def test_a_prefix_that_was_wanted_twice_outlives_newer_ones() -> None:
    blocks = BlockManager(40, block_size=1)
    fill(blocks, [1])
    fill(blocks, [1])
    for token in range(2, 41):
        fill(blocks, [token])

    blocks.allocate(2)

    assert blocks.lookup(chain_hashes([1], 1))
    assert not blocks.lookup(chain_hashes([2], 1))
    assert not blocks.lookup(chain_hashes([3], 1))


def test_old_popularity_fades() -> None:
    blocks = BlockManager(2, block_size=1)
    for _ in range(5):
        fill(blocks, [1])
    for token in range(10, 30):
        fill(blocks, [token])

    assert not blocks.lookup(chain_hashes([1], 1))


def test_a_prefix_hit_for_ever_costs_no_more_memory_each_time() -> None:
    blocks = BlockManager(8, block_size=2)
    hashes = chain_hashes([1, 2, 3, 4], 2)
    taken = blocks.allocate(2)
    assert taken is not None
    for index, block_hash in enumerate(hashes):
        blocks.publish(taken[index], block_hash, hashes[index - 1] if index else ROOT)
    blocks.release(taken)

    sizes = []
    for _ in range(1000):
        hits = blocks.lookup(hashes)
        blocks.acquire(hits)
        blocks.release(hits)
        sizes.append(blocks.num_leaf_entries)

    assert max(sizes) <= 4 * blocks.num_blocks
    blocks.check()
    blocks.forget_cached()
    assert blocks.num_free == 8


def test_a_block_released_twice_is_a_bug_that_shows() -> None:
    blocks = BlockManager(2)
    taken = blocks.allocate(1)
    assert taken is not None
    blocks.release(taken)

    with pytest.raises(InvariantError, match="released more often"):
        blocks.release(taken)


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    blocks = BlockManager(4, block_size=1, prefix_cache=False)
    fill(blocks, [1, 2])

    assert blocks.num_free == 4
