"""A streamed tool call that loses its worker: the router's journal and another worker's rest."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from family_kit import save_family
from tandem_router.openai.sse import split_events
from tandem_router.proxy.resume import StreamJournal
from tandem_worker.config import WorkerConfig
from worker_kit import Served

BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hello"}],
    "tools": [{"type": "function", "function": {"name": "now"}}],
    "tool_choice": "required",
    "thinking_token_budget": 4,
    "max_tokens": 60,
    "stream": True,
}
HEADERS = {"x-tandem-token-ids": "1", "x-request-id": "r", "x-tandem-seed": "3"}
HEADERS |= {"x-tandem-created": "1"}


@pytest.fixture
async def url(tmp_path: Path) -> AsyncIterator[str]:
    weights = save_family(tmp_path / "model", "hermes")
    config = WorkerConfig.parse({"served_model": "tiny", "num_kv_blocks": 64})
    served = await Served.start(config, weights)
    yield served.worker.url
    await served.stop()


async def stream(url: str, **more: Any) -> bytes:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        reply = await client.post("/v1/chat/completions", json=BODY | more, headers=HEADERS)
    assert reply.status_code == 200, reply.text
    return reply.content


def deltas(events: bytes) -> list[Any]:
    payloads = [event.removeprefix(b"data: ").strip() for event in split_events(events)]
    chunks = [json.loads(payload) for payload in payloads if payload.startswith(b"{")]
    return [chunk["choices"] for chunk in chunks]


async def test_a_call_and_its_thought_go_on_wherever_the_stream_broke(url: str) -> None:
    whole = await stream(url)
    events = list(split_events(whole))

    for cut in range(1, len(events) - 1, 6):
        journal = StreamJournal()
        sent = b"".join(events[:cut])
        journal.forwarded(sent)
        (choice,) = journal.sent(1)
        journal.resume("nothing")
        rest = await stream(url, tandem={"resume_token_ids": [list(choice.token_ids)]})

        assert deltas(sent + journal.without_repeats(rest)) == deltas(whole)
