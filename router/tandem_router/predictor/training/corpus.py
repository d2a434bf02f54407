"""Prompts turned into counts and numbers once, so that cross-validation does not tokenise twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from tandem_router.predictor.linear_algebra import FloatArray
from tandem_router.predictor.reading import hand_features, ngrams
from tandem_router.predictor.reading.captured import Captured
from tandem_router.predictor.reading.embedding import StaticEmbedding

IntArray = npt.NDArray[np.int64]

#: n-gram lengths of the two text views.
WORD_NGRAMS = (1, 2)
CHAR_NGRAMS = (3, 5)


@dataclass(frozen=True, slots=True)
class Counts:
    """Hashed n-gram counts of many prompts: `matrix` columns stand for `keys` (ascending)."""

    keys: npt.NDArray[np.uint32]
    matrix: sp.csr_matrix

    def take(self, rows: IntArray) -> Counts:
        return Counts(self.keys, self.matrix[rows])


@dataclass(frozen=True, slots=True)
class Corpus:
    """Prompts turned into counts and hand features once, sliced many times."""

    words: Counts
    chars: Counts
    hand: FloatArray  # (num_rows, num_features)
    dense: FloatArray | None = None  # (num_rows, width of the embedding)
    #: Topic spaces fitted on these very prompts (`estimators.TopicSpace`).
    spaces: dict[tuple[int, int, int], Any] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.hand)

    def take(self, rows: IntArray) -> Corpus:
        dense = None if self.dense is None else self.dense[rows]
        chars = self.chars.take(rows) if self.chars.matrix.shape[0] else self.chars
        return Corpus(self.words.take(rows), chars, self.hand[rows], dense)

    @classmethod
    def of_rows(
        cls, texts: Sequence[str | Captured], embedding: StaticEmbedding | None = None
    ) -> Corpus:
        """Texts, or what is kept of them; with one of these, for views of words alone."""
        prompts = [text for text in texts if isinstance(text, str)]
        if len(prompts) == len(texts):
            return cls.of(prompts, embedding)
        read = [Captured.of(text) if isinstance(text, str) else text for text in texts]
        words = _counted((each.keys, each.counts) for each in read)
        none = words.take(np.empty(0, dtype=np.int64))
        return cls(words, none, np.array([each.hand for each in read]))

    @classmethod
    def of(cls, prompts: Sequence[str], embedding: StaticEmbedding | None = None) -> Corpus:
        items = [ngrams.read(prompt) for prompt in prompts]
        return cls(
            _count(ngrams.word_grams(item, WORD_NGRAMS[1]) for item in items),
            _count(ngrams.char_grams(item, *CHAR_NGRAMS) for item in items),
            np.array([hand_features.features(item) for item in items]).reshape(
                len(items), len(hand_features.NAMES)
            ),
            None
            if embedding is None
            else np.array([embedding(item.text) for item in items]).reshape(-1, embedding.width),
        )

    @classmethod
    def of_words(cls, texts: Sequence[str]) -> Corpus:
        """Texts for views of words alone."""
        items = [ngrams.read(text) for text in texts]
        words = _count(ngrams.word_grams(item, WORD_NGRAMS[1]) for item in items)
        return cls(words, words.take(np.empty(0, dtype=np.int64)), np.empty((len(items), 0)))


def _count(hashes: Iterator[ngrams.UInt32Array]) -> Counts:
    return _counted(map(ngrams.count, hashes))


def _counted(rows: Iterator[tuple[ngrams.UInt32Array, npt.NDArray[np.int64]]]) -> Counts:
    keys: list[ngrams.UInt32Array] = []
    counts: list[npt.NDArray[np.int64]] = []
    starts = [0]
    for row_keys, row_counts in rows:
        keys.append(row_keys)
        counts.append(row_counts)
        starts.append(starts[-1] + len(row_keys))
    flat = np.concatenate(keys) if keys else np.empty(0, dtype=np.uint32)
    data = np.concatenate(counts).astype(np.float64) if counts else np.empty(0)
    vocabulary, columns = np.unique(flat, return_inverse=True)
    return Counts(
        vocabulary,
        sp.csr_matrix((data, columns, starts), shape=(len(starts) - 1, len(vocabulary))),
    )
