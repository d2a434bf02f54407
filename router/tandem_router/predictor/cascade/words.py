"""Hashed words and word pairs with a logistic head, in numpy."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_BUCKETS = 2**14
MAX_CHARS = 8192

_WORD = re.compile(r"\w\w+")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class HashedRows:
    """Sparse rows: bucket and weight of every entry, and where each row starts (CSR)."""

    buckets: NDArray[np.int64]
    weights: Floats
    starts: NDArray[np.int64]  # (num_rows + 1,)

    def dot(self, vector: Floats) -> Floats:
        """Rows times a (NUM_BUCKETS,) vector."""
        sums = np.concatenate([[0.0], np.cumsum(self.weights * vector[self.buckets])])
        return np.asarray(sums[self.starts[1:]] - sums[self.starts[:-1]])

    def transposed_dot(self, vector: Floats) -> Floats:
        """Transpose times a (num_rows,) vector, (NUM_BUCKETS,)."""
        per_entry = np.repeat(vector, np.diff(self.starts)) * self.weights
        return np.bincount(self.buckets, per_entry, minlength=NUM_BUCKETS).astype(np.float64)


def hash_texts(texts: Sequence[str]) -> HashedRows:
    """Sublinear counts of hashed words and word pairs, rows not yet normalised."""
    buckets: list[int] = []
    weights: list[float] = []
    starts = [0]
    for text in texts:
        words = _WORD.findall(text[:MAX_CHARS].lower())
        tokens = words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]
        counts = Counter(
            zlib.crc32(token.encode("utf-8", "replace")) % NUM_BUCKETS for token in tokens
        )
        buckets += counts.keys()
        weights += (1.0 + np.log(list(counts.values()))).tolist() if counts else []
        starts.append(len(buckets))
    return HashedRows(
        np.array(buckets, dtype=np.int64), np.array(weights), np.array(starts, dtype=np.int64)
    )


def inverse_document_frequency(rows: HashedRows) -> Floats:
    """Smoothed idf per bucket; buckets seen in one row only weigh nothing."""
    seen = np.bincount(rows.buckets, minlength=NUM_BUCKETS)
    idf = np.log((1 + len(rows.starts) - 1) / (1 + seen)) + 1.0
    return np.where(seen >= 2, idf, 0.0)


def weighted(rows: HashedRows, idf: Floats) -> HashedRows:
    """Rows times idf, each of Euclidean length one."""
    weights = rows.weights * idf[rows.buckets]
    sums = np.concatenate([[0.0], np.cumsum(weights**2)])
    lengths = np.sqrt(np.maximum(sums[rows.starts[1:]] - sums[rows.starts[:-1]], 1e-12))
    return HashedRows(rows.buckets, weights / np.repeat(lengths, np.diff(rows.starts)), rows.starts)


def fit_words(rows: HashedRows, y: Floats, *, penalty: float = 1.0, steps: int = 60) -> Floats:
    """Logistic regression on weighted rows by accelerated gradient; (NUM_BUCKETS + 1,), bias last.

    Rows have length one, so the loss is (n/2 + penalty)-smooth and the step is known.
    """
    rate = 1.0 / (0.5 * len(y) + penalty)
    weights = ahead = np.zeros(NUM_BUCKETS + 1)
    for step in range(steps):
        error = sigmoid(rows.dot(ahead[:-1]) + ahead[-1]) - y
        gradient = np.append(rows.transposed_dot(error) + penalty * ahead[:-1], error.sum())
        new = ahead - rate * gradient
        ahead = new + step / (step + 3) * (new - weights)
        weights = new
    return weights


def sigmoid(z: Floats) -> Floats:
    """Logistic function without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * z)))
