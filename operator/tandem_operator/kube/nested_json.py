"""JSON of an apiserver, which takes 10,000 levels of lists and objects; Python gives up at 990.

A podPatch has no schema, so that one object of somebody who may create Models would end every list
and watch that it is in. What lies deeper than anything real is read as null, and the resource is
refused for what is left of it (`resources.base.OpaqueObject`). Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

MOST_LEVELS = 200
_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_STRINGS = re.compile(_STRING, re.DOTALL)
_TOKENS = re.compile(_STRING + rb"|[\[\]{}]", re.DOTALL)
_NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))


def read_json(data: bytes) -> Any:
    """The value of `readable` bytes. Raises ValueError."""
    return json.loads(readable(data))


def readable(data: bytes) -> bytes:
    """The same bytes where no more than MOST_LEVELS lie in one another, else `flattened`."""
    return data if _is_flat(data) else flattened(data)


def _is_flat(data: bytes) -> bool:
    if data.count(b"{") + data.count(b"[") <= MOST_LEVELS:
        return True
    # Half again of what reading it as JSON takes.
    brackets = _STRINGS.sub(b"", data).translate(None, _NO_BRACKET)
    for _ in range(MOST_LEVELS):
        if not brackets:
            return True
        brackets = brackets.replace(b"{}", b"").replace(b"[]", b"")
    return not brackets


def flattened(data: bytes) -> bytes:
    """JSON with what lies deeper than MOST_LEVELS as null."""
    parts, start, depth = [], 0, 0
    for token in _TOKENS.finditer(data):
        kind = token[0]
        if kind in (b"{", b"["):
            depth += 1
            if depth == MOST_LEVELS + 1:
                parts += [data[start : token.start()], b"null"]
        elif kind in (b"}", b"]"):
            if depth == MOST_LEVELS + 1:
                start = token.end()
            depth -= 1
    return b"".join([*parts, data[start:]])


class ReadableLines:
    """The content of a watch, whole lines at a time, each `readable`."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def iter_chunked(self, n: int) -> AsyncIterator[bytes]:
        """As of the content, whose bytes these are unless they cannot be read."""
        rest: list[bytes] = []
        async for chunk in self._content.iter_chunked(n):
            whole, end, after = chunk.rpartition(b"\n")
            if end:
                lines = b"".join([*rest, whole]).split(b"\n")
                rest = []
                yield b"\n".join([*map(readable, lines), b""])
            rest.append(after)
        if any(rest):
            yield b"".join(rest)
