"""`/v1/responses`: a request is answered as a chat request, and the reply re-dressed.

Only the envelope differs from chat completions, so routing, failover, budgets and the cache apply
as they are. The client's functions are tools of the chat; what would need state, or tools that run
in the router, is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from tandem_router.errors import bad_request
from tandem_router.openai.asgi import Send
from tandem_router.openai.body import LOGPROBS, InputItem, InputPart, NamedFunction, Response
from tandem_router.openai.declared import checked
from tandem_router.openai.response_items import OutputItems
from tandem_router.openai.said import choices_of, chunk_of, finish_of, part_of
from tandem_router.openai.sse import DONE, encode_event, encode_json, split_events
from tandem_router.openai.usage import read_usage

_PASSED_ON = ("temperature", "top_p", "seed", "user", "metadata", "stop", "top_k", "min_p")
_REFUSED = ("previous_response_id", "conversation", "background", "prompt")
_ROLES = {"developer": "system"}


def to_chat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The chat request that a responses request means. Raises ApiError (400)."""
    for name in _REFUSED:
        if fields.get(name):
            raise bad_request(f"`{name}` is not supported on /v1/responses here", name)
    said = checked(fields, Response)
    messages: list[dict[str, Any]] = []
    if said.instructions:
        messages.append({"role": "system", "content": said.instructions})
    if isinstance(said.input, str):
        messages.append({"role": "user", "content": said.input})
    else:
        messages += _messages(said.input)
        if not messages:
            raise bad_request(
                "`input` holds thoughts alone; send at least one message, call or result", "input"
            )
    chat: dict[str, Any] = {"model": said.model, "messages": messages}
    chat.update({name: fields[name] for name in _PASSED_ON if fields.get(name) is not None})
    chat.update(_tools(said))
    if said.max_output_tokens is not None:
        chat["max_completion_tokens"] = said.max_output_tokens
    if LOGPROBS in (said.include or ()) or said.top_logprobs:
        chat["logprobs"] = True
        if said.top_logprobs is not None:
            chat["top_logprobs"] = said.top_logprobs
    if said.stream is not None:
        chat["stream"] = said.stream
    if said.stream:
        chat["stream_options"] = {"include_usage": True}
    return chat


