"""A graded question suite: twelve families, four levels, exact answers, splits that never meet.

Pure Python from the standard library, so that the demo asks the same questions that training,
evaluation and the tests use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from .atlas import facts
from .numbers import dates, products, sums, units, word_problems
from .question import LEVELS, MARKER, SPLITS, Draft, Question, Split, check, digest, split_of
from .symbols import brackets, code, edits, logic, lookup, sorting

FAMILIES: dict[str, Callable[[Random, int], Draft]] = {
    "facts": facts,
    "sums": sums,
    "products": products,
    "word problems": word_problems,
    "sorting": sorting,
    "edits": edits,
    "lookup": lookup,
    "dates": dates,
    "units": units,
    "brackets": brackets,
    "logic": logic,
    "code": code,
}
_CELLS = tuple((family, level) for level in LEVELS for family in FAMILIES)
_TRIES_FOR_NEW = 300

__all__ = [
    "FAMILIES",
    "LEVELS",
    "MARKER",
    "SPLITS",
    "Question",
    "Split",
    "check",
    "draw",
    "generate",
    "split_of",
]


def draw(rng: Random, split: Split, family: str, level: int) -> Question:
    """One random question of a family and level whose content belongs to ``split``."""
    while True:
        draft = FAMILIES[family](rng, level)
        if split_of(family, draft.key) == split:
            slug = f"{family.replace(' ', '-')}-{level}-{digest(family, draft.prompt):016x}"
            return Question(draft.prompt, draft.answer, family, level, slug, draft.work)


def generate(split: Split, seed: int, n: int) -> list[Question]:
    """``n`` questions, the same for the same arguments, spread evenly over families and levels.

    Prompts do not repeat unless a cell of the split has no new one left.

    Raises:
        ValueError: unknown split, or ``n`` below zero.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")
    if n < 0:
        raise ValueError(f"n={n} is negative; ask for 0 or more questions")
    return list(_distinct(Random(f"{split}|{seed}"), split, n))


def _distinct(rng: Random, split: Split, n: int) -> Iterator[Question]:
    seen: set[str] = set()
    order = list(_CELLS)
    for i in range(n):
        if i % len(order) == 0:
            rng.shuffle(order)
        family, level = order[i % len(order)]
        for _ in range(_TRIES_FOR_NEW):
            question = draw(rng, split, family, level)
            if question.prompt not in seen:
                break
        seen.add(question.prompt)
        yield question
