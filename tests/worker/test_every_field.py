"""Whatever a request's body or headers may hold at a worker has its effect, or is refused by name.

For every declared field of a body and every header of the contract two requests that differ in it
alone are sent to a running worker, and what can be seen of them must differ.
"""

from __future__ import annotations

import re
import shutil
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from doors_kit import missing_tests
from eventually import eventually
from tandem_worker.openai.body import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tandem_worker.openai.embeddings import EmbeddingsBody
from tandem_worker.server.worker import Worker

CONTRACT = Path(__file__).resolve().parents[2] / "docs" / "contract.md"
ABSENT = object()
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "look"}}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
END, OPENS = 1, 0  # the model's end token and its first special one
THINKING = {"logit_bias": {"<think>": 100}, "max_tokens": 20}


@dataclass(frozen=True)
class Row:
    """Two values of a field; given: other fields of both bodies; refused: the second is."""

    a: Any
    b: Any
    given: Mapping[str, Any] = field(default_factory=dict)
    refused: bool = False


SALTED = [4] * 150
_GENERATION = {
    "temperature": Row(0.0, 2.0),
    "top_p": Row(0.01, 1.0, {"temperature": 2.0}),
    "top_k": Row(1, 0, {"temperature": 2.0}),
    "min_p": Row(0.0, 1.0, {"temperature": 2.0}),
    "presence_penalty": Row(-2.0, 2.0, {"max_tokens": 20}),
    "frequency_penalty": Row(-2.0, 2.0, {"max_tokens": 20}),
    "repetition_penalty": Row(0.1, 10.0, {"max_tokens": 20}),
    "min_tokens": Row(0, 3, {"logit_bias": {str(END): 100}}),
    "stop_token_ids": Row([], [300], {"logit_bias": {"300": 100}}),
    "ignore_eos": Row(False, True, {"logit_bias": {str(END): 100}}),
    "model": Row("tiny", "another", refused=True),
    "n": Row(1, 2),
    "best_of": Row(1, 2, refused=True),
    "stop": Row([], ["e", "a", "o"], {"max_tokens": 40}),
    "include_stop_str_in_output": Row(False, True, {"stop": ["e", "a", "o"], "max_tokens": 40}),
    "logit_bias": Row({}, {"300": 100}),
    "seed": Row(1, 2, {"temperature": 2.0}),
    "stream": Row(False, True),
    "stream_options": Row({}, {"include_usage": True}, {"stream": True}),
    "response_format": Row({}, {"type": "json_object"}),
    "structured_outputs": Row({}, {"json": SCHEMA}),
    "guided_json": Row(ABSENT, SCHEMA),
    "guided_regex": Row(ABSENT, "[0-9]{3}"),
    "guided_choice": Row(ABSENT, ["yes", "no"]),
    "guided_grammar": Row(ABSENT, 'start: "yes" | "no"'),
    "skip_special_tokens": Row(True, False, {"logit_bias": {str(OPENS): 100}}),
    "tandem": Row({}, {"resume_token_ids": [[300, 301]]}, {"stream": True}),
}
_OF_TEXT = {
    "add_special_tokens": Row(False, True),
    "parse_special_tokens": Row(False, True),
}
ROWS: dict[type[BaseModel], dict[str, Row]] = {
    CompletionBody: {
        **_GENERATION,
        **_OF_TEXT,
        "cache_salt": Row("a", "b", {"prompt": SALTED}),
        "parse_special_tokens": Row(False, True, {"prompt": "</s>hello"}),
        "prompt": Row("hello", "goodbye"),
        "max_tokens": Row(2, 4),
        "logprobs": Row(ABSENT, 2),
        "echo": Row(False, True),
    },
    ChatBody: {
        **_GENERATION,
        "cache_salt": Row("a", "b", {"messages": [{"role": "user", "content": "hello " * 80}]}),
        "parse_special_tokens": Row(
            False, True, {"messages": [{"role": "user", "content": "</s>hello"}]}
        ),
        "messages": Row([{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]),
        "max_tokens": Row(2, 4),
        "max_completion_tokens": Row(2, 4),
        "logprobs": Row(False, True),
        "top_logprobs": Row(0, 2, {"logprobs": True}),
        "add_generation_prompt": Row(True, False),
        "chat_template_kwargs": Row({}, {"enable_thinking": False}),
        "tools": Row([], [TOOL], {"max_tokens": 40}),
        "tool_choice": Row("none", NAMED, {"tools": [TOOL], "max_tokens": 40}),
        "parallel_tool_calls": Row(
            True, False, {"tools": [TOOL], "tool_choice": "required", "max_tokens": 120}
        ),
        "reasoning_effort": Row("none", "high"),
        "thinking_token_budget": Row(0, 4, THINKING),
        "include_reasoning": Row(True, False, {"thinking_token_budget": 4, **THINKING}),
    },
    EmbeddingsBody: {
        **_OF_TEXT,
        "parse_special_tokens": Row(False, True, {"input": "</s>hello"}),
        "input": Row("hello", "goodbye"),
        "model": Row("tiny", "another", refused=True),
        "encoding_format": Row("float", "base64"),
        "dimensions": Row(64, 32, refused=True),
        "pooling": Row("last", "mean"),
        "cache_salt": Row("a", "b", {"input": SALTED}),
    },
    TokenizeBody: {
        **_OF_TEXT,
        "prompt": Row("hello", "goodbye"),
        "parse_special_tokens": Row(False, True, {"prompt": "</s>hello"}),
    },
    DetokenizeBody: {"tokens": Row([300], [301])},
}
SENT: dict[type[BaseModel], tuple[str, dict[str, Any]]] = {
    CompletionBody: (
        "/v1/completions",
        {"prompt": "the quick brown fox", "temperature": 0, "max_tokens": 8, "seed": 7},
    ),
    ChatBody: (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "hello"}],
            "temperature": 0,
            "max_tokens": 8,
            "seed": 7,
        },
    ),
    EmbeddingsBody: ("/v1/embeddings", {"input": "hello there"}),
    TokenizeBody: ("/tokenize", {"prompt": "hello"}),
    DetokenizeBody: ("/detokenize", {"tokens": [300]}),
}
FIXED = {"x-request-id": "one", "x-tandem-created": "1"}
PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Nothing is encrypted here, and httpx would read all authorities of the machine each time."""


async def seen(worker: Worker, path: str, body: dict[str, Any], **headers: str) -> tuple[int, str]:
    """Status and reply, the same for the same request, with what was found in the cache."""
    before = worker.engine.load.num_prefix_hits
    async with httpx.AsyncClient(base_url=worker.url, timeout=60, verify=PLAIN) as client:
        reply = await client.post(path, json=body, headers=FIXED | headers)
    return reply.status_code, f"{worker.engine.load.num_prefix_hits - before} {reply.text}"


def body_of(
    worker: Worker, asked: type[BaseModel], name: str, row: Row, value: Any
) -> dict[str, Any]:
    body = {**SENT[asked][1], **row.given, name: value}
    if body.get("logit_bias") == THINKING["logit_bias"]:
        body["logit_bias"] = {str(worker.tokenizer.added_token_id("<think>")): 100}
    return {name: value for name, value in body.items() if value is not ABSENT}


def without_a_row(asked: type[BaseModel]) -> list[str]:
    """Fields that nobody shows, and rows of fields that do not exist."""
    return sorted(asked.model_fields.keys() ^ ROWS[asked].keys())


async def alike(worker: Worker, asked: type[BaseModel], name: str, row: Row) -> str | None:
    """Why a field's effect is not shown; None where the two requests can be told apart."""
    path = SENT[asked][0]
    first, second = (body_of(worker, asked, name, row, value) for value in (row.a, row.b))
    if name == "cache_salt":  # told by what of a prompt that was asked before is in the cache
        await seen(worker, path, first)
    one, other = await seen(worker, path, first), await seen(worker, path, second)
    wanted = (200, 400 if name != "model" else 404) if row.refused else (200, 200)
    if (one[0], other[0]) != wanted:
        return f"{path} {name}: {one[0]} and {other[0]}, not {wanted}: {one[1]} {other[1]}"
    if row.refused and name not in other[1]:
        return f"{path} {name}: refused without its name: {other[1]}"
    if one[1] == other[1]:
        return f"{path} {name}: nothing shows which of its values it has: {one[1][:200]}"
    return None


