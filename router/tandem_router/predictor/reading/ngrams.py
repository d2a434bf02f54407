"""How a prompt becomes tokens and hashed n-grams: one pass of array operations, bounded work.

Training and serving run this same code, so the numbers of an artifact and of the estimators it
was exported from agree by construction. Nothing is fitted here: an n-gram's identity is a 32-bit
hash, so an artifact needs no vocabulary of strings and cannot leak the text it was trained on.
There is no loop over characters or words: a polynomial hash of every token comes from one running
sum, which makes a prompt of 8,000 tokens cost little more than one of 80.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

UInt32Array = npt.NDArray[np.uint32]
IntArray = npt.NDArray[np.int64]

#: Characters read from the start and from the end of a prompt; what lies between is only counted.
#: Twice as much ranks no better (docs/studies/routing.md); 49 in 50 rows of the routing data are
#: read whole.
HEAD_CHARS = 1536
TAIL_CHARS = 512
#: Of the excerpt, characters whose n-grams are looked up one by one: the dearest part of a score.
CHAR_HEAD = 512
CHAR_TAIL = 192
#: All of these, as an artifact records them.
EXCERPT = (HEAD_CHARS, TAIL_CHARS, CHAR_HEAD, CHAR_TAIL)

#: Kinds of characters, the low bits of a flag; tokens are runs of letters, runs of digits and
#: single symbols.
GAP, LETTER, DIGIT, SYMBOL, SPACE = range(5)
KIND_BITS = np.uint8(7)
UPPER, LOWER, VOWEL, QUOTE = (np.uint8(bit) for bit in (8, 16, 32, 64))

_U64 = np.uint64
_PRIME = 0x9E3779B97F4A7C15
_NUMBER_SALT = 0x6E756D62
_LEFT, _RIGHT = _U64(0x9FB21C651E98DF25), _U64(0xD6E8FEB86659FD93)
_CHAR_PRIME = np.uint32(0x01000193)
_CHAR_SALT = {n: np.uint32((n * 0x9E3779B1) & 0xFFFFFFFF) for n in range(1, 9)}


def _tables() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16]]:
    """Flags and lower case of every character of the basic plane; the others count as U+FFFF."""
    every = "".join(map(chr, range(0x10000)))
    flags = np.zeros(len(every), dtype=np.uint8)
    for flag, pattern in (
        (LETTER, r"[^\W\d_]+"),
        (DIGIT, r"\d+"),
        (SYMBOL, r"[^\w\s]+"),
        (SPACE, r"\s+"),
        (UPPER, r"[A-Z]+"),
        (LOWER, r"[a-z]+"),
        (VOWEL, r"[aeiouyAEIOUY]+"),
        (QUOTE, "['\"“”]"),
    ):
        for match in re.finditer(pattern, every):
            flags[match.start() : match.end()] |= flag
    lowered = [char.lower() for char in every]
    lower = [ord(low) if len(low) == 1 else code for code, low in enumerate(lowered)]
    return flags, np.array(lower, dtype=np.uint16)


_FLAGS, _LOWER = _tables()
_ASCII_FLAGS = _FLAGS[:256].tobytes()


def _powers(base: int) -> npt.NDArray[np.uint64]:
    steps = np.full(HEAD_CHARS + TAIL_CHARS + 1, base, dtype=np.uint64)
    steps[0] = 1
    return np.cumprod(steps, dtype=np.uint64)


_POWER = _powers(_PRIME)
_INVERSE = _powers(pow(_PRIME, -1, 1 << 64))


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt's excerpt with its characters classified and its tokens found.

    `codes`, `lowered`, `flags` and `kinds` have one entry per character of `text`; `starts`,
    `ends`, `token_kinds` and `hashes` one per token. `num_chars` is the length of the whole prompt.
    """

    num_chars: int
    text: str
    codes: npt.NDArray[np.unsignedinteger[Any]]
    lowered: npt.NDArray[np.unsignedinteger[Any]]
    flags: npt.NDArray[np.uint8]
    kinds: npt.NDArray[np.uint8]
    starts: IntArray
    ends: IntArray
    token_kinds: npt.NDArray[np.uint8]
    hashes: UInt32Array


