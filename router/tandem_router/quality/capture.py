"""What a label keeps of its request: nothing, features that can be trained on, or the prompt.

Hashes of n-grams are no secret: who guesses a word can look whether its hash is there. What is
taken out before anything is kept is named in the configuration; patterns are ours alone, because
one that backtracks would stop every stream.
"""

from __future__ import annotations

import re
from typing import Any

from tandem_router.config import LearningConfig
from tandem_router.predictor.reading.captured import Captured

#: Characters of a prompt that are kept.
MAX_KEPT_CHARS = 20_000

_PATTERNS = {
    "Urls": (re.compile(r"\bhttps?://[^\s<>\"']{1,2000}", re.IGNORECASE), "[url]"),
    "Emails": (
        re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,5}"),
        "[email]",
    ),
    "Numbers": (re.compile(r"\d[\d .,/()-]{1,40}\d"), "[number]"),
}


def redacted(text: str, kinds: tuple[str, ...]) -> str:
    """The text without addresses of pages, of people, or numbers of three digits and more."""
    for kind in ("Urls", "Emails", "Numbers"):
        if kind in kinds:
            pattern, instead = _PATTERNS[kind]
            text = pattern.sub(instead, text)
    return text


def captured(config: LearningConfig, text: str) -> tuple[dict[str, Any] | None, str | None]:
    """(features, prompt) of a request's text, as the Router says."""
    if config.capture == "None":
        return None, None
    text = redacted(text[:MAX_KEPT_CHARS], config.redact)
    if config.capture == "Prompts":
        return None, text
    return Captured.of(text).kept(), None
