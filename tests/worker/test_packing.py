"""A packed step says what its chunks say, whatever grew, shrank or changed hands in between."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from tandem_worker.engine.packing import BlockRow, pack
from tandem_worker.scheduling.sequence import Chunk, Sequence

BLOCK = 64


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Chunk], int]:
    """Decodes, then chunks of prompts; at least one of either."""
    num_decodes, num_chunks = draw(st.integers(0, 5)), draw(st.integers(0, 3))
    chunks = []
    for number in range(max(1, num_decodes + num_chunks)):
        start = draw(st.integers(0, 400))
        size = 1 if number < num_decodes else draw(st.integers(1, 200))
        spare = draw(st.integers(0, 3))
        num_blocks = -(-(start + size) // BLOCK) + spare
        blocks = draw(st.permutations(range(100, 100 + num_blocks)))
        tokens = list(range(number * 1000, number * 1000 + start + size + spare))
        chunks.append(Chunk(Sequence(str(number), tokens, 1, block_ids=list(blocks)), start, size))
    return chunks, min(num_decodes, len(chunks))


@given(step=steps())
@settings(max_examples=60, deadline=None)
def test_a_packed_step_is_its_chunks_position_by_position(step: tuple[list[Chunk], int]) -> None:
    chunks, num_decodes = step

    packed = pack(chunks, [BlockRow() for _ in chunks], num_decodes)

    places = [
        (chunk, position)
        for chunk in chunks
        for position in range(chunk.start, chunk.start + chunk.num_tokens)
    ]
    assert packed.positions.tolist() == [position for _, position in places]
    assert packed.tokens.tolist() == [c.sequence.token_ids[position] for c, position in places]
    assert packed.slots.tolist() == [
        c.sequence.block_ids[position // BLOCK] * BLOCK + position % BLOCK for c, position in places
    ]
    assert packed.lens.tolist() == [chunk.start + chunk.num_tokens for chunk in chunks]
    assert packed.counts == [chunk.num_tokens for chunk in chunks[num_decodes:]]
    for chunk, table in zip(chunks, packed.tables.tolist(), strict=True):
        needed = -(-(chunk.start + chunk.num_tokens) // BLOCK)
        assert table[:needed] == chunk.sequence.block_ids[:needed]


@given(
    changes=st.lists(
        st.one_of(
            st.lists(st.integers(0, 9), min_size=1, max_size=20),  # grows by these
            st.none(),  # gives its blocks up and gets others
        ),
        max_size=12,
    )
)
def test_a_row_follows_a_list_that_grows_or_is_replaced(changes: list[list[int] | None]) -> None:
    row, ids = BlockRow(), [7]
    for change in changes:
        if change is None:
            ids = [3, 1]
        else:
            ids += change
        assert row.of(ids).tolist() == ids
