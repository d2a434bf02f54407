"""A fake OpenAI-compatible provider, questions that it can answer, and what a command left."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem_router.testing.fake_server import FakeServer, Seen, plain_reply


@dataclass(frozen=True)
class Reply:
    """What the provider answers: a text as a chat completion, or any status and body."""

    text: str = ""
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    tokens: tuple[int, int] | None = (10, 5)
    finish: str = "stop"
    logprobs: tuple[float, ...] | None = None


Respond = Callable[[dict[str, Any]], Reply]


def question(body: dict[str, Any]) -> str:
    """The text of the last message of a request."""
    return str(body["messages"][-1]["content"])


class Provider(FakeServer):
    """Listens on 127.0.0.1; `requests` are the bodies that it was sent.

    `respond` maps a request to a reply; it may be exchanged at any time. GET answers `state`.
    """

    respond: Respond
    state: dict[str, Any] | None = None
    peer_token: str | None = None

    @property
    def api(self) -> str:
        return f"{self.url}/v1"

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [seen.json for seen in self.seen if seen.body]

    def prompts_to(self, model: str) -> list[str]:
        return [question(body) for body in self.requests if body["model"] == model]

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        if not seen.body:
            status = 200 if self.state is not None else 404
            if self.peer_token and seen.headers.get("authorization") != f"bearer {self.peer_token}":
                status = 401
            return await plain_reply(writer, status, {}, json.dumps(self.state).encode())
        reply = self.respond(seen.json)
        if reply.delay_s:
            await asyncio.sleep(reply.delay_s)
        data = reply.body if reply.body is not None else completion(reply, seen.json["model"])
        return await plain_reply(writer, reply.status, reply.headers, data)


def completion(reply: Reply, model: str) -> bytes:
    value: dict[str, Any] = {
        "object": "chat.completion",
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": reply.text},
                "finish_reason": reply.finish,
            }
        ],
    }
    if reply.logprobs is not None:
        told = [{"token": "x", "logprob": value} for value in reply.logprobs]
        value["choices"][0]["logprobs"] = {"content": told}
    if reply.tokens is not None:
        value["usage"] = {
            "prompt_tokens": reply.tokens[0],
            "completion_tokens": reply.tokens[1],
        }
    return json.dumps(value).encode()


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def found(self) -> dict[str, Any]:
        return dict(json.loads(self.out))


Command = Callable[..., Ran]


def sums(count: int) -> list[dict[str, Any]]:
    """Questions with references: sums, their results."""
    return [{"prompt": f"What is {i} + {i}?", "reference": 2 * i} for i in range(count)]


def right(body: dict[str, Any]) -> Reply:
    """Every sum right."""
    words = question(body).split()
    return Reply(f"The answer is {int(words[2]) * 2}.")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The graded rows of a file."""
    content = path.read_bytes()
    if path.name.endswith(".gz"):
        content = gzip.decompress(content)
    return [json.loads(line) for line in content.splitlines()]


def small_errs(body: dict[str, Any]) -> Reply:
    """The small tier is right on even sums only, and shorter; the large one on all."""
    number = int(question(body).split()[2])
    wrong = body["model"] == "s" and number % 2
    return Reply(str(2 * number + bool(wrong)), tokens=(10, 5 if body["model"] == "s" else 9))
