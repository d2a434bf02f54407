"""Asks a worker over HTTP, whole or streamed, and reads what it said."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx

from tandem_worker.server.worker import Worker

PROMPTS = [
    "the quick brown fox",
    "hello",
    "a router sends each question to a small or a large model " * 12,
    "你好世界 naïve café 🙂",
]
Greedy = Callable[[list[int], int], list[int]]


async def post(worker: Worker, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx.AsyncClient(base_url=worker.url, timeout=60) as client:
        return await client.post(path, json=body, headers=named)


async def stream(
    worker: Worker, path: str, body: dict[str, Any], **headers: str
) -> list[dict[str, Any]]:
    """The events of a streamed answer, [DONE] checked and removed."""
    named = {"x-tandem-token-ids": "1"} | {k.replace("_", "-"): v for k, v in headers.items()}
    events = []
    async with (
        httpx.AsyncClient(base_url=worker.url, timeout=60) as client,
        client.stream("POST", path, json=body | {"stream": True}, headers=named) as reply,
    ):
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def token_ids(events: list[dict[str, Any]], index: int = 0) -> list[int]:
    return [
        token
        for event in events
        for choice in event["choices"]
        if choice["index"] == index
        for token in choice["token_ids"]
    ]


def text_of(events: list[dict[str, Any]], index: int = 0) -> str:
    parts = []
    for event in events:
        for choice in event["choices"]:
            if choice["index"] == index:
                parts.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
    return "".join(parts)
