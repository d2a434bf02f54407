"""What an answer says about itself: features of a (prompt, answer) pair, without a model.

Checks that cost microseconds and that a wrong answer often fails: does its arithmetic add up,
does it use the numbers of the question, does it end where an answer should end, how sure was the
model of its tokens. Work is bounded: only the first `MAX_CHARS` characters are read.
"""

from __future__ import annotations

import math
import re
import zlib

import numpy as np
from numpy.typing import NDArray

from tandem_router.predictor.cascade.result_features import RESULT_FEATURE_NAMES, result_features
from tandem_router.predictor.cascade.token_statistics import TokenStatistics

MAX_CHARS = 8192
MAX_EQUATIONS = 64

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?")
# Runs of digits and blanks are bounded: without an operator after them, every digit of an endless
# number would be tried as the start of an equation (8,192 ones took 1.5 s).
_EQUATION = re.compile(
    r"((?:[-+]?\$?\d[\d,]{0,24}(?:\.\d{1,24})?%?\s{0,8}[-+*/x\u00d7\u00f7]\s{0,8}){1,6}"
    r"\$?\d[\d,]{0,24}(?:\.\d{1,24})?%?)"
    r"[^\d=\n]{0,16}=\s{0,8}\$?(?:<<[^<>\n]{1,64}>>)?\s{0,8}([-+]?\d[\d,]{0,24}(?:\.\d{1,24})?)"
)
_ANNOTATION = re.compile(r"<<([^<>=\n]{1,64})=\s*([-+]?[\d.,]+)>>")
_TERM = re.compile(r"\s*\$?(\d[\d,]*(?:\.\d+)?)(%?)\s*([-+*/x\u00d7\u00f7]?)")
_FINAL = re.compile(r"(?:####|answer(?:\s+is|:)|\\boxed\{)\s*\$?\s*([^\n}]{0,64})", re.IGNORECASE)
_SENTENCE = re.compile(r"[.!?](?:\s|$)|\n")
_HEDGE = re.compile(
    r"\b(?:cannot|can't|unclear|not (?:enough|sure|given|possible|specified)|assum\w+|"
    r"unknown|depends|sorry|however|wait|actually)\b",
    re.IGNORECASE,
)
_FRACTION_WORDS = re.compile(
    r"\b(?:half|third|quarter|fifth|twice|thrice|double|triple|percent|times|each|every|per|more|"
    r"less|fewer|than|remaining|left|total|average|ratio|rest)\b|%",
    re.IGNORECASE,
)

FEATURE_NAMES: tuple[str, ...] = (
    "prompt_words_log",
    "prompt_numbers",
    "prompt_relations",
    "prompt_sentences",
    "answer_words_log",
    "answer_to_prompt",
    "answer_sentences",
    "has_final",
    "ends_cleanly",
    "ends_open",
    "equations",
    "equations_wrong",
    "equations_wrong_share",
    "equation_chain",
    "final_is_number",
    "final_is_whole",
    "final_log",
    "final_in_prompt",
    "final_is_last_result",
    "final_negative",
    "prompt_numbers_unused",
    "numbers_from_nowhere",
    "fractional_results",
    "hedges",
    "annotated_share",
    "steps_minus_needed",
    "compressibility",
    "repeated_lines",
    "has_certainty",
    "mean_logprob",
    "lowest_logprob",
    "doubtful_tokens",
    "final_logprob",
    # Verifiers of earlier artifacts know only those before.
    *RESULT_FEATURE_NAMES,
)


