"""What can be read off a prompt without training: length, digits, code, form, rarity of words.

The order of :data:`NAMES` is the feature schema of an artifact. Every feature is computed from the
bounded excerpt, except the length of the whole prompt, and nearly all by array operations.
"""

from __future__ import annotations

import math
import re

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.reading import rarity
from tandem_router.predictor.reading.ngrams import (
    DIGIT,
    LETTER,
    LOWER,
    QUOTE,
    SPACE,
    UPPER,
    VOWEL,
    Reading,
    count,
    read,
)

# Matched against single lines, which makes them linear.
_OPTION = re.compile(r"[ \t]*\(?[A-H][).:](.*)")
_LIST_LINE = re.compile(r"[ \t]*(?:[-*•]|\d+[.)])\s")
_DIGIT = re.compile(r"\d")

#: Lines looked at for options and lists, from the start and from the end.
_MAX_LINES = 64, 32
#: Numbers whose value is read, from the start and from the end; the rest is only counted.
_MAX_NUMBERS = 24, 8

_WORD_SETS: dict[str, frozenset[str]] = {
    "negation": frozenset("not no never except least incorrect false neither nor without".split()),
    "logic": frozenset(
        "if then all some every either only when unless must therefore suppose given assume "
        "implies statement true".split()
    ),
    "compare": frozenset(
        "more less than fewer twice half double times thrice as least most greater larger "
        "smaller older younger difference".split()
    ),
    "rate": frozenset(
        "per each every day days week weeks month months year years hour hours minute minutes "
        "percent % rate speed interest remaining left rest total altogether".split()
    ),
    "maths": frozenset(
        "function equation matrix prime polynomial integer integers graph probability group ring "
        "field derivative integral vector angle triangle circle square root sum product modulo "
        "remainder solve compute calculate evaluate".split()
    ),
    "recall": frozenset(
        "who whom when where name called known author capital country city president born year "
        "film song book war king team".split()
    ),
    "write": frozenset(
        "write story essay poem describe explain summarize translate rewrite compose list".split()
    ),
    "which": frozenset(["which", "following", "best", "describes", "correct", "answer"]),
    "how": frozenset(["how", "many", "much"]),
    "why": frozenset(["why", "because", "reason", "cause", "causes", "due"]),
    "money": frozenset("dollar dollars cost costs price pays paid earn earns cents money".split()),
    "person": frozenset("he she his her him they their them i you your my we our".split()),
    "code": frozenset(
        "def return import class function print int void for while select assert".split()
    ),
    "common": frozenset(
        "the of and to a in is that for it as was with be by on are at this from or an which "
        "have has had but not what all were when we there can if would".split()
    ),
}

NAMES: tuple[str, ...] = (
    "log_chars",
    "log_words",
    "mean_word_length",
    "longest_word",
    "long_word_share",
    "syllables_per_word",
    "log_sentences",
    "words_per_sentence",
    "unique_word_share",
    "distinct_char_pairs",
    "log_lines",
    "list_lines",
    "upper_share",
    "digit_share",
    "symbol_share",
    "non_ascii_share",
    "proper_nouns",
    "question_marks",
    "commas",
    "quotes",
    "brackets",
    "num_numbers",
    "num_digits",
    "longest_number",
    "second_longest_number",
    "log_largest_number",
    "log_smallest_number",
    "num_distinct_numbers",
    "decimals",
    "fractions",
    "plus",
    "minus",
    "times",
    "divided",
    "equals",
    "percent",
    "dollar",
    "code_cues",
    "latex_cues",
    "num_options",
    "option_words",
    "option_spread",
    "numeric_options",
    "stem_words",
    "blank",
    "last_char_is_question",
    "quoted_word_length",
    "short_words",
    "first_word_length",
    "spaced_letters",
) + (*(f"words_{name}" for name in _WORD_SETS), *rarity.NAMES)


_KNOWN_WORDS = sorted(frozenset().union(*_WORD_SETS.values()))
_KNOWN_HASHES = np.array([read(word).hashes[0] for word in _KNOWN_WORDS], dtype=np.uint32)
_ORDER = np.argsort(_KNOWN_HASHES)
_KNOWN_HASHES = _KNOWN_HASHES[_ORDER]
#: (num_known_words, num_word_sets), 1.0 where the word is in the set
_MEMBER = np.array(
    [[float(word in group) for group in _WORD_SETS.values()] for word in _KNOWN_WORDS]
)[_ORDER]