def read(prompt: str) -> Reading:
    """First and last characters of a prompt as tokens; O(1) in the length of what lies between.

    Words are compared in lower case. Numbers of three digits and more are known by their length
    only: it says how hard a sum is, while their value is nearly always unseen.
    """
    num_chars = len(prompt)
    if num_chars > HEAD_CHARS + TAIL_CHARS:
        prompt = f"{prompt[:HEAD_CHARS]}\n{prompt[-TAIL_CHARS:]}"
    codes: npt.NDArray[np.unsignedinteger[Any]]
    lowered: npt.NDArray[np.unsignedinteger[Any]]
    if prompt.isascii():
        raw = prompt.encode()
        codes = np.frombuffer(raw, dtype=np.uint8)
        lowered = np.frombuffer(raw.lower(), dtype=np.uint8)
        flags = np.frombuffer(raw.translate(_ASCII_FLAGS), dtype=np.uint8)
    else:
        wide = np.frombuffer(prompt.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        codes = np.minimum(wide, 0xFFFF).astype(np.uint16)
        lowered = _LOWER.take(codes)
        flags = _FLAGS.take(codes)
    kinds = flags & KIND_BITS
    changes = np.empty(len(kinds) + 1, dtype=bool)
    changes[0] = changes[-1] = True
    np.not_equal(kinds[1:], kinds[:-1], out=changes[1:-1])
    changes[:-1] |= kinds == SYMBOL
    edges = changes.nonzero()[0] if len(kinds) else np.zeros(1, dtype=np.int64)
    of_run = kinds.take(edges[:-1])
    chosen = ((of_run != GAP) & (of_run != SPACE)).nonzero()[0]
    starts, ends = edges.take(chosen), edges.take(chosen + 1)
    running = np.zeros(len(kinds) + 1, dtype=np.uint64)
    np.cumsum(lowered * _POWER[: len(kinds)], out=running[1:])
    hashes = _mixed((running.take(ends) - running.take(starts)) * _INVERSE.take(starts))
    token_kinds = of_run.take(chosen)
    digits = ((token_kinds == DIGIT) & (ends - starts > 2)).nonzero()[0]
    if len(digits):
        width = np.minimum((ends - starts)[digits], 30)
        hashes[digits] = _mixed((width + _NUMBER_SALT).astype(np.uint64))
    return Reading(
        num_chars, prompt, codes, lowered, flags, kinds, starts, ends, token_kinds, hashes
    )


def _mixed(values: npt.NDArray[np.uint64]) -> UInt32Array:
    """32 well-mixed bits of 64 (the finaliser of MurmurHash3)."""
    values = values ^ (values >> _U64(33))
    values *= _U64(0xFF51AFD7ED558CCD)
    values ^= values >> _U64(33)
    values *= _U64(0xC4CEB9FE1A85EC53)
    return (values >> _U64(32)).astype(np.uint32)


def word_grams(reading: Reading, max_n: int) -> UInt32Array:
    """A hash of every run of 1..max_n tokens, in no particular order."""
    parts = [reading.hashes]
    rolling = reading.hashes
    for n in range(1, max_n):
        left, right = rolling[:-1].astype(np.uint64), reading.hashes[n:].astype(np.uint64)
        rolling = _mixed(left * _LEFT + right * _RIGHT)
        parts.append(rolling)
    return np.concatenate(parts)


def char_grams(reading: Reading, min_n: int, max_n: int) -> UInt32Array:
    """A hash of every run of min_n..max_n lower-case characters, white space as one blank."""
    inner = np.where(reading.kinds == SPACE, np.uint8(32), reading.lowered)
    if len(inner) > CHAR_HEAD + CHAR_TAIL:
        inner = np.concatenate((inner[:CHAR_HEAD], inner[-CHAR_TAIL:]))
    codes = np.full(len(inner) + 2, 32, dtype=np.uint32)
    codes[1:-1] = inner
    keep = np.ones(len(codes), dtype=bool)
    np.not_equal(codes[1:], codes[:-1], out=keep[1:])
    keep |= codes != 32
    codes = codes[keep]
    parts: list[UInt32Array] = []
    rolling = codes
    for n in range(2, max_n + 1):
        if len(codes) < n:
            break
        rolling = rolling[:-1] * _CHAR_PRIME ^ codes[n - 1 :]
        if n >= min_n:
            mixed = (rolling ^ _CHAR_SALT[n]) * np.uint32(0x85EBCA6B)
            mixed ^= mixed >> np.uint32(15)
            mixed *= np.uint32(0xC2B2AE35)
            parts.append(mixed ^ (mixed >> np.uint32(13)))
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)


def count(hashes: UInt32Array) -> tuple[UInt32Array, IntArray]:
    """Distinct hashes in ascending order and how often each occurs."""
    if len(hashes) == 0:
        return hashes, np.empty(0, dtype=np.int64)
    ordered = np.sort(hashes)
    is_first = np.empty(len(ordered), dtype=bool)
    is_first[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=is_first[1:])
    first = is_first.nonzero()[0]
    counts = np.empty(len(first), dtype=np.int64)
    np.subtract(first[1:], first[:-1], out=counts[:-1])
    counts[-1] = len(ordered) - first[-1]
    return ordered[first], counts
