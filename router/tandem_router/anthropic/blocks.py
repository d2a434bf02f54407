"""The content blocks of a streamed message: one open at a time, closed before the next begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem_router.openai.said import calls_of, text_of
from tandem_router.openai.sse import encode_event


def event(name: str, **fields: Any) -> bytes:
    return f"event: {name}\n".encode() + encode_event({"type": name, **fields})


class BlockWriter:
    """Turns chat deltas into events; a tool call is one block, whatever its pieces."""

    def __init__(self) -> None:
        self._num_blocks = 0
        self._open: tuple[str, Any] | None = None  # kind, and which tool call

    def delta(self, delta: Mapping[str, Any]) -> bytes:
        events = b""
        if thought := text_of(delta, "reasoning_content", "reasoning"):
            events += self._at("thinking", None, {"type": "thinking", "thinking": ""})
            events += self._add({"type": "thinking_delta", "thinking": thought})
        if text := text_of(delta, "content"):
            events += self._at("text", None, {"type": "text", "text": ""})
            events += self._add({"type": "text_delta", "text": text})
        for call in calls_of(delta):
            block: dict[str, Any] = {
                "type": "tool_use",
                "id": call.call_id,
                "name": call.name,
                "input": {},
            }
            events += self._at("tool_use", call.number, block)
            if call.arguments:
                events += self._add({"type": "input_json_delta", "partial_json": call.arguments})
        return events

    def close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return event("content_block_stop", index=self._num_blocks - 1)

    def _at(self, kind: str, which: Any, block: dict[str, Any]) -> bytes:
        """Events that make this the open block."""
        if self._open == (kind, which):
            return b""
        events = self.close()
        self._open = (kind, which)
        self._num_blocks += 1
        index = self._num_blocks - 1
        return events + event("content_block_start", index=index, content_block=block)

    def _add(self, delta: dict[str, Any]) -> bytes:
        return event("content_block_delta", index=self._num_blocks - 1, delta=delta)
