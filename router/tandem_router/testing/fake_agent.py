"""A provider whose model calls tools: what agents and other clients need to be met with.

The first answer to a request with tools is a call of the first tool, its arguments in pieces; once
the result is there it is repeated as text. A prompt beyond `context_length` characters is refused
as the commonest provider refuses it. Token ids get log-probabilities, as evaluations ask for them.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from tandem_router.testing.fake_provider import WORDS, FakeProvider
from tandem_router.testing.fake_server import Seen, begin_stream, embedded, plain_reply, write_chunk

ARGUMENTS = '{"a": 12, "b": 30}'


def too_long(num_tokens: int, limit: int) -> dict[str, Any]:
    """As OpenAI says it."""
    message = (
        f"This model's maximum context length is {limit} tokens. However, your messages resulted "
        f"in {num_tokens} tokens. Please reduce the length of the messages."
    )
    code = "context_length_exceeded"
    return {"message": message, "type": "invalid_request_error", "param": "messages", "code": code}


@dataclass(eq=False)
class FakeAgent(FakeProvider):
    """context_length: characters of the messages that are refused beyond it."""

    context_length: int = 20_000

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        body = seen.json if seen.body else {}
        if seen.path.endswith("/embeddings"):
            return await plain_reply(writer, 200, {}, json.dumps(embedded(body, 8)).encode())
        size = len(json.dumps(body.get("messages", body.get("prompt"))))
        if size > self.context_length:
            error = {"error": too_long(size, self.context_length)}
            return await plain_reply(writer, 400, {}, json.dumps(error).encode())
        if "messages" not in body:
            return await self._complete(body, writer)
        delta, finish = _said(body)
        if not body.get("stream"):
            message = {"role": "assistant", "content": None, **delta}
            choice = {"index": 0, "message": message, "finish_reason": finish}
            return await plain_reply(
                writer, 200, {}, json.dumps({**self.whole(seen), "choices": [choice]}).encode()
            )
        await begin_stream(writer)
        await write_chunk(writer, self.chunk({"role": "assistant", "content": ""}, model="m"))
        for piece in _pieces(delta):
            await write_chunk(writer, self.chunk(piece, model="m", object="chat.completion.chunk"))
        await write_chunk(writer, self.chunk({}, finish) + self.chunk(None, usage=self.usage()))
        await write_chunk(writer, b"data: [DONE]\n\n")
        await write_chunk(writer, b"")
        return True

    async def _complete(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """Completions; with `echo` the log-probability of each token of the prompt."""
        prompt = body["prompt"]
        many = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        choices = [
            _choice(index, each, body) for index, each in enumerate(prompt if many else [prompt])
        ]
        reply = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"]}
        usage = {**self.usage(), "prompt_tokens": len(prompt)}
        if body.get("stream"):
            await begin_stream(writer)
            for choice in choices:
                event = {**reply, "choices": [choice]}
                await write_chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")
            last = {**reply, "choices": [], "usage": usage}
            await write_chunk(writer, b"data: " + json.dumps(last).encode() + b"\n\n")
            await write_chunk(writer, b"data: [DONE]\n\n")
            await write_chunk(writer, b"")
            return True
        said = json.dumps({**reply, "choices": choices, "usage": usage}).encode()
        return await plain_reply(writer, 200, {}, said)


def _said(body: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(what the model says, why it ends)."""
    last = body["messages"][-1]
    if last.get("role") == "tool":
        return {"content": f"The result is {last['content']}."}, "stop"
    tools = body.get("tools")
    if not tools or body.get("tool_choice") == "none":
        return {"content": "".join(WORDS)}, "stop"
    name = tools[0]["function"]["name"]
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": name, "arguments": ARGUMENTS},
    }
    return {"tool_calls": [call]}, "tool_calls"


def _pieces(delta: dict[str, Any]) -> list[dict[str, Any]]:
    """A message as the deltas of a stream."""
    if "content" in delta:
        words = delta["content"].split(" ")
        return [{"content": word if not at else " " + word} for at, word in enumerate(words)]
    (call,) = delta["tool_calls"]
    function = call["function"]
    first = {**call, "index": 0, "function": {**function, "arguments": ""}}
    half = len(function["arguments"]) // 2
    parts = (function["arguments"][:half], function["arguments"][half:])
    rest = [{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in parts]
    return [{"tool_calls": [first]}, *rest]


def _choice(index: int, prompt: Any, body: dict[str, Any]) -> dict[str, Any]:
    """One completion; a token's log-probability is by its id, so that some choice is the best."""
    ids = prompt if isinstance(prompt, list) else [ord(letter) % 89 for letter in str(prompt)]
    text = "" if body.get("max_tokens") == 0 else " 42"
    tokens = [*(ids if body.get("echo") else ()), *([42] if text else ())]
    choice: dict[str, Any] = {"index": index, "text": text, "finish_reason": "stop"}
    if body.get("logprobs") is not None:
        named = [f"token_id:{token}" for token in tokens]
        values: list[float | None] = [-((token % 7) + 1) / 4 for token in tokens]
        tops: list[Any] = [{name: value} for name, value in zip(named, values, strict=True)]
        if body.get("echo") and values:
            values[0] = tops[0] = None
        choice["logprobs"] = {
            "tokens": named,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": [0] * len(tokens),
        }
    return choice
