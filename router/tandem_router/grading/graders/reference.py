"""Whether an answer agrees with a reference: exact, normalised, at its end, numeric, JSON, regex.

Models explain before they conclude, so all but `exact` and `regex` look at what an answer
concludes (:func:`concluded`) as well as at the whole of it, and a text that names no grader is
looked for at the answer's end. Grading is a function of its two texts
alone.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

Kind = Literal["exact", "normalised", "ends", "includes", "numeric", "json", "regex"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Characters of an answer that are looked at; what a model repeats beyond is noise.
MAX_ANSWER_CHARS = 200_000
#: Numbers with decimals within this of each other, relative, are the same.
TOLERANCE = 1e-6

_THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_MARKED = re.compile(
    r"(?:####[ \t]*|\b(?:final[ \t]+)?answer(?:[ \t]+is)?\b[ \t*_]*[:=]?[ \t*_]*)"
    r"(?=\S)([^\n]+)",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d{1,4})?"
    r"(?:[ ]?/[ ]?\d+(?![\d.]))?"
)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_CHOICE = re.compile(r"\(?([A-Za-z])(?:\)|[.:,](?=\s|$)|$)")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_FENCED = re.compile(r"```[a-zA-Z]*\s*\n(.*?)```", re.DOTALL)
_MAX_JSON_STARTS = 200


class BadReference(ValueError):
    """A reference that cannot be used, such as a pattern that is none; the text says why."""


def grade(answer: str, reference: Any, kind: Kind | None = None) -> float:
    """1.0 where the answer agrees with the reference, or with one of a list of them, else 0.0.

    Raises BadReference where the reference is none of this kind.
    """
    answer = answer[:MAX_ANSWER_CHARS]
    kind = kind or kind_of(reference)
    if kind == "json":
        return float(same_json(answer, _json_reference(reference)))
    grader = _GRADERS[kind]
    references = reference if isinstance(reference, list) else [reference]
    if not references:
        raise BadReference("the list of references is empty; leave the reference out instead")
    return float(any(grader(answer, _as_text(each)) for each in references))


def kind_of(reference: Any) -> Kind:
    """The grader that a reference asks for by what it is; a pattern has to be named as one."""
    if isinstance(reference, list) and reference and all(isinstance(r, str) for r in reference):
        kinds = {kind_of(each) for each in reference}
        return kinds.pop() if len(kinds) == 1 else "ends"
    if isinstance(reference, dict | list):
        return "json"
    if isinstance(reference, int | float) and not isinstance(reference, bool):
        return "numeric"
    text = _as_text(reference).strip()
    if "####" in text or number_of(text.strip("$€£% "), whole=True) is not None:
        return "numeric"
    if text[:1] in "{[" and text:
        try:
            return "json" if isinstance(json.loads(text), dict | list) else "ends"
        except (ValueError, RecursionError):
            return "ends"
    return "ends"


def _as_text(reference: Any) -> str:
    if isinstance(reference, bool):
        return "true" if reference else "false"
    if isinstance(reference, dict | list) or reference is None:
        raise BadReference(f"the reference is a {type(reference).__name__}, not a text")
    return str(reference)


def without_thinking(answer: str) -> str:
    """The answer without the thoughts that some models send along in tags."""
    return _THINKING.sub("", answer).strip()


def concluded(answer: str) -> str | None:
    r"""What an answer says that its conclusion is: ``\boxed{}``, ``#### x``, "the answer is x"."""
    boxed = _boxed(answer)
    if boxed is not None:
        return boxed
    marked = _MARKED.findall(answer)
    return _stripped(marked[-1]) if marked else None


def _boxed(answer: str) -> str | None:
    start = answer.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for index in range(start, len(answer)):
        depth += {"{": 1, "}": -1}.get(answer[index], 0)
        if depth == 0:
            return answer[start:index].strip()
    return None


def _stripped(text: str) -> str:
    return text.strip().strip("*_`$ ").rstrip(".").strip("*_`$ ")


def _candidates(answer: str) -> Iterator[str]:
    """What may be compared: the whole, what it concludes, its last line."""
    answer = without_thinking(answer)
    yield answer
    found = concluded(answer)
    if found is not None:
        yield found
    lines = [line for line in answer.splitlines() if line.strip()]
    if lines:
        yield _stripped(lines[-1])


def exact(answer: str, reference: str) -> bool:
    """The same characters, but for white space at the ends."""
    return answer.strip() == reference.strip()


def normalise(text: str) -> str:
    """Lower case, without articles, punctuation and double spaces (as SQuAD compares answers).

    Points, commas and signs that belong to a number stay, so that 3.5 is not 35.
    """
    return " ".join(_ARTICLES.sub(" ", _plain(text)).split())


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold().replace("−", "-")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<!\d)[.,/:]|[.,/:](?!\d)|[^\w\s.,/:-]|_", " ", text)
    text = re.sub(r"-(?!\d)|(?<=\w)-", " ", text)
    return " ".join(text.split())