_SENTENCE_ENDS = tuple(f"{mark}{blank}" for mark in ".?!" for blank in " \n")


def features(item: Reading) -> npt.NDArray[np.float64]:
    """The hand features of one prompt, float64 ``(len(NAMES),)``, all finite.

    Values are rounded to float32 so that thresholds and coefficients see the same number whatever
    precision an estimator stores it in.
    """
    text, codes = item.text, item.codes
    num_chars = len(text)
    is_ascii = codes.dtype == np.uint8
    of = np.bincount(codes if is_ascii else np.minimum(codes, 128), minlength=129).tolist()
    words = (item.token_kinds == LETTER).nonzero()[0]
    lengths = (item.ends - item.starts).take(words)
    num_words = len(lengths)
    share = 1.0 / max(num_words, 1)
    by_length = np.bincount(np.minimum(lengths, 7), minlength=8).tolist()
    letters = int(lengths.sum())
    distinct, repeats = count(item.hashes.take(words))
    numbers = _Numbers(item)
    sentences = sum(map(text.count, _SENTENCE_ENDS)) + text.endswith((".", "?", "!"))
    vowels = (item.flags & VOWEL).astype(bool)
    quotes = of[34] + of[39]
    if not is_ascii:
        quotes += text.count("“")
    options, list_lines = _lines(text, of[10])
    option_words = [len(option.split()) for option in options]
    non_space = max(num_chars - of[32] - of[10] - of[9] - of[13], 1)

    row = [
        math.log1p(item.num_chars),
        math.log1p(num_words),
        letters * share,
        int(lengths.max()) if num_words else 0,
        by_length[7] * share,
        _runs(vowels) * share,
        math.log1p(max(sentences, 1)),
        num_words / max(sentences, 1),
        len(distinct) * share,
        _distinct_pairs(item),
        math.log1p(of[10]),
        list_lines,
        sum(of[65:91]) / max(num_chars, 1),
        numbers.num_digits / non_space,
        (non_space - numbers.num_digits - letters) / non_space,
        of[128] / max(num_chars, 1),
        _proper_nouns(item, words),
        of[63],
        of[44],
        quotes,
        of[40] + of[91] + of[123],
        numbers.count,
        numbers.num_digits,
        numbers.longest,
        numbers.second_longest,
        math.log1p(max(numbers.values, default=0.0)),
        math.log1p(min(numbers.values, default=0.0)),
        len(set(numbers.values)),
        numbers.decimals,
        _fractions(item) if of[47] else 0,
        of[43],
        of[45] + (0 if is_ascii else text.count("−")),
        of[42] + (0 if is_ascii else text.count("×")),
        of[47] + (0 if is_ascii else text.count("÷")),
        of[61],
        of[37],
        of[36],
        of[59] + of[123] + of[125] + text.count("=="),
        _latex(item) + of[36] + of[94] if of[92] or of[36] or of[94] or of[95] else 0,
        len(options),
        sum(option_words) / max(len(options), 1),
        max(option_words, default=0) - min(option_words, default=0),
        sum(_DIGIT.search(option) is not None for option in options) / max(len(options), 1),
        max(num_chars - sum(map(len, options)), 0) / 6.0,
        text.count("__"),
        float(text.rstrip().endswith("?")),
        _longest_quoted_word(item) if quotes else 0,
        (by_length[1] + by_length[2]) * share,
        int(lengths[0]) if num_words else 0,
        by_length[1],
    ]
    place = np.minimum(_KNOWN_HASHES.searchsorted(distinct), len(_KNOWN_HASHES) - 1)
    hit = _KNOWN_HASHES[place] == distinct
    groups = repeats[hit] @ _MEMBER[place[hit]]
    found = np.concatenate((row, groups * share**0.5, rarity.features(distinct)))
    return found.astype(np.float32).astype(np.float64)


