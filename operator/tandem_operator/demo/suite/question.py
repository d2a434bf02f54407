"""What a question is, how it falls into a split, and how an answer is checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
LEVELS = (1, 2, 3, 4)
MARKER = ">"
"""Separates the worked steps from the answer; neither prompts, steps nor answers contain it."""


@dataclass(frozen=True)
class Draft:
    """A question as a family makes it, before it has a place in a split.

    ``key`` is the canonical content: two drafts with the same key ask the same thing. Where a
    level has too few contents to keep some away from training (facts, tables), the key also
    names the wording, and the split is by (content, wording).
    """

    key: str
    prompt: str
    work: str
    answer: str


@dataclass(frozen=True)
class Question:
    """One question of the suite with its only right answer."""

    prompt: str
    answer: str
    family: str
    level: int
    id: str
    work: str = ""
    """Worked steps that training shows before the answer; empty where none are needed."""

    @property
    def completion(self) -> str:
        """What a model should write: the steps, the marker, the answer."""
        return f"{self.work}{MARKER}{self.answer}"


def digest(family: str, key: str) -> int:
    """Hash of a question's content, the same on every machine and in every run."""
    raw = hashlib.blake2b(f"{family}|{key}".encode(), digest_size=8).digest()
    return int.from_bytes(raw, "big")


def split_of(family: str, key: str) -> Split:
    """The one split that a content belongs to: 10 % test, 10 % validation, the rest train."""
    bucket = digest(family, key) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def check(question: Question, completion_text: str) -> bool:
    """Whether the text after the last marker is exactly the answer, white space around it aside.

    Text without a marker counts as all answer.
    """
    return completion_text.rpartition(MARKER)[2].strip() == question.answer
