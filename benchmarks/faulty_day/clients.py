"""Who asks, by every API, and what came back: text, how it ended, and whether it may be shown."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from faulty_day.schedule import TIERS

APIS = ("chat", "chat", "chat", "completions", "responses", "messages")
PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
LEAVE_AFTER = 3  # pieces that a client who leaves has read


@dataclass
class Asked:
    """One request and what its client saw of the answer."""

    number: int
    api: str
    stream: bool
    model: str  # the router's name, or a tier that is forced
    max_tokens: int | None
    leaves: bool
    num_fillers: int
    started: float = 0.0
    ended: float = 0.0
    status: int = 0
    request_id: str = ""
    tier: str = ""
    told_usd: float = 0.0
    pieces: list[str] = field(default_factory=list)
    complete: bool = False  # it ended as an answer does
    error: dict[str, Any] | None = None
    raw: bytearray = field(default_factory=bytearray)  # all that was sent, headers too
    broke: str = ""  # the connection, by the router: never right

    @property
    def mark(self) -> str:
        return f"q{self.number}"

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def body(self) -> dict[str, Any]:
        """Long questions are the harder ones to a predictor by length."""
        text = f"{'word ' * self.num_fillers}<<{self.mark}>>"
        body: dict[str, Any] = {"model": self.model, "stream": self.stream}
        bound = {"chat": "max_tokens", "completions": "max_tokens", "messages": "max_tokens"}
        if self.max_tokens is not None:
            body[bound.get(self.api, "max_output_tokens")] = self.max_tokens
        if self.api == "completions":
            return {**body, "prompt": text}
        if self.api == "responses":
            return {**body, "input": text}
        return {**body, "messages": [{"role": "user", "content": text}]}


def drawn(rng: random.Random, number: int, router: str) -> Asked:
    """The next request of the day."""
    api = rng.choice(APIS)
    bounds = (8, 200) if api == "messages" else (None, None, 8, 200)
    stream = rng.random() < 0.55
    return Asked(
        number,
        api,
        stream,
        rng.choice(TIERS) if rng.random() < 0.1 else router,
        rng.choice(bounds),
        stream and rng.random() < 0.06,
        rng.choice((0, 10, 40, 80, 200)),
    )


async def ask(client: httpx.AsyncClient, asked: Asked, key: str) -> None:
    """Fill in what came of it."""
    asked.started = time.monotonic()
    headers = {"authorization": f"Bearer {key}"}
    try:
        async with client.stream(
            "POST", PATHS[asked.api], json=asked.body(), headers=headers
        ) as reply:
            asked.status = reply.status_code
            asked.request_id = reply.headers.get("x-request-id", "")
            asked.tier = reply.headers.get("x-tandem-tier", "")
            asked.told_usd = float(reply.headers.get("x-tandem-cost-usd", 0.0))
            asked.raw += repr(reply.headers.raw).encode()
            if reply.status_code == 200 and asked.stream:
                await _read_stream(reply, asked)
            else:
                body = await reply.aread()
                asked.raw += body
                _read_whole(json.loads(body), asked)
    except (httpx.HTTPError, ValueError) as error:
        asked.broke = f"{type(error).__name__}: {error}"
    asked.ended = time.monotonic()


def _read_whole(reply: dict[str, Any], asked: Asked) -> None:
    if asked.status != 200:
        asked.error = reply["error"]
        return
    if asked.api == "chat":
        asked.pieces.append(reply["choices"][0]["message"]["content"])
    elif asked.api == "completions":
        asked.pieces.append(reply["choices"][0]["text"])
    elif asked.api == "messages":
        asked.pieces += [each["text"] for each in reply["content"]]
    else:
        asked.pieces += [part["text"] for each in reply["output"] for part in each["content"]]
    asked.complete = True


async def _read_stream(reply: httpx.Response, asked: Asked) -> None:
    rest = b""
    async for data in reply.aiter_raw():
        asked.raw += data
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            _read_event(event, asked)
        if asked.leaves and len(asked.pieces) >= LEAVE_AFTER:
            return
    if rest:
        raise ValueError(f"half an event at the end: {rest[:80]!r}")


def _read_event(event: bytes, asked: Asked) -> None:
    lines = [line[5:].lstrip() for line in event.split(b"\n") if line.startswith(b"data:")]
    if not lines:
        return
    if asked.complete:
        raise ValueError(f"an event after the end: {event[:80]!r}")
    if lines[0] == b"[DONE]":
        asked.complete = True
        return
    payload = json.loads(b"\n".join(lines))
    kind = payload.get("type")
    if payload.get("error") or kind in ("error", "response.failed"):
        asked.error = payload.get("error") or payload
        return
    if asked.api == "messages":
        if kind == "content_block_delta":
            asked.pieces.append(payload["delta"]["text"])
        asked.complete = kind == "message_stop"
    elif asked.api == "responses":
        if kind == "response.output_text.delta":
            asked.pieces.append(payload["delta"])
        asked.complete = kind in ("response.completed", "response.incomplete")
    else:
        for choice in payload["choices"]:
            said = choice["delta"].get("content") if asked.api == "chat" else choice.get("text")
            if said:
                asked.pieces.append(said)
