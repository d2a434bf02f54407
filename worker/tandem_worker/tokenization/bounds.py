"""What a tokenizer.json may hold: nothing by which a text takes exponential time or memory.

The library that reads it runs in the worker and cannot be interrupted, and the process ends where
memory does. So what a file makes of a text is bounded before it is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandem_worker.errors import ModelError

MOST_GROWTH = 64
"""Characters that replacements, one after the other, may make of one."""
MOST_ADDED = 1024
"""Characters before each text, and pieces around it."""

_REPEATED = re.compile(r"[+*]|\{\d*,\d*\}")


def check(text: str, path: Path) -> int | None:
    """Look through a tokenizer file.

    Returns:
        Characters that one token stands for at most; None where nothing bounds them.

    Raises:
        ModelError: it is no JSON, or holds what is not bounded.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be loaded: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} cannot be loaded: it is no JSON object")
    growth = 1
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for node in _nodes(data.get(part)):
            _check_pattern(node, path)
            if part == "decoder":
                continue
            growth *= _growth(node)
            _check_added(node, part, path)
    if growth > MOST_GROWTH:
        raise ModelError(
            f"{path}: its replacements make up to {growth} characters of one; at most "
            f"{MOST_GROWTH} are taken"
        )
    return _most_chars_per_token(data)


def _most_chars_per_token(data: dict[str, Any]) -> int | None:
    """Of a byte-level BPE, whose tokens are all spelled out: no unknown ones, nothing stripped."""
    model, added = data.get("model"), data.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    added = [each for each in added if isinstance(each, dict)] if isinstance(added, list) else []
    is_bytes = any(node.get("type") == "ByteLevel" for node in _nodes(data.get("pre_tokenizer")))
    strips = any(each.get("lstrip") or each.get("rstrip") for each in added)
    if not is_bytes or strips or data.get("normalizer") or not isinstance(vocab, dict):
        return None
    texts = [*vocab, *(str(each.get("content")) for each in added)]
    return max(map(len, texts), default=None)


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object at any depth; the depth is the JSON reader's, a thousand at most."""
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            yield each
            pending += each.values()
        elif isinstance(each, list):
            pending += each


def _growth(node: dict[str, Any]) -> int:
    """Characters that a replacement makes of the fewest that it takes."""
    content = node.get("content")
    if node.get("type") != "Replace" or not isinstance(content, str):
        return 1
    pattern = node.get("pattern")
    given = pattern.get("String") if isinstance(pattern, dict) else None
    return max(1, -(-len(content) // max(1, len(given) if isinstance(given, str) else 1)))


def _check_added(node: dict[str, Any], part: str, path: Path) -> None:
    prepended = node.get("prepend")
    added = len(prepended) if isinstance(prepended, str) else 0
    for name in ("single", "pair", "ids"):
        pieces = node.get(name)
        added += len(pieces) if isinstance(pieces, list) else 0
    if added > MOST_ADDED:
        raise ModelError(
            f"{path}: its {part} puts {added} characters or pieces around every text; at most "
            f"{MOST_ADDED} are taken"
        )


def _check_pattern(node: dict[str, Any], path: Path) -> None:
    """Refuse regular expressions that take exponential time on some texts.

    A group that repeats without end around something that repeats without end has that many ways
    to match; no published tokenizer holds one.
    """
    pattern = node.get("Regex")
    if isinstance(pattern, str) and _repeats_a_repetition(pattern):
        raise ModelError(
            f"{path}: the regular expression {pattern[:100]!r} repeats a repetition, which "
            "takes exponential time on some texts; write it without nested + or *"
        )


def _repeats_a_repetition(pattern: str) -> bool:
    """Whether a group quantified by + or * holds something quantified by + or *."""
    plain = re.sub(r"\\.", "_", pattern)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "_", plain)
    begun: list[bool] = []  # per open group: holds an unbounded repetition
    at = 0
    while at < len(plain):
        if plain[at] == "(":
            begun.append(False)
        elif plain[at] == ")" and begun:
            holds = begun.pop()
            repeated = _REPEATED.match(plain, at + 1) is not None
            if holds and repeated:
                return True
            if begun and (holds or repeated):
                begun[-1] = True
        elif begun and _REPEATED.match(plain, at):
            begun[-1] = True
        at += 1
    return False