@pytest.fixture
async def worker(start_worker: Any, family: Any, tmp_path: Path) -> Worker:
    weights = shutil.copytree(family("hermes"), tmp_path / "model")
    file = weights / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", OPENS)]
    )
    tokenizer.save(str(file))
    made: Worker = await start_worker(weights=weights)
    return made


@pytest.mark.parametrize("asked", ROWS, ids=lambda asked: asked.__name__)
async def test_two_bodies_that_differ_in_a_field_are_answered_differently(
    worker: Worker, asked: type[BaseModel]
) -> None:
    assert without_a_row(asked) == []
    found = [await alike(worker, asked, name, row) for name, row in ROWS[asked].items()]

    assert "\n".join(problem[:400] for problem in found if problem) == ""


async def test_a_field_of_a_body_that_is_wired_to_nothing_is_found(worker: Worker) -> None:
    class Planted(CompletionBody):
        wired_to_nothing: int = 1

    ROWS[Planted], SENT[Planted] = ROWS[CompletionBody], SENT[CompletionBody]
    try:
        assert without_a_row(Planted) == ["wired_to_nothing"]
        problem = await alike(worker, Planted, "wired_to_nothing", Row(1, 2))
    finally:
        del ROWS[Planted], SENT[Planted]

    assert "nothing shows which of its values it has" in (problem or "")