def _messages(items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """Messages, calls and their results in order; thoughts of earlier turns are not told on."""
    messages: list[dict[str, Any]] = []
    for at, item in enumerate(items):
        kind = item.type or "message"
        if kind == "message":
            role = _given(item.role, at, "role")
            content = _given(_text(item.content), at, "content")
            messages.append({"role": _ROLES.get(role, role), "content": content})
        elif kind == "function_call":
            function = {
                "name": _given(item.name, at, "name"),
                "arguments": _given(item.arguments, at, "arguments"),
            }
            call = {"id": _given(item.call_id, at, "call_id"), "type": "function"}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append({**call, "function": function})
        elif kind == "function_call_output":
            call_id = _given(item.call_id, at, "call_id")
            output = _given(_text(item.output), at, "output")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
    return messages


def _given(value: str | None, at: int, field: str) -> str:
    if value is None:
        raise bad_request(f"`input[{at}].{field}` is missing", "input")
    return value


def _text(content: str | Sequence[InputPart] | None) -> str | None:
    if content is None or isinstance(content, str):
        return content
    return "\n".join(part.text for part in content)


def _tools(said: Response) -> dict[str, Any]:
    if not said.tools:
        return {}
    tools = []
    for tool in said.tools:
        function: dict[str, Any] = {"name": tool.name, "parameters": tool.parameters or {}}
        if tool.description is not None:
            function["description"] = tool.description
        if tool.strict is not None:
            function["strict"] = tool.strict
        tools.append({"type": "function", "function": function})
    chat: dict[str, Any] = {"tools": tools}
    if isinstance(said.tool_choice, NamedFunction):
        chat["tool_choice"] = {"type": "function", "function": {"name": said.tool_choice.name}}
    elif said.tool_choice is not None:
        chat["tool_choice"] = said.tool_choice
    if said.parallel_tool_calls is not None:
        chat["parallel_tool_calls"] = said.parallel_tool_calls
    return chat


class ResponsesSend:
    """An ASGI `send` that takes chat replies and sends responses replies."""

    def __init__(self, send: Send, fields: Mapping[str, Any], request_id: str) -> None:
        self._send = send
        self._fields = fields
        self._id = request_id
        self._start: MutableMapping[str, Any] | None = None
        self._streaming = False
        self._sequence = 0
        self._items = OutputItems(request_id, self._event)
        self._model: str | None = None
        self._created = 0
        self._finish: str | None = None
        self._usage: Mapping[str, Any] | None = None

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            self._streaming = (b"content-type", b"text/event-stream; charset=utf-8") in message[
                "headers"
            ]
            if self._streaming:
                # A cached stream came with the length of its chat form.
                message["headers"] = _without_length(message["headers"])
                await self._send(message)
            return
        assert self._start is not None
        body = message.get("body", b"")
        if not self._streaming:
            if self._start["status"] == 200:
                body = self._whole(json.loads(body))
                headers = _without_length(self._start["headers"])
                headers.append((b"content-length", str(len(body)).encode()))
                self._start["headers"] = headers
            await self._send(self._start)
            await self._send({"type": "http.response.body", "body": body})
            return
        events = b"".join(self._converted(event) for event in split_events(body))
        more = bool(message.get("more_body", False))
        await self._send({"type": "http.response.body", "body": events, "more_body": more})

    def _whole(self, chat: Mapping[str, Any]) -> bytes:
        choice = choices_of(chat)[0]
        self._items.delta(part_of(choice, "message"), _logprobs(choice))
        self._finish = finish_of(choice)
        self._usage = chat.get("usage")
        self._model = chat.get("model")
        self._created = chat.get("created", 0)
        self._items.end(self._finish == "length")
        return encode_json(self._response())

    def _converted(self, event: bytes) -> bytes:
        if event == DONE:
            return self._last_events()
        chunk = chunk_of(event)
        if chunk is None:
            return b""
        if chunk.get("error"):
            error = part_of(chunk, "error")
            return self._event("error", code=error.get("code"), message=error.get("message"))
        events = b""
        if self._model is None:
            self._model = chunk.get("model")
            self._created = chunk.get("created", 0)
            events += self._first_events()
        self._usage = chunk.get("usage") or self._usage
        for choice in choices_of(chunk):
            self._finish = finish_of(choice) or self._finish
            events += self._items.delta(part_of(choice, "delta"), _logprobs(choice))
        return events

    def _first_events(self) -> bytes:
        response = self._response(status="in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def _last_events(self) -> bytes:
        events = self._items.end(self._finish == "length")
        done = self._response()
        return events + self._event(f"response.{done['status']}", response=done)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        payload = {"type": name, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return f"event: {name}\n".encode() + encode_event(payload)

    def _response(self, status: str | None = None) -> dict[str, Any]:
        cut, tools = self._finish == "length", self._fields.get("tools") or []
        usage = None
        if self._usage is not None and status is None:
            used = read_usage(self._usage, 0, 0)
            usage = {
                "input_tokens": used.prompt_tokens,
                "output_tokens": used.output_tokens,
                "total_tokens": used.prompt_tokens + used.output_tokens,
                "input_tokens_details": {"cached_tokens": used.cached_tokens},
                "output_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
            }
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._created,
            "status": status or ("incomplete" if cut else "completed"),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": self._fields.get("instructions"),
            "max_output_tokens": self._fields.get("max_output_tokens"),
            "model": self._model,
            "output": [] if status is not None else self._items.items,
            "parallel_tool_calls": bool(tools) and self._fields.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "store": False,
            "temperature": self._fields.get("temperature"),
            "text": {"format": {"type": "text"}},
            "tool_choice": self._fields.get("tool_choice") or ("auto" if tools else "none"),
            "tools": tools,
            "top_p": self._fields.get("top_p"),
            "truncation": "disabled",
            "usage": usage,
            "metadata": self._fields.get("metadata") or {},
        }


def _logprobs(choice: Mapping[str, Any]) -> list[Any]:
    said = choice.get("logprobs")
    content = said.get("content") if isinstance(said, dict) else None
    return content if isinstance(content, list) else []


def _without_length(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name != b"content-length"]
