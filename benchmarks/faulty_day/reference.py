"""What each tier answers to each question: a function of the tier and the question's mark alone."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from tandem_router.testing.fake_worker import token_text

MOST_TOKENS = 40
_MARK = re.compile(r"<<(\w+)>>")


def mark_of(body: dict[str, Any]) -> str:
    """The mark that a question carries through every API."""
    found = _MARK.findall(json.dumps(body.get("messages", body.get("prompt"))))
    return str(found[-1]) if found else ""


def token_ids(tier: str, mark: str, most: int | None) -> list[int]:
    """Of a pool's answer; one token in eight is a piece of text that looks like a protocol."""
    digest = hashlib.sha256(f"{tier}/{mark}".encode()).digest()
    number = min(3 + digest[0] % (MOST_TOKENS - 3), most or MOST_TOKENS)
    return [3 + digest[1 + i % 31] % 97 for i in range(number)]


def words(tier: str, mark: str, most: int | None) -> list[str]:
    """Of a provider's answer: four characters each, so that whoever estimates counts right."""
    digest = hashlib.sha256(f"{tier}/{mark}".encode()).hexdigest()
    number = min(3 + int(digest[:4], 16) % (MOST_TOKENS - 3), most or MOST_TOKENS)
    return [" " + digest[4 + i % 57 : 7 + i % 57] for i in range(number)]


def answer(tier: str, pool: str, mark: str, most: int | None) -> list[str]:
    """The pieces of text, one per token."""
    if tier == pool:
        return [token_text(each) for each in token_ids(tier, mark, most)]
    return words(tier, mark, most)


def prompt_tokens(body: dict[str, Any]) -> int:
    """What a provider counts: of its text only, so at most what anybody estimates by size."""
    return len(json.dumps(body.get("messages", body.get("prompt")))) // 6
