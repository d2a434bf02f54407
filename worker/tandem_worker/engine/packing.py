"""A step's chunks as arrays: tokens, positions, slots and block tables, decodes first.

A step of many decodes is many short lists, and turning each into an array anew took longer than
scheduling the step. A sequence's blocks become an array once and are added to as it grows
(:class:`BlockRow`); everything else of the decodes is computed for all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandem_worker.config import BLOCK_SIZE
from tandem_worker.scheduling.sequence import Chunk

Ints = NDArray[np.int64]
Tables = NDArray[np.int32]


class BlockRow:
    """A sequence's block ids as an array that follows its list."""

    __slots__ = ("_array", "_length", "_source")

    def __init__(self) -> None:
        self._array: Tables = np.empty(0, np.int32)
        self._length = 0
        self._source: list[int] | None = None

    def of(self, block_ids: list[int]) -> Tables:
        """The ids; a list only grows, and a sequence that gave its blocks up gets another one."""
        if block_ids is not self._source:
            self._source, self._length = block_ids, 0
        length = len(block_ids)
        if length != self._length:
            if length > len(self._array):
                grown = np.empty(max(8, 2 * length), np.int32)
                grown[: self._length] = self._array[: self._length]
                self._array = grown
            self._array[self._length : length] = block_ids[self._length :]
            self._length = length
        return self._array[:length]


class Packed(NamedTuple):
    """Arrays of one step; see :class:`tandem_worker.models.transformer.Batch`.

    Attributes:
        tables: ``(num_chunks, max_blocks)``, decodes first, padded with 0.
        lens: ``(num_chunks,)``, contexts with the chunk.
        counts: Tokens of each chunk of a prompt.
    """

    tokens: Ints
    positions: Ints
    slots: Ints
    tables: Tables
    lens: NDArray[np.int32]
    counts: list[int]


def pack(chunks: Sequence[Chunk], rows: Sequence[BlockRow], num_decodes: int) -> Packed:
    """Arrays of a step whose first ``num_decodes`` chunks are single tokens."""
    tokens = [chunk.sequence.token_ids[chunk.start] for chunk in chunks[:num_decodes]]
    lens = np.array([chunk.start + chunk.num_tokens for chunk in chunks], np.int32)
    counts = []
    positions: list[Ints] = [lens[:num_decodes].astype(np.int64) - 1]
    for chunk in chunks[num_decodes:]:
        end = chunk.start + chunk.num_tokens
        tokens += chunk.sequence.token_ids[chunk.start : end]
        positions.append(np.arange(chunk.start, end))
        counts.append(chunk.num_tokens)
    tables = _tables(chunks, rows, int(lens.max()))
    where = np.concatenate(positions)
    owners = np.arange(num_decodes)
    if counts:
        owners = np.concatenate([owners, np.repeat(np.arange(num_decodes, len(chunks)), counts)])
    slots = tables[owners, where // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + where % BLOCK_SIZE
    return Packed(np.array(tokens, np.int64), where, slots, tables, lens, counts)


def _tables(chunks: Sequence[Chunk], rows: Sequence[BlockRow], longest: int) -> Tables:
    tables = np.zeros((len(chunks), -(-longest // BLOCK_SIZE)), np.int32)
    width = tables.shape[1]
    for target, chunk, row in zip(tables, chunks, rows, strict=True):
        ids = row.of(chunk.sequence.block_ids)
        if len(ids) > width:  # blocks of a prompt's later chunks
            ids = ids[:width]
        target[: len(ids)] = ids
    return tables
