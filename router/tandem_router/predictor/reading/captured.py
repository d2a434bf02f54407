"""What is kept of a prompt instead of its text: hand features and hashed words.

A predictor whose views read words and hand features alone says of them what it says of the text.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.errors import DataError
from tandem_router.predictor.reading import hand_features, ngrams

#: Longest run of words that is hashed.
WORDS_TO = 2
MAX_GRAMS = 2_000
_CHARS = hand_features.NAMES.index("log_chars")
_MOST_COUNT = 100_000


@dataclass(frozen=True, eq=False)
class Captured:
    """keys: hashes of words and word pairs, ascending, with how often each occurs."""

    hand: npt.NDArray[np.float64]  # (len(NAMES),)
    keys: npt.NDArray[np.uint32]
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, text: str) -> Captured:
        reading = ngrams.read(text)
        keys, counts = ngrams.count(ngrams.word_grams(reading, WORDS_TO))
        hand = np.round(hand_features.features(reading), 6)
        return cls(hand, keys[:MAX_GRAMS], counts[:MAX_GRAMS])

    def kept(self) -> dict[str, Any]:
        """As JSON."""
        grams = zip(self.keys.tolist(), self.counts.tolist(), strict=True)
        return {"hand": self.hand.tolist(), "word_grams": {str(key): num for key, num in grams}}

    @classmethod
    def parse(cls, value: Any) -> Captured:
        """What `kept` says. Raises DataError for anything else."""
        hand, grams = (
            (value.get("hand"), value.get("word_grams")) if isinstance(value, Mapping) else (0, 0)
        )
        if not isinstance(hand, list) or len(hand) != len(hand_features.NAMES):
            raise DataError("its features are not those of this version; leave the row out")
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in hand):
            raise DataError("a number of its features is none; leave the row out")
        if not isinstance(grams, Mapping) or len(grams) > MAX_GRAMS:
            raise DataError(f"its word_grams are not at most {MAX_GRAMS:,} hashes with counts")
        try:
            found = sorted((int(key), int(number)) for key, number in grams.items())
        except (TypeError, ValueError) as error:
            raise DataError("its word_grams are not hashes with counts") from error
        if not all(0 <= key < 2**32 and 0 < number <= _MOST_COUNT for key, number in found):
            raise DataError("its word_grams are not hashes with counts")
        keys, counts = zip(*found, strict=True) if found else ((), ())
        return cls(
            np.array(hand, dtype=np.float64),
            np.array(keys, dtype=np.uint32),
            np.array(counts, dtype=np.int64),
        )

    @cached_property
    def name(self) -> str:
        """Stands for the prompt where people look for one; equal for equal features."""
        said = json.dumps(self.kept(), sort_keys=True).encode()
        return f"features:{hashlib.sha256(said).hexdigest()[:16]}"

    @property
    def num_chars(self) -> float:
        return float(np.expm1(np.clip(self.hand[_CHARS], 0.0, 20.0)))