def normalised(answer: str, reference: str) -> bool:
    """The same words; a single letter as reference is a choice, as in "(B) Paris"."""
    wanted = normalise(reference)
    letter = _CHOICE.fullmatch(_stripped(reference))
    for candidate in _candidates(answer):
        if normalise(candidate) == wanted:
            return True
        chosen = _CHOICE.match(_stripped(candidate)) if letter else None
        if letter and chosen and chosen[1].upper() == letter[1].upper():
            return True
    return False


def ends(answer: str, reference: str) -> bool:
    """As `normalised`, or the last words of the answer are the reference's: "It is Paris."."""
    if normalised(answer, reference):
        return True
    wanted = _wanted(reference)
    return any(_plain(each).split()[-len(wanted) :] == wanted for each in _candidates(answer))


def includes(answer: str, reference: str) -> bool:
    """As `normalised`, or the reference's words stand in the answer, together and in their order.

    Generous: an answer that names every choice includes the right one.
    """
    if normalised(answer, reference):
        return True
    return f" {' '.join(_wanted(reference))} " in f" {_plain(without_thinking(answer))} "


def _wanted(reference: str) -> list[str]:
    """The reference's words without a leading article; one that is nothing else stays whole."""
    words = _plain(reference).split() or reference.casefold().split() or [reference]
    return words[1:] if len(words) > 1 and _ARTICLES.fullmatch(words[0]) else words


def number_of(text: str, *, whole: bool = False, first: bool = False) -> float | None:
    """The last (or first) number in a text, None where it has none; `whole`: nothing else is."""
    text = _FRACTION.sub(r"\1/\2", text).strip()
    found = [match for match in _NUMBER.finditer(text) if match[0].strip("+-−")]
    if not found or (whole and (len(found) > 1 or found[0][0] != text)):
        return None
    return _value((found[0] if first else found[-1])[0])


def _value(text: str) -> float | None:
    top, _, bottom = text.replace(",", "").replace("−", "-").partition("/")
    try:
        value = float(top) / float(bottom) if bottom else float(top)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def numeric(answer: str, reference: str) -> bool:
    """The same number: what the answer concludes, else the last number in it."""
    wanted = number_of(concluded(reference) or reference)
    if wanted is None:
        raise BadReference(f"the reference {reference[:40]!r} holds no number")
    answer = without_thinking(answer)
    found = concluded(answer)
    value = None
    if found is not None:
        value = number_of(found.rpartition("=")[2], first=True)
    if value is None:
        value = number_of(answer)
    return value is not None and _same_number(value, wanted)


def _same_number(one: float, other: float) -> bool:
    """Equal; where one has decimals, equal within the tolerance."""
    if one == other or (float(one).is_integer() and float(other).is_integer()):
        return one == other
    return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE * 1e-3)


def _json_reference(reference: Any) -> Any:
    if not isinstance(reference, str):
        return reference
    try:
        return json.loads(reference)
    except (ValueError, RecursionError) as error:
        raise BadReference(f"the reference {reference[:40]!r} is not JSON") from error


def same_json(answer: str, reference: Any) -> bool:
    """The answer's JSON value equals the reference's: keys in any order, 1 equal to 1.0."""
    return any(_equal(value, reference) for value in _json_values(without_thinking(answer)))


def _json_values(answer: str) -> Iterator[Any]:
    """The JSON of an answer: all of it, a fenced block, or the last value that stands in it."""
    for text in (answer, *reversed(_FENCED.findall(answer))):
        try:
            yield json.loads(text)
            return
        except (ValueError, RecursionError):
            continue
    decoder = json.JSONDecoder()
    last: list[Any] = []
    position = 0
    for _ in range(_MAX_JSON_STARTS):
        match = re.compile(r"[{\[]").search(answer, position)
        if match is None:
            break
        try:
            value, position = decoder.raw_decode(answer, match.start())
            last = [value]
        except (ValueError, RecursionError):
            position = match.start() + 1
    yield from last


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        try:
            return _same_number(one, other)
        except OverflowError:
            return one == other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(type(one) is type(other) and one == other)


def regex(answer: str, reference: str) -> bool:
    """The pattern is found in the answer; case counts, ``(?i)`` says that it does not."""
    try:
        pattern = re.compile(reference)
    except (re.error, RecursionError, OverflowError) as error:
        raise BadReference(f"{reference[:60]!r} is no regular expression: {error}") from error
    return pattern.search(without_thinking(answer)) is not None


_GRADERS: dict[Kind, Callable[[str, str], bool]] = {
    "exact": exact,
    "normalised": normalised,
    "ends": ends,
    "includes": includes,
    "numeric": numeric,
    "regex": regex,
}
