"""What a chat's message or delta says: its text and its calls of functions, for other protocols.

Providers put other things there than text now and then; what has no words says nothing, and
arguments that came as an object are written as the JSON that they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Call(NamedTuple):
    """A call of a function, or a piece of one. number: which of the answer's calls it is."""

    number: int
    call_id: str | None
    name: str | None
    arguments: str


def text_of(said: Mapping[str, Any], *names: str) -> str:
    """The first of the named fields that is text; empty where none is."""
    return next((text for name in names if (text := _text(said.get(name)))), "")


def calls_of(said: Mapping[str, Any]) -> Iterator[Call]:
    """Its calls, in their order."""
    calls = said.get("tool_calls")
    for number, call in enumerate(calls if isinstance(calls, list) else ()):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            continue
        index, arguments = call.get("index"), function.get("arguments")
        if isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, ensure_ascii=False)
        yield Call(
            index if isinstance(index, int) else number,
            _text(call.get("id")) or None,
            _text(function.get("name")) or None,
            _text(arguments),
        )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
