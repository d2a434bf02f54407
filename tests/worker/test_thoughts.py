"""Thoughts: told apart from answers, bounded exactly, wherever and in whatever pieces they come."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tandem_worker.dialects.formats import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, THINK, CallFormat
from tandem_worker.dialects.reader import AnswerReader, Opening, opening
from tandem_worker.server.worker import Worker

USER = {"role": "user", "content": "hello"}


async def choice(
    worker: Worker, *, headers: dict[str, str] | None = None, **body: Any
) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=worker.url, timeout=60) as client:
        reply = await client.post(
            "/v1/chat/completions",
            json={"messages": [USER], "max_tokens": 40, "seed": 3} | body,
            headers={"x-tandem-token-ids": "1", "x-request-id": "r"} | (headers or {}),
        )
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()["choices"][0]
    return found | {"usage": reply.json()["usage"]}


# -- reading ---------------------------------------------------------------------------------------


def read(text: str, cuts: list[int], **settings_: Any) -> tuple[str, str, list[tuple[str, str]]]:
    """Content, thought and calls of a text that comes in pieces."""
    reader = AnswerReader(**settings_)
    content, thought, calls = "", "", []
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    for begin, end in zip(places, [*places[1:], len(text)], strict=True):
        parts = reader.push(text[begin:end], last=end == len(text))
        content += parts.content
        thought += parts.thought
        for piece in parts.calls:
            if piece.name is not None:
                calls.append([piece.name, ""])
            calls[piece.index][1] += piece.arguments
        if end == len(text):
            break
    return content, thought, [(name, arguments) for name, arguments in calls]


WORDS = st.text(alphabet="ab <>\n{}[]\"'/_", max_size=12).filter(
    lambda text: "<" not in text and "[T" not in text and not text.lstrip().startswith("{")
)
ARGUMENTS = st.sampled_from(
    ["{}", '{"a": "}\\"</tool_call>"}', '{"a": {"b": [1, "]"]}}', '{"q": "[TOOL_CALLS]"}']
)


@settings(max_examples=150, deadline=None)
@given(
    thought=st.none() | WORDS,
    text=WORDS,
    calls=st.lists(st.tuples(st.sampled_from(["f", "g.h"]), ARGUMENTS), max_size=3),
    form=st.sampled_from([HERMES, MISTRAL, MISTRAL_ARGS, LLAMA3]),
    cuts=st.lists(st.integers(0, 400), max_size=12),
)
def test_any_pieces_of_an_answer_say_the_same(
    thought: str | None,
    text: str,
    calls: list[tuple[str, str]],
    form: CallFormat,
    cuts: list[int],
) -> None:
    if not form.marker:
        calls = calls[:1] if not text.strip() else []
    written = form.separator.join(
        form.before_name + name + form.between + arguments + form.after for name, arguments in calls
    )
    answer = text + (form.begin + written + form.end if calls else "")
    if thought is not None:
        answer = f"<think>\n{thought}\n</think>\n\n{answer}"

    content, thoughts, called = read(answer, cuts, calls=form, thought=THINK, opening=Opening.MAYBE)

    assert called == calls
    assert thoughts == (thought or "").strip()
    expected = text.lstrip("\n") if thought is not None else text
    if calls or (not form.marker and not text.strip()):
        assert content.rstrip() == expected.rstrip()
        assert not calls or content == content.rstrip()
    else:
        assert content == expected


def test_an_answer_that_is_cut_within_a_call_keeps_what_there_is() -> None:
    text = 'Hm <tool_call>\n{"name": "f", "arguments": {"a": 1'

    assert read(text, [], calls=HERMES) == ("Hm", "", [("f", '{"a": 1')])
    assert read(text[:24], [], calls=HERMES) == ("Hm", "", [])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|Assistant|><think>\n", Opening.OPEN),
        ("<think>\n\n</think>\n\n", Opening.CLOSED),
        ("assistant\n", Opening.MAYBE),
    ],
)
def test_the_prompts_end_says_whether_a_thought_is_open(prompt: str, expected: Opening) -> None:
    assert opening(prompt, THINK) is expected
    assert opening(prompt, None) is Opening.CLOSED


# -- over HTTP -------------------------------------------------------------------------------------


async def test_a_thought_ends_after_exactly_its_budget(
    start_worker: Any, family: Callable[[str], Path]
) -> None:
    worker = await start_worker(weights=family("deepseek"))
    end = worker.tokenizer.added_token_id("</think>")
    never = {"logit_bias": {end: -100}}

    bounded = await choice(worker, thinking_token_budget=9, **never)
    none = await choice(worker, reasoning_effort="none", **never)
    free = await choice(worker, **never)
    hidden = await choice(worker, thinking_token_budget=9, include_reasoning=False, **never)

    assert bounded["token_ids"].index(end) == 9
    assert bounded["message"]["reasoning_content"]
    assert "think" not in bounded["message"]["content"]
    assert bounded["usage"]["completion_tokens_details"] == {"reasoning_tokens": 9}
    assert none["token_ids"][0] == end
    assert "reasoning_content" not in none["message"]
    assert end not in free["token_ids"]
    assert free["message"]["content"] == ""
    assert free["finish_reason"] == "length"
    assert "reasoning_content" not in hidden["message"]
    assert hidden["message"]["content"] == bounded["message"]["content"]


async def test_a_budget_holds_after_a_move_and_with_a_prefill_elsewhere(
    start_worker: Any, family: Callable[[str], Path]
) -> None:
    weights = family("deepseek")
    prefill = await start_worker("prefill", weights=weights)
    decode = await start_worker("decode", weights=weights)
    end = decode.tokenizer.added_token_id("</think>")
    asked = {"thinking_token_budget": 6, "logit_bias": {end: -100}}
    asked |= {"response_format": {"type": "json_object"}}
    there = {"x-tandem-prefill": prefill.url}

    whole = await choice(decode, **asked)

    assert whole["token_ids"].index(end) == 6
    assert whole["message"]["content"].startswith("{")
    for cut in (0, 3, 6, 7, 12):
        resumed = {"tandem": {"resume_token_ids": [whole["token_ids"][:cut]]}}
        again = await choice(decode, headers=there, **asked, **resumed)
        assert again["token_ids"] == whole["token_ids"]
        assert again["message"] == whole["message"]
    none = await choice(decode, headers=there, **asked | {"thinking_token_budget": 0})
    assert none["token_ids"][0] == end


async def test_a_thought_streams_apart_from_the_answer_and_may_precede_a_call(
    start_worker: Any, family: Callable[[str], Path]
) -> None:
    worker = await start_worker(weights=family("hermes"))
    begin, end = map(worker.tokenizer.added_token_id, ("<think>", "</think>"))
    tool = {"type": "function", "function": {"name": "now"}}
    asked: dict[str, Any] = {
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "thinking_token_budget": 5,
        "logit_bias": {begin: 100, end: -100},
        "max_tokens": 100,
    }

    whole = await choice(worker, **asked)
    async with httpx.AsyncClient(base_url=worker.url, timeout=60) as client:
        reply = await client.post(
            "/v1/chat/completions",
            json={"messages": [USER], "seed": 3, "stream": True} | asked,
            headers={"x-request-id": "r"},
        )

    deltas = [
        json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
        for line in reply.text.split("\n\n")[:-2]
    ]
    message = whole["message"]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == message["reasoning_content"]
    assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    assert not any("think" in (d.get("content") or "") for d in deltas)
    assert whole["token_ids"].index(end) == 6  # <think> and five more
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 5}


async def test_effort_none_tells_the_template_and_nothing_is_thought(
    start_worker: Any, family: Callable[[str], Path]
) -> None:
    worker = await start_worker(weights=family("hermes"))
    begin = worker.tokenizer.added_token_id("<think>")

    answer = await choice(worker, reasoning_effort="none", logit_bias={begin: 100}, max_tokens=5)
    plain = await choice(await start_worker(), reasoning_effort="low", max_tokens=5)

    assert "reasoning_content" not in answer["message"]
    assert plain["message"]["content"]  # a model that does not think keeps every limit
