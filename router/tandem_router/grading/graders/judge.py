"""What a judge is asked, of two answers in both orders or of one alone, and what it said.

Judges favour a position, so each pair is shown twice, once in each order, and both verdicts count
half. A tie grades both answers 1: a tier's quality is then the share of prompts on which its
answer is at least as good as the one that it is compared with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

Verdict = Literal["first", "second", "tie"]

_SYSTEM = (
    "You are an impartial judge. You see a user's question and the answers of two assistants, A "
    "and B. Decide which answer serves the user better: correctness first, then whether it does "
    "what was asked. Neither the order of the answers, nor their length, nor the assistants' "
    "names may count. If both are equally good, or equally bad, it is a tie. Think briefly if you "
    "must, and end with exactly one of [[A]], [[B]] or [[C]]: A is better, B is better, a tie."
)
_TEMPLATE = (
    "[User Question]\n{question}\n\n"
    "[The Start of Assistant A's Answer]\n{first}\n[The End of Assistant A's Answer]\n\n"
    "[The Start of Assistant B's Answer]\n{second}\n[The End of Assistant B's Answer]"
)
#: Characters of an answer that a judge is shown.
MAX_SHOWN_CHARS = 20_000

_SYSTEM_ALONE = (
    "You are an impartial judge. You see a user's question and an assistant's answer. Decide "
    "whether the answer is good enough to be sent: it is correct, and it does what was asked. "
    "Its length and style do not count. Reply with exactly one of [[GOOD]] or [[BAD]], and nothing "
    "else."
)
_TEMPLATE_ALONE = (
    "[User Question]\n{question}\n\n"
    "[The Start of the Assistant's Answer]\n{answer}\n[The End of the Assistant's Answer]"
)
_MARK_ALONE = re.compile(r"\[\[\s*(GOOD|BAD)\s*\]\]", re.IGNORECASE)

_MARK = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
_WORDS: dict[str, Verdict] = {
    "a": "first",
    "assistant a": "first",
    "answer a": "first",
    "b": "second",
    "assistant b": "second",
    "answer b": "second",
    "c": "tie",
    "tie": "tie",
}


def messages(question: str, first: str, second: str) -> list[dict[str, str]]:
    """What the judge is asked about two answers in this order."""
    shown = _TEMPLATE.format(
        question=question[:MAX_SHOWN_CHARS],
        first=first[:MAX_SHOWN_CHARS],
        second=second[:MAX_SHOWN_CHARS],
    )
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": shown}]


def parse(reply: str) -> Verdict | None:
    """What a judge's reply says; None where it garbles.

    The last [[A]], [[B]], [[C]] counts; a reply that is one word or a JSON object with a `winner`
    or `verdict` is understood too.
    """
    marks = _MARK.findall(reply)
    if marks:
        return _WORDS[marks[-1].lower()]
    word: Any = reply.strip()
    try:
        value = json.loads(word)
        if isinstance(value, dict):
            word = value.get("winner", value.get("verdict", ""))
    except (ValueError, RecursionError):
        pass
    return _WORDS.get(str(word).strip(" .*`\"'[]()").lower())


def messages_of_one(question: str, answer: str) -> list[dict[str, str]]:
    """What the judge is asked about an answer that has no other beside it."""
    shown = _TEMPLATE_ALONE.format(
        question=question[:MAX_SHOWN_CHARS], answer=answer[:MAX_SHOWN_CHARS]
    )
    return [{"role": "system", "content": _SYSTEM_ALONE}, {"role": "user", "content": shown}]


def parse_of_one(reply: str) -> bool | None:
    """Whether a judge's reply says that the answer is good; the last mark counts, None: no mark."""
    marks = _MARK_ALONE.findall(reply)
    if marks:
        return bool(marks[-1].lower() == "good")
    return {"good": True, "bad": False}.get(reply.strip(" .*`\"'[]()\n").lower())


def turned(verdict: Verdict) -> Verdict:
    """The verdict as it reads with the two answers exchanged."""
    exchanged: dict[Verdict, Verdict] = {"first": "second", "second": "first", "tie": "tie"}
    return exchanged[verdict]


def scores(verdicts: Sequence[Verdict]) -> tuple[float, float]:
    """Grades of two answers from verdicts that name them in the same order: their mean.

    The better 1 and the worse 0; a tie 1 and 1; two orders that contradict each other half each.
    """
    worth = {"first": (1.0, 0.0), "second": (0.0, 1.0), "tie": (1.0, 1.0)}
    given = [worth[verdict] for verdict in verdicts]
    return (
        sum(first for first, _ in given) / len(given),
        sum(second for _, second in given) / len(given),
    )
