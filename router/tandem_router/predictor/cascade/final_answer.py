"""What an answer ends on: its last stated result, whatever form it was asked for in.

As JSON (`"answer": ...`), after `####`, in `\\boxed{}`, after "the answer is", in a completed
assertion; else the last line.
"""

from __future__ import annotations

import re

MAX_FINAL = 400

_JSON = re.compile(
    r'"(?:final_?)?answer"\s{0,8}:\s{0,8}("(?:[^"\\\n]|\\.){0,400}"|[^\n]{0,400})', re.I
)
_ASSERT = re.compile(r"\bassert\s[^\n]{1,400}?\s==\s?([^\n]{1,400})")
_BOXED = re.compile(r"\\boxed\{([^\n]{0,200})")
_SAID = re.compile(r"(?:####|answer(?:\s+is|:))\s{0,4}([^\n]{0,200})", re.IGNORECASE)


def final_text(answer: str) -> str:
    """The stated result, without what surrounds it; empty where there is none."""
    if found := _JSON.findall(answer):
        return _unwrapped(found[-1].strip().removesuffix("}").rstrip().removesuffix(","))
    if found := _BOXED.findall(answer):
        return _to_closing(found[-1])
    if found := _SAID.findall(answer):
        return _unwrapped(found[-1].strip().rstrip("."))
    if found := _ASSERT.findall(answer):
        return _unwrapped(found[-1].strip())
    lines = [line for line in answer[-2 * MAX_FINAL :].splitlines() if line.strip(" \t`")]
    return _unwrapped(lines[-1].strip()[:MAX_FINAL]) if lines else ""


def _unwrapped(text: str) -> str:
    """Without quotes of JSON, backticks and dollars around all of it."""
    if len(text) > 1 and text[0] == text[-1] == '"':
        return text[1:-1].replace('\\"', '"').replace("\\\\", "\\").strip()
    return text.strip().strip("`$*").strip()


def _to_closing(text: str) -> str:
    depth = 1
    for at, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[:at].strip()
    return text.strip()
