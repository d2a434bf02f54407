"""What the exact model answers to stored prompts, as a file beside the weights of a lossy version.

Token ids, because a quantized version has its original's tokenizer, and the log-probability that
the exact model gave each token of its answer. `tandem exact-answers` writes the file; a worker with
lossy settings is held against it when it starts (:mod:`tandem_worker.engine.qualification`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem_worker.errors import ModelError
from tandem_worker.models.files import EXACT_ANSWERS, locate, read_json

MAX_ANSWERS = 1024
_RULE = (
    f"each of 1 to {MAX_ANSWERS} answers has prompt and answer (token ids, not empty) and logprobs "
    "(a number per token of the answer, at most 0); write the file with `tandem exact-answers`"
)


@dataclass(frozen=True)
class ExactAnswer:
    """One prompt, what the exact model answers greedily, and how likely each token was to it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    logprobs: tuple[float, ...]


def read_exact_answers(directory: Path, vocab_size: int) -> list[ExactAnswer]:
    """The answers that lie beside the weights; none where there is no file.

    Raises:
        ModelError: the file breaks a rule.
    """
    path = locate(directory, EXACT_ANSWERS)
    if path is None:
        return []
    given = read_json(path).get("answers")
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_ANSWERS:
        raise ModelError(f"{path}: {_RULE}")
    return [_answer(entry, vocab_size, f"{path}: answers[{i}]") for i, entry in enumerate(given)]


def write_exact_answers(path: Path, answers: Sequence[ExactAnswer], made_with: str) -> None:
    """Write the file; made_with: the model and types, for people."""
    lines = (
        json.dumps({"prompt": a.prompt, "answer": a.answer, "logprobs": a.logprobs})
        for a in answers
    )
    head = json.dumps({"made_with": made_with})[:-1]
    text = head + ',\n"answers": [\n' + ",\n".join(lines) + "\n]}\n"
    path.write_text(text, encoding="utf-8")


def _answer(entry: Any, vocab_size: int, where: str) -> ExactAnswer:
    if not isinstance(entry, dict):
        raise ModelError(f"{where}: {_RULE}")
    prompt, answer = (_ids(entry.get(key), vocab_size, where) for key in ("prompt", "answer"))
    logprobs = entry.get("logprobs")
    if (
        not isinstance(logprobs, list)
        or len(logprobs) != len(answer)
        or not all(isinstance(p, int | float) and math.isfinite(p) and p <= 0 for p in logprobs)
    ):
        raise ModelError(f"{where}: {_RULE}")
    return ExactAnswer(prompt, answer, tuple(map(float, logprobs)))


def _ids(given: Any, vocab_size: int, where: str) -> tuple[int, ...]:
    if not isinstance(given, list) or not given or not all(type(i) is int for i in given):
        raise ModelError(f"{where}: {_RULE}")
    if not 0 <= min(given) <= max(given) < vocab_size:
        raise ModelError(
            f"{where}: token ids must be from 0 to {vocab_size - 1}, those of this model; these "
            "answers are another model's: write them with `tandem exact-answers` of its original"
        )
    return tuple(given)
