"""Where a question holds a short program and asks what it gives: does the answer say so?

The program is run within bounds (:mod:`.programs`), and the answer's stated result is compared with
what it gave. Nothing is said of a question that holds none, or one that cannot be run.
"""

from __future__ import annotations

import re
from enum import Enum

from tandem_router.predictor.cascade.programs import MAX_SOURCE, NotRun, Plain, run

_FENCED = re.compile(
    r"```(?:python|py)?[ \t]*\n(.{1,4000}?)```|\[PYTHON\]\s*\n(.{1,4000}?)\[/PYTHON\]",
    re.DOTALL | re.IGNORECASE,
)
_DEFINED = re.compile(r"^def\s+(\w+)\s*\(", re.MULTILINE)
_OPEN_ASSERT = re.compile(
    r"^assert\s+(.{1,800}?)\s*==\s*(?:\?+|\.\.\.|_+|<[^>\n]*>)\s*$", re.M | re.S
)
_PRINTED = re.compile(r"^print\((.{1,400})\)\s*$", re.MULTILINE)
_ASKS = re.compile(r"\b(?:return|output|print|result|value|evaluat|give|yield|produce)", re.I)


class Agreement(Enum):
    """What running the program said of the answer."""

    UNKNOWN = 0
    AGREES = 1
    DIFFERS = 2


def agreement(prompt: str, final: str) -> Agreement:
    """final: the result that the answer states."""
    asked = program_of(prompt)
    if asked is None or not final:
        return Agreement.UNKNOWN
    try:
        value = run(*asked)
    except NotRun:
        return Agreement.UNKNOWN
    return Agreement.AGREES if says(final, value) else Agreement.DIFFERS


def says(final: str, value: Plain) -> bool:
    """Whether a stated result is the value, as a literal or as the text that it prints."""
    if final in (str(value), repr(value)):
        return True
    if isinstance(value, str) and final.strip("'\"") == value.strip():
        return True
    try:
        said = run("", final)
    except NotRun:
        return False
    return type(said) is type(value) and said == value


def program_of(prompt: str) -> tuple[str, str] | None:
    """(statements, the expression that is asked for), where a prompt holds both."""
    blocks = ["".join(found) for found in _FENCED.findall(prompt)]
    code = blocks[-1] if blocks else _from_first_def(prompt)
    if code is None or len(code) > MAX_SOURCE:
        return None
    if open_assert := _OPEN_ASSERT.search(code):
        return code[: open_assert.start()], open_assert.group(1)
    around = prompt.replace(code, "\n") if blocks else prompt.partition(code)[2]
    if open_assert := _OPEN_ASSERT.search(around):
        return code, open_assert.group(1)
    printed = _PRINTED.findall(code)
    if len(printed) == 1 and code.rstrip().endswith(f"print({printed[0]})"):
        return code[: code.rindex("print(")], printed[0]
    defined = _DEFINED.findall(code)
    if not printed and defined and _ASKS.search(around):
        calls = {call for name in defined for call in _calls(name, around)}
        if len(calls) == 1:
            return code, calls.pop()
    return None


def _from_first_def(prompt: str) -> str | None:
    """Code without a fence: from the first `def` at a line's start to where the text goes on."""
    found = _DEFINED.search(prompt)
    if found is None:
        return None
    lines = prompt[found.start() :].split("\n")
    end = next(
        (i for i, line in enumerate(lines) if i and line.strip() and line[0] not in " \t"),
        len(lines),
    )
    while end < len(lines) and lines[end].startswith("def "):
        end = next(
            (
                i
                for i, line in enumerate(lines)
                if i > end and line.strip() and line[0] not in " \t"
            ),
            len(lines),
        )
    return "\n".join(lines[:end]) + "\n"


def _calls(name: str, text: str) -> list[str]:
    """Calls of a function in prose, with their arguments."""
    found = []
    for match in re.finditer(rf"(?<![\w.]){re.escape(name)}\(", text):
        depth, quote = 1, ""
        for at in range(match.end(), min(len(text), match.end() + 800)):
            char = text[at]
            if quote:
                quote = "" if char == quote and text[at - 1] != "\\" else quote
            elif char in "'\"":
                quote = char
            else:
                depth += (char in "([{") - (char in ")]}")
                if depth == 0:
                    found.append(text[match.start() : at + 1])
                    break
    return found