class _Numbers:
    """Runs of digits, joined by single points and commas: how many, how long, how large."""

    __slots__ = ("count", "decimals", "longest", "num_digits", "second_longest", "values")

    def __init__(self, item: Reading) -> None:
        self.count = self.num_digits = self.longest = self.second_longest = self.decimals = 0
        self.values: list[float] = []
        is_digits = item.token_kinds == DIGIT
        starts, ends = item.starts[is_digits], item.ends[is_digits]
        if len(starts) == 0:
            return
        between = item.codes[np.minimum(ends[:-1], len(item.codes) - 1)]
        adjacent = ends[:-1] + 1 == starts[1:]
        by_point = adjacent & (between == 46)
        first = np.concatenate(([True], ~(by_point | (adjacent & (between == 44)))))
        at = first.nonzero()[0]
        digits = np.add.reduceat(ends - starts, at)
        self.count = len(at)
        self.num_digits = int(digits.sum())
        longest = np.sort(digits)[-2:].tolist()
        self.longest, self.second_longest = longest[-1], longest[0] if len(longest) > 1 else 0
        self.decimals = int(np.count_nonzero(by_point))
        lasts = np.append(at[1:], len(starts)) - 1
        spans = list(zip(starts[at].tolist(), ends[lasts].tolist(), strict=True))
        if len(spans) > sum(_MAX_NUMBERS):
            spans = spans[: _MAX_NUMBERS[0]] + spans[-_MAX_NUMBERS[1] :]
        self.values = [_value(item.text[start:end]) for start, end in spans]


def _value(number: str) -> float:
    try:
        return min(float(number.replace(",", "")[:18]), 1e18)
    except ValueError:  # "1.2.3": a version or a date, not a quantity
        return 0.0


def _runs(mask: npt.NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(mask[1:] & ~mask[:-1])) + int(mask[:1].sum())


def _proper_nouns(item: Reading, words: npt.NDArray[np.int64]) -> int:
    """Capitalised words after a lower-case letter or a comma, and a blank."""
    at = item.starts.take(words)
    at = at[at >= 2]
    last, before = at - 1, at - 2
    previous = ((item.flags.take(before) & LOWER) != 0) | (item.codes.take(before) == 44)
    starts = (item.flags.take(at) & UPPER) != 0
    return int(np.count_nonzero(starts & previous & (item.codes.take(last) == 32)))


def _distinct_pairs(item: Reading) -> float:
    """Share of the character pairs that are new: low for repetition, as compressed size is."""
    head = item.lowered.astype(np.uint32)
    if len(head) < 2:
        return 1.0
    pairs = np.sort(head[:-1] << np.uint32(16) | head[1:])
    return (1 + int(np.count_nonzero(pairs[1:] != pairs[:-1]))) / len(pairs)


def _fractions(item: Reading) -> int:
    """Slashes between digits, with at most one blank on either side."""
    codes, kinds = item.codes, item.kinds
    at = (codes == 47).nonzero()[0]
    at = at[(at >= 1) & (at < len(codes) - 1)]
    left = np.where(kinds[at - 1] == SPACE, np.maximum(at - 2, 0), at - 1)
    right = np.where(kinds[at + 1] == SPACE, np.minimum(at + 2, len(codes) - 1), at + 1)
    return int(np.count_nonzero((kinds[left] == DIGIT) & (kinds[right] == DIGIT)))


def _latex(item: Reading) -> int:
    """Backslashes before a letter, and subscripts in braces."""
    slashes = (item.codes[:-1] == 92) & (item.kinds[1:] == LETTER)
    return int(np.count_nonzero(slashes)) + item.text.count("_{")


def _longest_quoted_word(item: Reading) -> int:
    """Characters of the longest run of 2 to 40 without white space between two quotes."""
    at = (item.flags & QUOTE).nonzero()[0]
    if len(at) < 2:
        return 0
    blanks = np.cumsum(item.kinds == SPACE)
    gaps = np.diff(at) - 1
    fits = (gaps >= 2) & (gaps <= 40) & (blanks[at[1:]] == blanks[at[:-1]])
    return int(gaps[fits].max(initial=0))


def _lines(text: str, num_breaks: int) -> tuple[list[str], int]:
    """The answer options (`A) ...` to `H) ...`) without their letters, and how many list items."""
    if num_breaks == 0:
        return [], 0
    lines = text.split("\n")
    first, last = _MAX_LINES
    if len(lines) > first + last:
        lines = lines[:first] + lines[-last:]
    options = [match[1].strip() for line in lines if (match := _OPTION.match(line))]
    return options, sum(_LIST_LINE.match(line) is not None for line in lines)
