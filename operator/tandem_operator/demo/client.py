"""Asks questions over the OpenAI-compatible endpoint and times every answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from .suite import Question, check


class AskError(Exception):
    """The endpoint answered a question with an error; the message holds its own words."""


@dataclass(frozen=True)
class Answer:
    """One answered question as a client saw it.

    ``ttft_s`` runs from sending the request to the first text, ``tpot_s`` is the mean time per
    further output token (None where there was only one).
    """

    question: Question
    text: str
    right: bool
    tier: str
    reason: str
    gain: float | None
    ttft_s: float
    tpot_s: float | None
    output_tokens: int
    cost_usd: float

    @property
    def stated(self) -> str:
        """The answer without the worked steps before it."""
        return self.text.rpartition(">")[2].strip()


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


async def ask(
    client: httpx.AsyncClient, model: str, question: Question, max_tokens: int = 160
) -> Answer:
    """Stream one greedy answer from ``model`` (a Router's name routes, a tier's name forces it).

    Raises:
        AskError: the endpoint refused the request or broke the stream off.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question.prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = time.perf_counter()
    first = last = None
    pieces: list[str] = []
    usage: dict[str, Any] = {}
    billed: float | None = None
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            detail = (await response.aread()).decode(errors="replace")
            raise AskError(f"{model} answered {response.status_code}: {detail[:300]}")
        async for event in _events(response):
            if "error" in event:
                raise AskError(f"{model} broke off: {event['error'].get('message', event)}")
            for choice in event.get("choices", []):
                text = choice.get("delta", {}).get("content")
                if text:
                    last = time.perf_counter()
                    first = first or last
                    pieces.append(text)
            usage = event.get("usage") or usage
            billed = (event.get("tandem") or {}).get("cost_usd", billed)
    ended = time.perf_counter()
    first, last = first or ended, last or ended
    text = "".join(pieces)
    tokens = int(usage.get("completion_tokens", len(pieces)))
    cost = billed if billed is not None else _number(response.headers.get("x-tandem-cost-usd"))
    return Answer(
        question=question,
        text=text,
        right=check(question, text),
        tier=response.headers.get("x-tandem-tier", "?"),
        reason=response.headers.get("x-tandem-reason", ""),
        gain=_number(response.headers.get("x-tandem-gain")),
        ttft_s=first - began,
        tpot_s=(last - first) / (tokens - 1) if tokens > 1 else None,
        output_tokens=tokens,
        cost_usd=float(cost or 0.0),
    )


async def ask_all(
    client: httpx.AsyncClient,
    model: str,
    questions: Sequence[Question],
    concurrency: int,
    on_answer: Callable[[Answer], None],
) -> list[Answer]:
    """Every question once, ``concurrency`` at a time; answers come back in the questions' order."""
    gate = asyncio.Semaphore(concurrency)

    async def one(question: Question) -> Answer:
        async with gate:
            answer = await ask(client, model, question)
        on_answer(answer)
        return answer

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(question)) for question in questions]
    return [task.result() for task in tasks]
