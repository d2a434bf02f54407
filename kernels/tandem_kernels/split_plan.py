# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return"
"""Which tiles of which sequence a program takes: of keys in decode attention, of rows elsewhere.

In decode attention a tile is 64 keys, an item a run of tiles of one sequence. The share of each
item comes from the whole batch's tiles and is computed on the device, so that a captured graph
stays right when the lengths change.
"""

from __future__ import annotations

from .dispatch import tl, triton

# Sequences read at a time while a program finds its work. Untuned.
PLAN_CHUNK = 128


@triton.jit
def tile_range(length, NUM_ROWS: tl.constexpr, WINDOW: tl.constexpr):
    """First tile any row can see, and one past the last."""
    last = (length + 63) // 64
    if WINDOW > 0:
        first = tl.maximum(length - NUM_ROWS - WINDOW + 1, 0) // 64
    else:
        first = length * 0
    return first, last


@triton.jit
def tiles_per_item(
    seq_lens_ptr, num_seqs, target_items,
    NUM_ROWS: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Tiles each work item takes, from the whole batch's tiles: equal shares for all programs."""
    lanes = tl.arange(0, CHUNK)
    total = tl.zeros((), tl.int32)
    for start in range(0, num_seqs, CHUNK):
        lens = tl.load(seq_lens_ptr + start + lanes, mask=start + lanes < num_seqs, other=0)
        first, last = tile_range(lens.to(tl.int32), NUM_ROWS, WINDOW)
        total += tl.sum(last - first, 0)
    return tl.maximum((total + target_items - 1) // target_items, 1)


@triton.jit
def items_before(
    seq_lens_ptr, num_seqs, per_item, item, seq,
    NUM_ROWS: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Place in the flat list of work items, where sequence s has ceil(tiles / per_item) items.

    Returns (the sequence owning `item`, that sequence's first item, the first item of `seq`).
    """
    lanes = tl.arange(0, CHUNK)
    before = tl.zeros((), tl.int32)
    owner = tl.zeros((), tl.int32)
    owner_first = tl.zeros((), tl.int32)
    seq_first = tl.zeros((), tl.int32)
    for start in range(0, num_seqs, CHUNK):
        index = start + lanes
        lens = tl.load(seq_lens_ptr + index, mask=index < num_seqs, other=0)
        first, last = tile_range(lens.to(tl.int32), NUM_ROWS, WINDOW)
        items = (last - first + per_item - 1) // per_item
        ends = before + tl.cumsum(items, 0)
        passed = (ends <= item) & (index < num_seqs)
        owner += tl.sum(passed.to(tl.int32), 0)
        owner_first = tl.maximum(owner_first, tl.max(tl.where(passed, ends, 0), 0))
        seq_first += tl.sum(tl.where(index < seq, items, 0), 0)
        before += tl.sum(items, 0)
    return owner, owner_first, seq_first


@triton.jit
def find_tile(starts_ptr, num_groups, tile, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr):
    """The group of consecutive rows that owns a tile of BLOCK_M of them, and its first tile.

    Group g has the rows starts[g] .. starts[g + 1] - 1; a tile beyond all belongs to num_groups.
    """
    lanes = tl.arange(0, CHUNK)
    before = tl.zeros((), tl.int32)
    owner = tl.zeros((), tl.int32)
    owner_first = tl.zeros((), tl.int32)
    for start in range(0, num_groups, CHUNK):
        index = start + lanes
        mask = index < num_groups
        low = tl.load(starts_ptr + index, mask=mask, other=0).to(tl.int32)
        high = tl.load(starts_ptr + index + 1, mask=mask, other=0).to(tl.int32)
        tiles = (high - low + BLOCK_M - 1) // BLOCK_M
        ends = before + tl.cumsum(tiles, 0)
        passed = (ends <= tile) & mask
        owner += tl.sum(passed.to(tl.int32), 0)
        owner_first = tl.maximum(owner_first, tl.max(tl.where(passed, ends, 0), 0))
        before += tl.sum(tiles, 0)
    return owner, owner_first