def answer_features(
    prompt: str, answer: str, tokens: TokenStatistics | None = None
) -> NDArray[np.float64]:
    """Features of one answer, finite whatever the text, (len(FEATURE_NAMES),).

    Args:
        prompt: what was asked.
        answer: what the small tier said.
        tokens: how sure the tier was of its tokens, where it told.
    """
    prompt, answer = prompt[-MAX_CHARS:], answer[:MAX_CHARS]
    asked = [_number(text) for text in _NUMBER.findall(prompt)]
    said = [_number(text) for text in _NUMBER.findall(answer)]
    prompt_words, answer_words = len(prompt.split()), len(answer.split())
    equations = _equations(answer)
    wrong = sum(not right for _, _, right in equations)
    results = [result for _, result, _ in equations]
    chained = sum(
        any(abs(term - result) < 1e-6 for result in results[:i] for term in terms)
        for i, (terms, _, _) in enumerate(equations)
    )
    final_text = _FINAL.findall(answer)
    finals = [_number(text) for text in _NUMBER.findall(final_text[-1])] if final_text else []
    final = finals[-1] if finals else (said[-1] if said else None)
    tail = answer.rstrip()[-1:]
    known = (
        set(asked) | set(results) | {0.0, 1.0, 2.0, 3.0, 4.0, 7.0, 10.0, 12.0, 24.0, 60.0, 100.0}
    )
    nowhere = sum(value not in known for value in said)
    unused = sum(value not in said for value in asked)
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    packed = len(zlib.compress(answer.encode("utf-8", "replace"), 1)) if answer else 1
    relations = len(_FRACTION_WORDS.findall(prompt))
    values = [
        math.log1p(prompt_words),
        float(len(asked)),
        float(relations),
        float(len(_SENTENCE.findall(prompt))),
        math.log1p(answer_words),
        math.log((1 + answer_words) / (1 + prompt_words)),
        float(len(_SENTENCE.findall(answer))),
        float(bool(final_text)),
        float(tail.isdigit() or tail in ".!})%"),
        float(tail in "+-*/=<,($:" or not tail),
        float(len(equations)),
        float(min(wrong, 3)),
        wrong / max(1, len(equations)),
        float(chained),
        float(bool(finals)),
        float(final is not None and final == math.floor(final)),
        math.log1p(min(1e9, abs(final))) if final is not None else 0.0,
        float(final is not None and final in asked),
        float(final is not None and bool(results) and abs(results[-1] - final) < 1e-6),
        float(final is not None and final < 0),
        float(unused),
        nowhere / max(1, len(said)),
        float(sum(result != math.floor(result) for result in results)),
        float(min(5, len(_HEDGE.findall(answer)))),
        len(_ANNOTATION.findall(answer)) / max(1, len(equations)),
        len(equations) - 0.5 * (len(asked) + relations),
        len(answer) / packed / 3.0,
        (len(lines) - len(set(lines))) / max(1, len(lines)),
        *_certainty(tokens),
        *result_features(prompt, answer),
    ]
    return np.clip(np.array(values, dtype=np.float64), -50.0, 50.0)


def _certainty(tokens: TokenStatistics | None) -> tuple[float, float, float, float, float]:
    if tokens is None:
        return 0.0, 0.0, 0.0, 0.0, 0.0
    return (
        1.0,
        tokens.mean_logprob,
        tokens.lowest_logprob,
        tokens.doubtful_share,
        tokens.final_logprob,
    )


def _number(text: str) -> float:
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0


def _equations(answer: str) -> list[tuple[list[float], float, bool]]:
    """(terms, claimed result, whether it is right) per equation, in order."""
    found: list[tuple[int, int, list[float], float, bool]] = []
    for pattern in (_ANNOTATION, _EQUATION):
        for match in pattern.finditer(answer):
            if len(found) >= MAX_EQUATIONS:
                break
            start, end = match.span()
            if any(start < other_end and other < end for other, other_end, *_ in found):
                continue  # the sentence around an annotation says the same thing
            terms, value = _evaluate(match.group(1))
            claimed = _number(match.group(2).rstrip(".,"))
            if value is None:
                continue
            right = abs(value - claimed) <= max(0.011, 0.005 * abs(value))
            found.append((start, end, terms, claimed, right))
    return [(terms, claimed, right) for _, _, terms, claimed, right in sorted(found)]


def _evaluate(expression: str) -> tuple[list[float], float | None]:
    """Value of a chain of numbers and + - * /, with precedence; None when it is not one."""
    terms: list[float] = []
    operators: list[str] = []
    position, sign = 0, 1.0
    expression = expression.strip()
    if expression[:1] in "+-":
        sign, position = (-1.0 if expression[0] == "-" else 1.0), 1
    while position < len(expression):
        match = _TERM.match(expression, position)
        if match is None or match.end() == position:
            return terms, None
        value = _number(match.group(1)) * (0.01 if match.group(2) else 1.0)
        terms.append(sign * value)
        sign, position = 1.0, match.end()
        if match.group(3):
            operators.append(match.group(3))
        elif position < len(expression):
            return terms, None
    if not terms or len(operators) != len(terms) - 1:
        return terms, None
    total, product = 0.0, terms[0]
    for operator, term in zip(operators, terms[1:], strict=True):
        if operator in "*x\u00d7":
            product *= term
        elif operator in "/\u00f7":
            if term == 0.0:
                return terms, None
            product /= term
        else:
            total += product
            product = term if operator == "+" else -term
    value = total + product
    return terms, value if math.isfinite(value) else None
