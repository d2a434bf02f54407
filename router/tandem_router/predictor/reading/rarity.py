"""How rare a word is in English at large: knowledge the training prompts cannot hold.

`rarity.txt` lists 30,000 words by how often they occur, in classes of a quarter of a decade; it is
made by `scripts/word_rarity.py`. A word that is not listed counts as rarer than all of them.
"""

from __future__ import annotations

import string
from functools import cache
from importlib import resources

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.reading.ngrams import UInt32Array, read

#: Features of :func:`features`, all in decades below the most frequent words; shares of words.
NAMES = (
    "rarity_mean",
    "rarity_median",
    "rarity_upper_quarter",
    "rarity_upper_tenth",
    "rarity_highest",
    "rare_words",
    "very_rare_words",
    "unlisted_words",
)
CLASS_DECADES = 0.25
RARE, VERY_RARE = 3.5, 4.25


@cache
def table() -> tuple[UInt32Array, npt.NDArray[np.float64], float]:
    """Hashes of the listed words in ascending order, their rarity, and that of all others.

    Read once, when the first predictor is made: most of the commands need none.
    """
    # Letters stand for options and variables, not for words: they are left out, as NaN.
    hashes = [read(" ".join(string.ascii_lowercase)).hashes]
    decades = [np.full(len(hashes[0]), np.nan)]
    lines = (resources.files(__package__) / "rarity.txt").read_text(encoding="ascii").splitlines()
    last = 0
    for line in lines:
        if not line.startswith("#"):
            number, _, words = line.partition(" ")
            last = int(number)
            hashes.append(read(words).hashes)
            decades.append(np.full(len(hashes[-1]), last * CLASS_DECADES))
    keys, first = np.unique(np.concatenate(hashes), return_index=True)
    return keys, np.concatenate(decades)[first], (last + 2) * CLASS_DECADES


def features(words: UInt32Array) -> list[float]:
    """One value per name in :data:`NAMES` for the hashes of a prompt's distinct words."""
    keys, of_keys, unlisted = table()
    place = np.minimum(keys.searchsorted(words), len(keys) - 1)
    decades = np.where(keys.take(place) == words, of_keys.take(place), unlisted)
    decades = np.sort(decades[decades == decades])  # letters are NaN
    count = len(decades)
    if count == 0:
        return [0.0] * len(NAMES)
    ranks = [int(share * (count - 1)) for share in (0.5, 0.75, 0.9)]
    beyond = decades.searchsorted((RARE, VERY_RARE, unlisted))
    return [
        float(decades.mean()),
        *decades.take(ranks).tolist(),
        float(decades[-1]),
        *((count - beyond) / count).tolist(),
    ]
