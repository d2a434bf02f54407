"""Whatever a provider's JSON holds where something else belongs, no API ends in the router's fault.

A valid reply with parts of it replaced at random goes through every API, whole and streamed, with
the cache on: what comes back is an answer, or a sentence that blames the tier.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem_router.testing.fake_provider import FakeProvider
from tandem_router.testing.fake_server import Seen, begin_stream, plain_reply, write_chunk
from tandem_router.testing.two_tiers import TIERS

JSON = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 7, 1e99, "", "x", "stop", [], {}, [None], [1], ["x"], [[]], {"a": {}}]),
)
CALL = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 5,
    "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 2},
    "completion_tokens_details": {"reasoning_tokens": 1},
}
LOGPROBS = {"content": [{"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": []}]}
FRAME = {"id": "1", "object": "o", "created": 5, "model": "m", "error": None}
STREAM: list[dict[str, Any]] = [
    {**FRAME, "choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]},
    {**FRAME, "choices": [{"index": 0, "delta": {"content": "The"}, "logprobs": LOGPROBS}]},
    {**FRAME, "choices": [{"index": 0, "delta": {"content": " end"}, "text": " end"}]},
    {**FRAME, "choices": [{"index": 0, "delta": {"tool_calls": [CALL]}}]},
    {**FRAME, "choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}]},
    {**FRAME, "choices": [], "usage": USAGE},
]
SAID = {"role": "assistant", "content": "The end", "refusal": None, "tool_calls": [CALL]}
WHOLE: dict[str, Any] = {
    **FRAME,
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": LOGPROBS,
            "message": SAID,
            "text": "The end",
        }
    ],
    "usage": USAGE,
}
QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ("/v1/completions", {"prompt": "hi"}),
    ("/v1/responses", {"input": "hi"}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}),
]


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value may be replaced."""
    found = [at] if at else []
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(inner, (*at, key))
    return found


def with_replaced(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy with one place replaced, if it is still there."""
    if not at:
        return new
    if isinstance(value, dict) and at[0] in value:
        return {**value, at[0]: with_replaced(value[at[0]], at[1:], new)}
    if isinstance(value, list) and isinstance(at[0], int) and at[0] < len(value):
        return [*value[: at[0]], with_replaced(value[at[0]], at[1:], new), *value[at[0] + 1 :]]
    return value


def mangled(value: Any) -> st.SearchStrategy[Any]:
    changes = st.lists(st.tuples(st.sampled_from(places(value)), JSON), min_size=1, max_size=3)

    def replaced(made: list[tuple[tuple[Any, ...], Any]]) -> Any:
        now = value
        for at, new in made:
            now = with_replaced(now, at, new)
        return now

    return changes.map(replaced)


@dataclass(eq=False)
class Mangling(FakeProvider):
    """Says what it is given, whole or as a stream."""

    reply: Any = None
    chunks: list[Any] = field(default_factory=list)

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        if not seen.json.get("stream"):
            return await plain_reply(writer, 200, {}, json.dumps(self.reply).encode())
        await begin_stream(writer)
        for chunk in self.chunks:
            await write_chunk(writer, b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await write_chunk(writer, b"data: [DONE]\n\n")
        await write_chunk(writer, b"")
        return True


async def asked(run_router: Any, reply: Any, chunks: list[Any]) -> list[tuple[str, Any]]:
    """What every API answers, whole and streamed; nothing is in flight or held after it."""
    provider = Mangling(reply=reply, chunks=chunks)
    await provider.start()
    tiers = [{**TIERS[1], "kind": "external", "url": f"{provider.url}/v1"}]
    replies = []
    try:
        async with run_router(
            {},
            tiers=tiers,
            background=False,
            cache={"enabled": True},
            failover={"wait_s": 5.0, "min_retries": 0, "retry_share": 0.0},
        ) as (client, app):
            for stream in (False, True):
                for path, body in QUESTIONS:
                    fields = {"model": "chat", "stream": stream, "temperature": 0, **body}
                    replies.append((path, await client.request("POST", path, fields)))
            records = app.services.decisions.last(100)
            assert app.services.ledger.num_inflight == 0
    finally:
        await provider.stop()
    for record in records:
        assert record["cost_usd"] is not None
        assert record["status"] != 500, record
    return replies


def check(replies: list[tuple[str, Any]]) -> None:
    for path, reply in replies:
        assert reply.status in (200, 502), (path, reply.body)
        assert b"internal_error" not in reply.body, (path, reply.body)
        assert b"failed on this request" not in reply.body, (path, reply.body)
        assert b"Traceback" not in reply.body


@given(mangled(WHOLE), mangled(STREAM))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_mangled_reply_is_an_answer_or_the_tiers_fault(
    run_router: Any, reply: Any, chunks: Any
) -> None:
    chunks = chunks if isinstance(chunks, list) else [chunks]
    check(asyncio.run(asked(run_router, reply, chunks)))


@pytest.mark.parametrize("usage", ["many", [1], 7, True, {"prompt_tokens": "5"}, {}])
async def test_senseless_usage_is_nobodys_fault(run_router: Any, usage: Any) -> None:
    """With `"error": null` in every chunk, as some providers send."""
    chunks = [*STREAM[:-1], {**STREAM[-1], "usage": usage}]

    replies = await asked(run_router, {**WHOLE, "usage": usage}, chunks)

    check(replies)
    assert {reply.status for _, reply in replies} == {200}
    assert all(b"The" in reply.body for _, reply in replies)
    assert not [path for path, reply in replies if b"event: error" in reply.body]
