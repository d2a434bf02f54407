"""A worker without a model: the same tokens for the same prompt and seed, resumable, breakable."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from tandem_router.testing.fake_server import (
    FakeServer,
    Seen,
    begin_stream,
    embedded,
    plain_reply,
)

PIECES = ["Hello", " wor", "ld", ", ", "", "日本", "\n\n", '"data": ', "[DONE]", " é", "!", " 42"]


def token_text(token_id: int) -> str:
    """Text of one token; an empty piece stands for half a character that is held back."""
    return PIECES[token_id % len(PIECES)]


def too_long(num_tokens: int, limit: int) -> dict[str, Any]:
    """As a worker says it."""
    message = (
        f"This model's maximum context length is {limit} tokens. However, the prompt has "
        f"{num_tokens} tokens and the answer may have 1; shorten either."
    )
    code = "context_length_exceeded"
    return {"message": message, "type": "invalid_request_error", "param": "messages", "code": code}


@dataclass(eq=False)
class FakeWorker(FakeServer):
    """Answers like a worker: deterministic in (prompt, seed), resumable, and breakable.

    cut_after: bytes of the next streamed bodies after which the connection is reset, one entry
    per request; None leaves that request alone. refuse: (status, headers, body) instead of an
    answer, one per request.
    """

    num_tokens: int = 8
    served_model: str = "model"
    cut_after: list[int | None] = field(default_factory=list)
    refuse: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    ready: bool = True
    draining: bool = False
    # Bytes of the next stream after which the worker answers nobody any more.
    freeze_after: int | None = None
    frozen: asyncio.Event = field(default_factory=asyncio.Event)
    mute: bool = False  # it reports its load and answers nobody
    revision: str = ""
    token_ids_in_chunks: bool = True
    pause_s: float = 0.0
    write_size: int | None = None
    token_statistics: dict[str, float] | None = None  # told of whole replies where asked for
    capabilities: dict[str, Any] | None = None  # as its load report says
    context_length: int | None = None  # bytes of a body that are refused beyond it
    detokenized: str | None = None  # the text of every prompt of token ids

    # -- the model ---------------------------------------------------------------------------

    def tokens(self, body: dict[str, Any], seed: str, index: int) -> list[int]:
        prompt = json.dumps(body.get("messages", body.get("prompt")), sort_keys=True)
        digest = hashlib.sha256(f"{prompt}/{seed}/{index}".encode()).digest()
        limit = body.get("max_tokens") or self.num_tokens
        return [3 + digest[i % 32] % 97 for i in range(min(limit, self.num_tokens))]

    def events(self, seen: Seen) -> list[bytes]:
        body = seen.json
        chat = seen.path == "/v1/chat/completions"
        seed = str(body.get("seed", seen.headers.get("x-tandem-seed")))
        num_choices = body.get("n", 1)
        resume = body.get("tandem", {}).get("resume_token_ids") or [[]] * num_choices
        events: list[bytes] = []
        num_generated = 0

        def chunk(choices: list[dict[str, Any]], **extra: Any) -> None:
            payload = {
                "id": ("chatcmpl-" if chat else "cmpl-") + seen.headers["x-request-id"],
                "object": "chat.completion.chunk" if chat else "text_completion",
                "created": int(seen.headers["x-tandem-created"]),
                "model": seen.headers["x-tandem-model"],
                "choices": choices,
                **extra,
            }
            events.append(b"data: " + json.dumps(payload).encode() + b"\n\n")

        def choice(
            index: int, text: str, ids: list[int], finish: str | None, role: bool = False
        ) -> dict[str, Any]:
            entry: dict[str, Any] = {"index": index, "finish_reason": finish}
            if chat:
                entry["delta"] = {"role": "assistant", "content": ""} if role else {"content": text}
            else:
                entry["text"] = text
            if seen.headers.get("x-tandem-token-ids") == "1" and self.token_ids_in_chunks:
                entry["token_ids"] = ids
            return entry

        queues = []
        for index in range(num_choices):
            tokens = self.tokens(body, seed, index)
            done = resume[index]
            assert tokens[: len(done)] == done, "resumed with other tokens than were generated"
            if chat and not done:
                chunk([choice(index, "", [], None, role=True)])
            num_generated += len(tokens)
            queues.append((index, tokens, len(done)))
        for position in range(self.num_tokens):
            for index, tokens, start in queues:
                if start <= position < len(tokens):
                    chunk([choice(index, token_text(tokens[position]), [tokens[position]], None)])
        for index, _, _ in queues:
            chunk([choice(index, "", [], "length")])
        if seen.headers.get("x-tandem-usage") == "1" or (body.get("stream_options") or {}).get(
            "include_usage"
        ):
            usage = {"prompt_tokens": 5, "completion_tokens": num_generated}
            chunk([], usage={**usage, "total_tokens": 5 + num_generated})
        events.append(b"data: [DONE]\n\n")
        return events

    def whole(self, seen: Seen) -> bytes:
        body = seen.json
        seed = str(body.get("seed", seen.headers.get("x-tandem-seed")))
        choices: list[dict[str, Any]] = []
        total = 0
        for index in range(body.get("n", 1)):
            tokens = self.tokens(body, seed, index)
            total += len(tokens)
            text = "".join(map(token_text, tokens))
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
            if seen.path == "/v1/completions":
                said = {"text": text}
            choices.append({"index": index, "finish_reason": "stop", **said})
        usage = {"prompt_tokens": 5, "completion_tokens": total, "total_tokens": 5 + total}
        model = seen.headers.get("x-tandem-model")
        reply: dict[str, Any] = {"model": model, "choices": choices, "usage": usage}
        if seen.headers.get("x-tandem-token-statistics") == "1":
            reply["tandem"] = {"token_statistics": self.token_statistics}
        return json.dumps(reply).encode()

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        if self.frozen.is_set():
            await asyncio.Event().wait()
        if seen.path == "/v1/load":
            load: dict[str, Any] = {
                "ready": self.ready,
                "draining": self.draining,
                "num_running": 0,
                "revision": self.revision,
            }
            if self.capabilities is not None:
                load["capabilities"] = self.capabilities
            return await plain_reply(writer, 200, {}, json.dumps(load).encode())
        if self.mute:
            await asyncio.Event().wait()
        if self.refuse:
            return await plain_reply(writer, *self.refuse.pop(0))
        size = len(seen.body)
        if self.context_length is not None and size > self.context_length:
            said = json.dumps({"error": too_long(size, self.context_length)}).encode()
            return await plain_reply(writer, 400, {}, said)
        cut = self.cut_after.pop(0) if self.cut_after else None
        if seen.path == "/detokenize" and self.detokenized is not None:
            said = json.dumps({"prompt": self.detokenized}).encode()
            return await plain_reply(writer, 200, {}, said)
        if seen.path in ("/tokenize", "/detokenize"):
            return await plain_reply(writer, 200, {}, b'{"tokens": [1, 2], "count": 2}')
        if seen.path == "/v1/embeddings":
            said = json.dumps(embedded(seen.json)).encode()
            return await plain_reply(writer, 200, {}, said)
        if not seen.json.get("stream"):
            body = self.whole(seen)
            if cut is not None:
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body))
                writer.write(body[:cut])
                await writer.drain()
                return False
            return await plain_reply(writer, 200, {}, body)
        await begin_stream(writer)
        data = b"".join(self.events(seen))
        sent = data if cut is None else data[:cut]
        if self.freeze_after is not None:
            writer.write(b"%x\r\n%b\r\n" % (self.freeze_after, data[: self.freeze_after]))
            await writer.drain()
            self.frozen.set()
            await asyncio.Event().wait()
        size = self.write_size or len(sent) or 1
        for start in range(0, len(sent), size):
            part = sent[start : start + size]
            writer.write(b"%x\r\n%b\r\n" % (len(part), part))
            if self.pause_s:
                await writer.drain()
                await asyncio.sleep(self.pause_s)
        if cut is not None:
            await writer.drain()
            return False
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True
