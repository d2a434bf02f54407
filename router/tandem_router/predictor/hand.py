"""What can be read off a prompt without training: length, digits, arithmetic, code, question form.

The order of :data:`NAMES` is the feature schema of an artifact. Every feature is computed from the
bounded excerpt, except the length of the whole prompt.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.text import Excerpt

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_LETTERS = re.compile(r"[^\W\d_]+")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
# [ \t], not \s: with \s a prompt of newlines only takes quadratic time
_OPTION = re.compile(r"(?m)^[ \t]*\(?([A-H])[).:][ \t]*(.*)$")
_LIST_LINE = re.compile(r"(?m)^[ \t]*(?:[-*•]|\d+[.)])\s")
_VOWELS = re.compile(r"[aeiouy]+")
_CODE = re.compile(
    r"\b(?:def|return|import|class|function|print|int|void|for|while|SELECT|assert)\b|[{};]|=="
)
_LATEX = re.compile(r"\\[a-zA-Z]+|\$|\^|_\{")
_PROPER = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+")
_DIGIT = re.compile(r"\d")
_QUOTED = re.compile(r"['\"“]([^\s'\"”]{2,40})['\"”]")
_FRACTION = re.compile(r"\d\s*/\s*\d")

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
    "compressibility",
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
) + tuple(f"words_{name}" for name in _WORD_SETS)


_GROUPS_OF: dict[str, tuple[int, ...]] = {
    word: tuple(i for i, group in enumerate(_WORD_SETS.values()) if word in group)
    for word in frozenset().union(*_WORD_SETS.values())
}
_KNOWN_WORDS = _GROUPS_OF.keys()
#: Bytes the compressibility is measured on; more changes little and costs much.
_COMPRESSED_BYTES = 2048


def features(item: Excerpt) -> npt.NDArray[np.float64]:
    """The hand features of one prompt, float64 ``(len(NAMES),)``, all finite.

    Values are rounded to float32 so that thresholds and coefficients see the same number whatever
    precision an estimator stores it in.
    """
    text = item.text
    num_chars = len(text)
    raw = text.encode("utf-8", "replace")
    of = np.bincount(np.frombuffer(raw, dtype=np.uint8), minlength=256).tolist()
    lowered = text.lower()
    tokens = _LETTERS.findall(lowered)
    num_words = len(tokens)
    share = 1.0 / max(num_words, 1)
    lengths = list(map(len, tokens)) or [0]
    letters = sum(lengths)
    by_length = Counter(lengths)
    distinct = Counter(tokens)
    numbers = _NUMBER.findall(text) if any(of[48:58]) else []
    digit_lengths = sorted((len(n) - n.count(".") - n.count(",") for n in numbers), reverse=True)
    values = list(map(_value, numbers))
    num_digits = sum(digit_lengths)
    sentences = len(_SENTENCE_END.findall(text)) or 1
    head = raw[:_COMPRESSED_BYTES]
    options = [match[1].strip() for match in _OPTION.findall(text)] if of[10] else []
    option_words = [len(option.split()) for option in options]
    non_space = max(num_chars - of[32] - of[10] - of[9] - of[13], 1)
    has_quote = of[34] or of[39] or num_chars != len(raw)

    row = [
        math.log1p(item.num_chars),
        math.log1p(num_words),
        letters * share,
        max(lengths),
        sum(n for length, n in by_length.items() if length > 6) * share,
        len(_VOWELS.findall(lowered)) * share,
        math.log1p(sentences),
        num_words / sentences,
        len(distinct) * share,
        len(zlib.compress(head, 1)) / len(head) if len(head) > 60 else 1.0,
        math.log1p(of[10]),
        len(_LIST_LINE.findall(text)),
        sum(of[65:91]) / max(num_chars, 1),
        num_digits / non_space,
        (non_space - num_digits - letters) / non_space,
        (len(raw) - num_chars) / max(num_chars, 1),
        len(_PROPER.findall(text)),
        of[63],
        of[44],
        of[34] + of[39] + text.count("“"),
        of[40] + of[91] + of[123],
        len(numbers),
        num_digits,
        digit_lengths[0] if digit_lengths else 0,
        digit_lengths[1] if len(digit_lengths) > 1 else 0,
        math.log1p(max(values, default=0.0)),
        math.log1p(min(values, default=0.0)),
        len(set(numbers)),
        sum("." in n for n in numbers),
        len(_FRACTION.findall(text)) if of[47] else 0,
        of[43],
        of[45] + text.count("−"),
        of[42] + text.count("×"),
        of[47] + text.count("÷"),
        of[61],
        of[37],
        of[36],
        len(_CODE.findall(text)),
        len(_LATEX.findall(text)) if of[92] or of[36] or of[94] or of[95] else 0,
        len(options),
        sum(option_words) / max(len(options), 1),
        max(option_words, default=0) - min(option_words, default=0),
        sum(_DIGIT.search(option) is not None for option in options) / max(len(options), 1),
        max(num_chars - sum(map(len, options)), 0) / 6.0,
        text.count("__"),
        float(text.rstrip().endswith("?")),
        max(map(len, _QUOTED.findall(text)), default=0) if has_quote else 0,
        (by_length[1] + by_length[2]) * share,
        len(tokens[0]) if tokens else 0,
        by_length[1],
    ]
    groups = [0] * len(_WORD_SETS)
    for word in distinct.keys() & _KNOWN_WORDS:
        for group in _GROUPS_OF[word]:
            groups[group] += distinct[word]
    scale = share**0.5
    row += [found * scale for found in groups]
    return np.array(row, dtype=np.float32).astype(np.float64)


def _value(number: str) -> float:
    try:
        return min(float(number.replace(",", "")[:18]), 1e18)
    except ValueError:  # "1.2.3": a version or a date, not a quantity
        return 0.0
