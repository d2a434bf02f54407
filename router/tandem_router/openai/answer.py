"""Whether a whole reply is an answer; what it used is read by `usage`."""

from __future__ import annotations

import zlib
from typing import Any

from tandem_router.openai.sse import decode_json

MAX_UNPACKED_BYTES = 64 * 2**20


class NotAnAnswer(ValueError):
    """A reply with status 200 that answers nothing; `error` is its error object, if it has one."""

    def __init__(self, why: str, error: Any = None) -> None:
        super().__init__(why)
        self.error = error


def answer_of(body: bytes, kind: str) -> dict[str, Any]:
    """The reply as an object with at least one choice that has a message (chat) or text, or with
    vectors (embeddings).

    Raises NotAnAnswer for everything that providers send instead.
    """
    try:
        reply = decode_json(body)
    except (ValueError, RecursionError) as error:
        raise NotAnAnswer(f"the reply is not JSON: {type(error).__name__}") from error
    if not isinstance(reply, dict):
        raise NotAnAnswer("the reply is not a JSON object")
    if reply.get("error"):
        raise NotAnAnswer("the reply holds an error", reply["error"])
    if kind == "embeddings":
        _check_vectors(reply)
        return reply
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices:
        raise NotAnAnswer("the reply has no choices")
    name, wanted = ("message", dict) if kind == "chat" else ("text", str)
    for choice in choices:
        if not isinstance(choice, dict):
            raise NotAnAnswer("a choice of the reply is not an object")
        if choice.get("error"):
            raise NotAnAnswer("a choice of the reply holds an error", choice["error"])
        if not isinstance(choice.get(name), wanted):
            raise NotAnAnswer("a choice of the reply has no message")
    return reply


def _check_vectors(reply: dict[str, Any]) -> None:
    """Raises NotAnAnswer unless the reply holds vectors, as numbers or in base64."""
    data = reply.get("data")
    if not isinstance(data, list) or not data:
        raise NotAnAnswer("the reply has no data")
    for entry in data:
        vector = entry.get("embedding") if isinstance(entry, dict) else None
        if not isinstance(vector, str | list) or not vector:
            raise NotAnAnswer("an entry of the reply has no embedding")


def unpacked(body: bytes, encoding: bytes | None) -> bytes:
    """The body without its content encoding. Raises NotAnAnswer."""
    if encoding in (None, b"", b"identity"):
        return body
    if encoding not in (b"gzip", b"deflate"):
        raise NotAnAnswer("the reply has an encoding that nobody asked for")
    try:
        inflater = zlib.decompressobj(47)
        plain = inflater.decompress(body, MAX_UNPACKED_BYTES)
    except zlib.error as error:
        raise NotAnAnswer("the reply's compression is broken") from error
    if not inflater.eof:
        raise NotAnAnswer("the reply's compression is broken, or it is too large")
    return plain
