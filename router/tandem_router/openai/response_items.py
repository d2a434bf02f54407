"""The output of `/v1/responses`: messages and calls of functions, whole or as events of a stream.

One item is open at a time; it is closed before the next one begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tandem_router.openai.said import calls_of, text_of


class OutputItems:
    """Builds the items of one response from the deltas of a chat.

    event: makes one event of a stream, of its name and fields.
    """

    def __init__(self, request_id: str, event: Callable[..., bytes]) -> None:
        self._id = request_id
        self._event = event
        self._open: tuple[str, Any] | None = None  # kind, and which call
        self.items: list[dict[str, Any]] = []

    def delta(self, delta: Mapping[str, Any], logprobs: list[Any]) -> bytes:
        """What one delta of the answer adds."""
        events = b""
        if text := text_of(delta, "content"):
            events += self._message()
            part = self.items[-1]["content"][0]
            part["text"] += text
            part["logprobs"] += logprobs
            events += self._event(
                "response.output_text.delta",
                **self._at(0),
                delta=text,
                logprobs=logprobs,
            )
        for call in calls_of(delta):
            events += self._call(call.number, call.call_id, call.name)
            if call.arguments:
                self.items[-1]["arguments"] += call.arguments
                events += self._event(
                    "response.function_call_arguments.delta", **self._at(), delta=call.arguments
                )
        return events

    def end(self, is_cut: bool) -> bytes:
        """Close what is open; an answer without a word is an empty message."""
        events = b"" if self.items else self._message()
        return events + self._close("incomplete" if is_cut else "completed")

    def _message(self) -> bytes:
        if self._open == ("message", None):
            return b""
        events = self._close()
        name = f"msg_{self._id}" if not self.items else f"msg_{self._id}_{len(self.items)}"
        part: dict[str, Any] = {"type": "output_text", "text": ""}
        part |= {"annotations": [], "logprobs": []}
        item: dict[str, Any] = {"id": name, "type": "message", "role": "assistant"}
        item |= {"status": "in_progress", "content": []}
        events += self._begin(("message", None), item)
        item["content"] = [part]
        return events + self._event("response.content_part.added", **self._at(0), part=part)

    def _call(self, which: Any, call_id: str | None, name: str | None) -> bytes:
        if self._open == ("function_call", which):
            return b""
        events = self._close()
        own = call_id or f"call_{self._id}_{len(self.items)}"
        item = {"id": f"fc_{self._id}_{len(self.items)}", "type": "function_call", "call_id": own}
        item |= {"name": name or "", "arguments": "", "status": "in_progress"}
        return events + self._begin(("function_call", which), item)

    def _begin(self, which: tuple[str, Any], item: dict[str, Any]) -> bytes:
        self._open = which
        self.items.append(item)
        return self._event(
            "response.output_item.added", output_index=len(self.items) - 1, item=item
        )

    def _close(self, status: str = "completed") -> bytes:
        if self._open is None:
            return b""
        item, self._open = self.items[-1], None
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            events = self._event(
                "response.output_text.done",
                **self._at(0),
                text=part["text"],
                logprobs=part["logprobs"],
            )
            events += self._event("response.content_part.done", **self._at(0), part=part)
        else:
            events = self._event(
                "response.function_call_arguments.done",
                **self._at(),
                name=item["name"],
                arguments=item["arguments"],
            )
        index = len(self.items) - 1
        return events + self._event("response.output_item.done", output_index=index, item=item)

    def _at(self, content_index: int | None = None) -> dict[str, Any]:
        at = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return at if content_index is None else {**at, "content_index": content_index}
