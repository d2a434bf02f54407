"""Write the table of word rarity that the predictor reads: `rarity.txt` in its package.

    pip install symspellpy && python scripts/word_rarity.py

The frequencies come from the English dictionary of symspellpy (MIT licence), which joins the counts
of Google's n-grams with the word list SCOWL. Kept are the 30,000 most frequent words, in classes of
a quarter of a decade below the most frequent one; within a class the order is alphabetical.
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections import defaultdict
from importlib import resources
from pathlib import Path

NUM_WORDS = 30_000
CLASSES_PER_DECADE = 4
TARGET = (
    Path(__file__).parents[1] / "router" / "tandem_router" / "predictor" / "reading" / "rarity.txt"
)
HEADER = """\
# English words by rarity: class, then words. A class is a quarter of a decade of frequency below
# the most frequent word. Made by scripts/word_rarity.py from the dictionary of symspellpy (MIT).
"""


def main() -> int:
    try:
        source = resources.files("symspellpy") / "frequency_dictionary_en_82_765.txt"
    except ModuleNotFoundError:
        print("error: symspellpy is not installed; run `pip install symspellpy`", file=sys.stderr)
        return 1
    counts: dict[str, int] = {}
    for line in source.read_text(encoding="utf-8-sig").splitlines():
        word, _, count = line.partition(" ")
        if word.isascii() and word.isalpha() and len(word) > 1:
            counts[word] = int(count)
    listed = sorted(counts, key=lambda word: (-counts[word], word))[:NUM_WORDS]
    classes: dict[int, list[str]] = defaultdict(list)
    for word in listed:
        decades = math.log10(counts[listed[0]] / counts[word])
        classes[int(decades * CLASSES_PER_DECADE)].append(word)
    lines = [
        f"{number} {part}\n"
        for number, words in sorted(classes.items())
        for part in textwrap.wrap(" ".join(sorted(words)), 96)
    ]
    TARGET.write_text(HEADER + "".join(lines), encoding="ascii")
    print(f"wrote {len(listed):,} words to {TARGET}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
