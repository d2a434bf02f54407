"""Paraphrases: templates, and openers that may stand before any of them."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

OPENERS = (*("",) * 8, "Please answer: ", "Quick question: ", "Tell me: ", "One more: ")


def phrase(rng: Random, templates: Sequence[str], **values: object) -> tuple[str, str]:
    """A random wording filled with ``values``, and the wording's name for use in a key."""
    template, opener = rng.choice(templates), rng.choice(OPENERS)
    return opener + template.format(**values), f"{opener}{template}"
