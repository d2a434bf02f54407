"""A chat reply as a message of Anthropic's API: whole, as events of a stream, or as its error."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from typing import Any

from tandem_router.anthropic.blocks import BlockWriter, event
from tandem_router.openai.asgi import Send
from tandem_router.openai.said import calls_of, choices_of, chunk_of, finish_of, part_of, text_of
from tandem_router.openai.sse import DONE, encode_json, event_data, split_events
from tandem_router.openai.usage import read_usage

_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_STOPS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}


def error_of(status: int, body: bytes, request_id: str) -> bytes:
    """An OpenAI error object as Anthropic's."""
    more = {}
    try:
        said = json.loads(body)["error"]
        message = str(said["message"])
        more = {"doc_url": said["doc_url"]} if "doc_url" in said else {}
    except (ValueError, KeyError, TypeError):
        message = f"the request failed with status {status}"
    kind = _ERRORS.get(status, "invalid_request_error" if status < 500 else "api_error")
    error = {"type": kind, "message": message, **more}
    return encode_json({"type": "error", "error": error, "request_id": request_id})


class MessagesSend:
    """An ASGI `send` that takes chat replies and sends messages; others pass as they are."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._id = request_id
        self._start: MutableMapping[str, Any] | None = None
        self._streaming = False
        self._begun = False
        self._head: dict[str, Any] = {}
        self._blocks = BlockWriter()
        self._finish: str | None = None
        self._stopped_by: str | None = None
        self._usage: Mapping[str, Any] | None = None

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            kind = (b"content-type", b"text/event-stream; charset=utf-8")
            self._streaming = kind in message["headers"]
            message["headers"] = [
                *((name, value) for name, value in message["headers"] if name != b"content-length"),
                (b"request-id", self._id.encode()),
            ]
            if self._streaming:
                await self._send(message)
            return
        assert self._start is not None
        body, more = message.get("body", b""), bool(message.get("more_body", False))
        if self._streaming:
            events = b"".join(self._converted(each) for each in split_events(body))
            await self._send({"type": "http.response.body", "body": events, "more_body": more})
            return
        if self._start["status"] == 200:
            chat = json.loads(body)
            body = self._whole(chat) if "choices" in chat else body
        else:
            body = error_of(self._start["status"], body, self._id)
        self._start["headers"].append((b"content-length", str(len(body)).encode()))
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})

    # -- whole ------------------------------------------------------------------------------

    def _whole(self, chat: Mapping[str, Any]) -> bytes:
        choice = choices_of(chat)[0]
        said = part_of(choice, "message")
        content: list[dict[str, Any]] = []
        if thought := text_of(said, "reasoning_content", "reasoning"):
            content.append({"type": "thinking", "thinking": thought, "signature": ""})
        if text := text_of(said, "content"):
            content.append({"type": "text", "text": text})
        for call in calls_of(said):
            block = {"type": "tool_use", "id": call.call_id, "name": call.name}
            content.append({**block, "input": _object(call.arguments)})
        self._note(choice)
        message = self._message(chat, content)
        return encode_json({**message, **self._stop(), "usage": _usage(chat.get("usage"))})

    def _message(self, chat: Mapping[str, Any], content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._id}",
            "type": "message",
            "role": "assistant",
            "model": chat.get("model"),
            "content": content,
        }

    def _note(self, choice: Mapping[str, Any]) -> None:
        self._finish = finish_of(choice) or self._finish
        stopped_by = choice.get("stop_reason")
        self._stopped_by = stopped_by if isinstance(stopped_by, str) else self._stopped_by

    def _stop(self) -> dict[str, Any]:
        reason = _STOPS.get(self._finish or "stop", "end_turn")
        if self._finish == "stop" and self._stopped_by is not None:
            reason = "stop_sequence"
        sequence = self._stopped_by if reason == "stop_sequence" else None
        return {"stop_reason": reason, "stop_sequence": sequence}

    # -- streams ----------------------------------------------------------------------------

    def _converted(self, chunk_event: bytes) -> bytes:
        if chunk_event == DONE:
            return self._last_events()
        chunk = chunk_of(chunk_event)
        if chunk is None:
            return b""
        if chunk.get("error"):
            status = 400 if part_of(chunk, "error").get("type") == "invalid_request_error" else 500
            told = error_of(status, event_data(chunk_event), self._id)
            return b"event: error\ndata: " + told + b"\n\n"
        events = b""
        if not self._begun:
            self._begun = True
            head = {**self._message(chunk, []), "stop_reason": None, "stop_sequence": None}
            events = event("message_start", message={**head, "usage": _usage(None)})
        self._usage = chunk.get("usage") or self._usage
        for choice in choices_of(chunk):
            events += self._blocks.delta(part_of(choice, "delta"))
            self._note(choice)
        return events

    def _last_events(self) -> bytes:
        usage = _usage(self._usage)
        return (
            self._blocks.close()
            + event("message_delta", delta=self._stop(), usage=usage)
            + event("message_stop")
        )


def _usage(chat: Any) -> dict[str, int]:
    """Tokens read from the prefix cache are not counted among `input_tokens` there."""
    used = read_usage(chat, 0, 0)
    return {
        "input_tokens": used.prompt_tokens - used.cached_tokens,
        "output_tokens": used.output_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": used.cached_tokens,
    }


def _object(arguments: str) -> dict[str, Any]:
    """What a model wrote as a tool's input; {} where that is no object."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
