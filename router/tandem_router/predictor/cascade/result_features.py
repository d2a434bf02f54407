"""What the stated result of an answer, its formulas and its way of writing say about it.

A result in another form than was asked for, a formula that does not add up, an answer that runs
long, rounds, guesses or corrects itself: each is more frequent in wrong answers (level-5
mathematics: the length alone ranks with an AUC of .73, all of these with .78). Where the question
holds a short program, running it settles the matter.
"""

from __future__ import annotations

import math
import re

from tandem_router.predictor.cascade.final_answer import final_text
from tandem_router.predictor.cascade.formulas import checked_formulas, value_of
from tandem_router.predictor.cascade.recomputed import Agreement, agreement

RESULT_FEATURE_NAMES: tuple[str, ...] = (
    "recomputed_agrees",
    "recomputed_differs",
    "final_chars_log",
    "final_decimals",
    "final_is_fraction",
    "final_has_radical",
    "final_has_letters",
    "final_has_value",
    "final_value_log",
    "final_is_trivial",
    "asked_fraction",
    "asked_fraction_unmet",
    "decimals_unasked",
    "asked_how_many",
    "asked_to_express",
    "formulas",
    "formulas_wrong",
    "formulas_wrong_share",
    "answer_chars_log",
    "prompt_chars_log",
    "prompt_commands",
    "answer_commands_log",
    "equals_signs_log",
    "drawing",
    "listed_steps",
    "answer_lines_log",
    "says_about",
    "says_rounded",
    "says_assumed",
    "says_corrected",
    "says_guessed",
    "says_tried",
    "says_complex",
)

_DECIMALS = re.compile(r"\d\.(\d+)")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_STEPS = re.compile(r"(?:^|\n)\s{0,8}(?:\d{1,2}\.|-|\*)\s")
_LETTERS = re.compile(r"[a-zA-Z]")
_SAYS = tuple(
    re.compile(rf"\b(?:{words})\b", re.IGNORECASE)
    for words in (
        r"approx\w*|about",
        r"round(?:ed|ing)?",
        r"assum\w+|typically|usually",
        r"correct(?:ed|ion|ing)|mistake|error|incorrect|re-?check\w*|re-?evaluat\w*|upon",
        r"seems?|appears?|likely|might|perhaps|possibly|closest",
        r"numerical(?:ly)?|trial|testing|try|trying|brute|estimate\w*|guess\w*",
        r"complex|complicated|difficult|tedious",
    )
)


def result_features(prompt: str, answer: str) -> list[float]:
    """In the order of `RESULT_FEATURE_NAMES`; both texts are bounded by the caller."""
    final = final_text(answer)
    agreed = agreement(prompt, final)
    asked = prompt.lower()
    decimals = _DECIMALS.search(final)
    fraction = "/" in final or "frac" in final
    value = value_of(final)
    num, wrong = checked_formulas(answer)
    wants_fraction = "common fraction" in asked or "as a fraction" in asked
    wants_decimal = any(word in asked for word in ("decimal", "nearest", "round"))
    return [
        float(agreed is Agreement.AGREES),
        float(agreed is Agreement.DIFFERS),
        math.log1p(len(final)),
        float(min(8, len(decimals.group(1)))) if decimals else 0.0,
        float(fraction),
        float("sqrt" in final),
        float(bool(_LETTERS.search(_COMMAND.sub("", final)))),
        float(value is not None),
        math.log1p(min(1e9, abs(value))) if value is not None else 0.0,
        float(final in ("0", "1", "2")),
        float(wants_fraction),
        float(wants_fraction and not fraction),
        float(decimals is not None and not wants_decimal and "." not in prompt[:-1]),
        float("how many" in asked),
        float("express" in asked or "in terms of" in asked),
        float(num),
        float(min(3, wrong)),
        wrong / max(1, num),
        math.log1p(len(answer)),
        math.log1p(len(prompt)),
        float(min(50, len(_COMMAND.findall(prompt)))),
        math.log1p(len(_COMMAND.findall(answer))),
        math.log1p(answer.count("=")),
        float("[asy]" in prompt),
        float(min(30, len(_STEPS.findall(answer)))),
        math.log1p(answer.count("\n")),
        *(float(min(5, len(says.findall(answer)))) for says in _SAYS),
    ]
