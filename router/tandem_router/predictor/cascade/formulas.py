"""Whether the formulas of an answer add up: what LaTeX says to be equal is computed on both sides.

Only sides without letters are looked at, such as ``\\frac{12!}{2^3} = 59875200``; sides that hold
an unknown say nothing. Work is bounded by the number of formulas and by their length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

MAX_FORMULAS = 64
MAX_SIDE = 160
MAX_NESTED = 20

_SPAN = re.compile(
    r"\\\((.{1,600}?)\\\)|\\\[(.{1,600}?)\\\]|\$\$(.{1,600}?)\$\$|\$([^$]{1,600})\$", re.DOTALL
)
_STEP = re.compile(r"\\\\|\n|&|\\(?:implies|Rightarrow|rightarrow|quad|text)\b|[,;]\s")
_TOKEN = re.compile(r"\\[a-zA-Z]+|\d+(?:\.\d+)?|\.\d+|\S")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PLAINER = {
    "\\left": "", "\\right": "", "\\,": "", "\\!": "", "\\;": "", "\\ ": " ", "$": "",
    "{,}": "", "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\dbinom": "\\binom",
    "\\cdot": "*", "\\times": "*", "\\div": "/", "^\\circ": "", "\\%": "",
}  # fmt: skip
_CLOSING = {"(": ")", "[": "]", "{": "}"}


class _Unknown(Exception):
    """Not a number that can be computed."""


def checked_formulas(answer: str) -> tuple[int, int]:
    """(equalities that could be computed, those of them that are wrong)."""
    plain = answer.replace("\\\\(", "\\(").replace("\\\\)", "\\)")
    plain = plain.replace("\\\\[", "\\[").replace("\\\\]", "\\]")
    num = wrong = 0
    for left, right, nearly in _equalities(plain):
        x, y = value_of(left), value_of(right)
        if x is None or y is None or left.strip() == right.strip():
            continue
        num += 1
        wrong += abs(x - y) > max(0.011, (0.02 if nearly else 0.005) * abs(x))
        if num >= MAX_FORMULAS:
            break
    return num, wrong


def _equalities(answer: str) -> Iterator[tuple[str, str, bool]]:
    for number, span in enumerate(_SPAN.findall(answer)):
        if number >= MAX_FORMULAS:
            return
        for step in _STEP.split(next(part for part in span if part)):
            sides = re.split(r"=|\\approx", step)
            for left, right in zip(sides, sides[1:], strict=False):
                if len(left) <= MAX_SIDE and len(right) <= MAX_SIDE:
                    yield left, right, "\\approx" in step


def value_of(formula: str) -> float | None:
    """A formula of numbers alone as a number; None for anything else."""
    if not any(char.isdigit() for char in formula):
        return None
    for written, plain in _PLAINER.items():
        formula = formula.replace(written, plain)
    tokens = _TOKEN.findall(_THOUSANDS.sub("", formula))
    reader = _Reader(tokens)
    try:
        value = reader.sum(0)
    except (_Unknown, OverflowError, ZeroDivisionError):
        return None
    return value if reader.at == len(tokens) and math.isfinite(value) else None


class _Reader:
    """Recursive descent over the tokens of one side."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0

    def _next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _take(self) -> str:
        token = self._next()
        self.at += 1
        return token

    def sum(self, depth: int) -> float:
        if depth > MAX_NESTED:
            raise _Unknown
        value = self._product(depth)
        while (sign := self._next()) in ("+", "-"):
            self.at += 1
            value += self._product(depth) * (1.0 if sign == "+" else -1.0)
        return value

    def _product(self, depth: int) -> float:
        value = self._signed(depth)
        while sign := self._next():
            if sign == "*":
                self.at += 1
                value *= self._signed(depth)
            elif sign == "/":
                self.at += 1
                value /= self._signed(depth)
            elif sign in "({" or sign in ("\\frac", "\\sqrt", "\\pi", "\\binom"):
                value *= self._power(depth)
            else:
                break
        return value

    def _signed(self, depth: int) -> float:
        sign = 1.0
        while self._next() in ("+", "-"):
            sign *= -1.0 if self._take() == "-" else 1.0
        return sign * self._power(depth)

    def _power(self, depth: int) -> float:
        value = self._atom(depth)
        while (token := self._next()) in ("!", "^"):
            self.at += 1
            if token == "!":
                value = float(math.factorial(_whole(value, 30)))
                continue
            exponent = self._atom(depth)
            if abs(exponent) > 64 or (value < 0 and exponent != int(exponent)):
                raise _Unknown
            value = float(value**exponent)
        return value

    def _atom(self, depth: int) -> float:
        token = self._take()
        if token and (token[0].isdecimal() or (token[0] == "." and len(token) > 1)):
            return float(token)
        if closing := _CLOSING.get(token):
            value = self.sum(depth + 1)
            if self._take() != closing:
                raise _Unknown
            return value
        if token == "\\pi":
            return math.pi
        if token == "\\frac":
            above = self._atom(depth + 1)
            return above / self._atom(depth + 1)
        if token == "\\sqrt" and self._next() != "[":
            value = self._atom(depth + 1)
            if value >= 0.0:
                return math.sqrt(value)
        if token == "\\binom":
            of = _whole(self._atom(depth + 1), 200)
            return float(math.comb(of, _whole(self._atom(depth + 1), 200)))
        raise _Unknown


def _whole(value: float, most: int) -> int:
    if not (0 <= value <= most and value == int(value)):
        raise _Unknown
    return int(value)
