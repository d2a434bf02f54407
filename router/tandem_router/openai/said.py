"""What a reply or a chunk says: its choices, their text and calls, for other protocols.

Providers put other things there than text now and then; what has no words says nothing, and
arguments that came as an object are written as the JSON that they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tandem_router.openai.sse import decode_json, event_data


class Call(NamedTuple):
    """A call of a function, or a piece of one. number: which of the answer's calls it is."""

    number: int
    call_id: str | None
    name: str | None
    arguments: str


def chunk_of(event: bytes) -> dict[str, Any] | None:
    """The object that an event of a stream carries; None where it carries none that can be read.

    It is forwarded all the same: whoever has to look into it looks at what there is.
    """
    payload = event_data(event)
    if not payload.startswith(b"{"):
        return None
    try:
        chunk = decode_json(payload)
    except (ValueError, RecursionError):
        return None
    return chunk if isinstance(chunk, dict) else None


def choices_of(reply: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those of its choices that are objects."""
    choices = reply.get("choices")
    return [each for each in choices if isinstance(each, dict)] if type(choices) is list else []


def part_of(choice: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The message or delta of a choice; empty where it is no object."""
    part = choice.get(name)
    return part if isinstance(part, dict) else {}


def finish_of(choice: Mapping[str, Any]) -> str | None:
    """Why a choice ended; None while it has not."""
    return _text(choice.get("finish_reason")) or None


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