# Headers of the contract --------------------------------------------------------------------------

See = Callable[[Worker, dict[str, str]], Awaitable[Any]]
LONG = {"prompt": "hello", "max_tokens": 400, "ignore_eos": True, "stream": True}
TOKEN = b"of all peers"


async def answered(worker: Worker, headers: dict[str, str], **body: Any) -> Any:
    path, base = SENT[CompletionBody]
    return await seen(worker, path, {**base, **body}, **headers)


async def drawn(worker: Worker, headers: dict[str, str]) -> Any:
    return await answered(worker, headers, temperature=2.0, seed=None)


async def streamed(worker: Worker, headers: dict[str, str]) -> Any:
    return await answered(worker, headers, stream=True)


async def scheduled(worker: Worker, headers: dict[str, str]) -> Any:
    """How the scheduler has a request that runs: where it stands, and what it may hold."""
    await eventually(lambda: worker.engine.load.is_idle)
    async with (
        httpx.AsyncClient(base_url=worker.url, timeout=60, verify=PLAIN) as client,
        client.stream("POST", "/v1/completions", json=LONG, headers=FIXED | headers) as reply,
    ):
        assert reply.status_code == 200
        await anext(reply.aiter_lines())  # it runs
        return await worker.engine.call(
            lambda core: [
                (s.priority, s.deadline_s and s.deadline_s - s.arrival_s, s.tenant)
                + (s.predicted_output_tokens,)
                for s in core.scheduler.running
            ]
        )


HEADERS: dict[str, tuple[See, str | None, str] | str] = {
    "x-request-id": (answered, "one", "two"),
    "x-tandem-created": (answered, "1", "2"),
    "x-tandem-model": (answered, "small", "large"),
    "x-tandem-seed": (drawn, "1", "2"),
    "x-tandem-deadline-ms": (scheduled, "1000", "2000"),
    "x-tandem-priority": (scheduled, "1", "-1"),
    "x-tandem-tenant": (scheduled, "a", "b"),
    "x-tandem-expected-tokens": (scheduled, "10", "20"),
    "x-tandem-token-ids": (streamed, None, "1"),
    "x-tandem-usage": (streamed, None, "1"),
    "x-tandem-token-statistics": (answered, None, "1"),
    "x-tandem-peer-token": (answered, "another", TOKEN.decode()),
    # What these do needs more than one process, or more than one request.
    "x-tandem-prefill": "tests/worker/test_split.py::"
    "test_greedy_over_the_split_is_that_of_transformers",
    "x-tandem-ticket": "tests/contract/test_tickets.py::"
    "test_a_ticket_opens_one_request_for_a_while_and_nothing_else",
    "traceparent": "tests/worker/test_tracing.py::"
    "test_a_peer_is_told_the_span_of_the_request_and_the_callers_trace",
    "tracestate": "tests/worker/test_tracing.py::"
    "test_a_peer_is_told_the_span_of_the_request_and_the_callers_trace",
}


def listed(contract: str) -> set[str]:
    """The headers in the contract's table."""
    rows = re.search(
        r"^\| header \| meaning \|\n\|---\|---\|\n((?:\|.*\n)+)", contract, re.MULTILINE
    )
    assert rows is not None
    first = [row.split("|")[1] for row in rows[1].splitlines()]
    return {name.partition(":")[0] for cell in first for name in re.findall(r"`([^`]+)`", cell)}


async def same_with(worker: Worker, name: str) -> bool:
    """Whether two requests that differ in this header cannot be told apart."""
    row = HEADERS[name]
    assert not isinstance(row, str)
    see, *values = row
    admitted = {"x-tandem-peer-token": TOKEN.decode()}
    one, other = [
        await see(worker, admitted | ({} if value is None else {name: value})) for value in values
    ]
    return bool(one == other)


async def test_two_requests_that_differ_in_a_header_of_the_contract_can_be_told_apart(
    start_worker: Any,
) -> None:
    worker = await start_worker(token=TOKEN)

    assert listed(CONTRACT.read_text(encoding="utf-8")) == HEADERS.keys()
    for name, row in HEADERS.items():
        if isinstance(row, str):
            assert missing_tests([row], name) == []
        else:
            assert not await same_with(worker, name), name


async def test_a_header_that_is_wired_to_nothing_is_found(
    start_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await start_worker(token=TOKEN)
    rule = "|---|---|\n"
    page = CONTRACT.read_text(encoding="utf-8")
    monkeypatch.setitem(HEADERS, "x-tandem-wired-to-nothing", (scheduled, "1", "2"))

    assert await same_with(worker, "x-tandem-wired-to-nothing")
    planted = page.replace(
        f"| header | meaning |\n{rule}", f"| header | meaning |\n{rule}| `x-planted` | |\n"
    )
    assert listed(planted) - listed(page) == {"x-planted"}
