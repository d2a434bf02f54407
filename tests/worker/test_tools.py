"""Tool calls: whatever the model is and however it draws, they parse; history reaches templates."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tandem_worker.server.worker import Worker

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 8},
                "unit": {"enum": ["C", "F"]},
                "days": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
            },
            "required": ["city", "unit"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "now"}}
CALLING = ("hermes", "hermes_spelled", "llama3_json", "mistral", "mistral_tekken")
USER = {"role": "user", "content": "hello"}
DEEP: dict[str, Any] = {}
for _ in range(600):
    DEEP = {"properties": DEEP}


async def ask(worker: Worker, *, headers: dict[str, str] | None = None, **body: Any) -> Any:
    async with httpx.AsyncClient(base_url=worker.url, timeout=60) as client:
        return await client.post(
            "/v1/chat/completions",
            json={"messages": [USER], "max_tokens": 120, "seed": 0, "tools": [WEATHER, TIME]}
            | body,
            headers={"x-tandem-token-ids": "1", "x-request-id": "r"} | (headers or {}),
        )


async def choice(worker: Worker, **options: Any) -> dict[str, Any]:
    reply = await ask(worker, **options)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()["choices"][0]
    return found


async def streamed(worker: Worker, **body: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The message that the deltas add up to, and the chunks."""
    reply = await ask(worker, stream=True, **body)
    assert reply.status_code == 200, reply.text
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    message: dict[str, Any] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            delta = part["delta"]
            for name in ("content", "reasoning_content"):
                if delta.get(name):
                    message[name] = message.get(name, "") + delta[name]
            for call in delta.get("tool_calls", []):
                calls = message.setdefault("tool_calls", {})
                if "id" in call:
                    assert call["index"] not in calls
                    assert call["function"]["arguments"] == ""
                    calls[call["index"]] = {**call, "function": dict(call["function"])}
                elif call["index"] in calls:
                    assert call["function"].keys() == {"arguments"}
                    known = calls[call["index"]]["function"]
                    known["arguments"] += call["function"]["arguments"]
    if "tool_calls" in message:
        calls = message["tool_calls"].values()
        message["tool_calls"] = [
            {name: value for name, value in call.items() if name != "index"} for call in calls
        ]
    return message, chunks


def check(answer: dict[str, Any]) -> list[str]:
    """The names called; every call that is whole has the declared arguments."""
    calls = answer["message"].get("tool_calls", [])
    if answer["finish_reason"] == "length":
        calls = calls[:-1]
    for call in calls:
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "now":
            assert arguments == {}
        else:
            assert call["function"]["name"] == "get_weather"
            assert arguments.keys() <= {"city", "unit", "days"}
            assert arguments["unit"] in ("C", "F")
    return [call["function"]["name"] for call in calls]


@pytest.mark.parametrize("name", CALLING)
async def test_a_required_call_parses_whole_and_streamed(
    start_worker: Any, family: Callable[[str], Path], name: str
) -> None:
    worker = await start_worker(weights=family(name))
    assert worker.capabilities()["tools"]

    answers = await asyncio.gather(
        *(choice(worker, tool_choice="required", seed=seed) for seed in range(3))
    )
    again, _ = await streamed(worker, tool_choice="required", seed=1)

    for answer in answers:
        named = check(answer)
        if answer["finish_reason"] != "length":
            assert named
            assert answer["finish_reason"] == "tool_calls"
            assert answer["message"]["content"] is None
    whole = answers[1]["message"]
    assert again["tool_calls"] == whole["tool_calls"]


@pytest.mark.parametrize(
    ("name", "begins"), [("mistral", '[TOOL_CALLS] [{"'), ("mistral_tekken", '[TOOL_CALLS][{"')]
)
async def test_a_call_begins_with_the_space_that_the_template_shows(
    start_worker: Any, family: Callable[[str], Path], name: str, begins: str
) -> None:
    """As history has it, so as the model was trained: another beginning is other tokens."""
    worker = await start_worker(weights=family(name))

    reply = await ask(worker, tool_choice="required", stream=True)

    chunks = [json.loads(line[6:]) for line in reply.text.split("\n\n") if "{" in line]
    ids = [i for c in chunks for choice in c["choices"] for i in choice.get("token_ids", [])]
    assert worker.tokenizer.decode(ids, skip_special_tokens=False).startswith(begins)


@pytest.mark.parametrize("name", CALLING)
async def test_with_auto_an_answer_is_text_or_calls_that_parse(
    start_worker: Any, family: Callable[[str], Path], name: str
) -> None:
    worker = await start_worker(weights=family(name))
    marker = {"hermes": "<tool_call>"}.get(name)
    if name.startswith("mistral"):
        marker = "[TOOL_CALLS]"
    bias = {}
    if marker is not None:
        bias = {"logit_bias": {worker.tokenizer.added_token_id(marker): 12}}
    elif name == "llama3_json":
        bias = {"logit_bias": {worker.tokenizer.encode("{")[0]: 12}}

    answers = await asyncio.gather(
        *(choice(worker, seed=seed, max_tokens=80, **bias) for seed in range(3))
    )

    called = [check(answer) for answer in answers]
    for answer, names in zip(answers, called, strict=True):
        if answer["finish_reason"] == "stop":
            assert not names
        text = answer["message"]["content"] or ""
        assert "<tool_call>" not in text
        assert "[TOOL_CALLS]" not in text
    if bias:
        assert any(called)


async def test_a_named_tool_is_called_once(
    start_worker: Any, family: Callable[[str], Path]
) -> None:
    worker = await start_worker(weights=family("hermes"))
    named = {"type": "function", "function": {"name": "now"}}

    answer = await choice(worker, tool_choice=named)

    assert check(answer) == ["now"]
    assert answer["finish_reason"] == "stop"  # as OpenAI says it of a named one


async def test_parallel_calls_can_be_forbidden(
    start_worker: Any, family: Callable[[str], Path]
) -> None:
    worker = await start_worker(weights=family("hermes"))
    newline = worker.tokenizer.encode("\n")[0]
    again = {"tool_choice": "required", "tools": [TIME], "logit_bias": {newline: 50}}

    many = await choice(worker, max_tokens=100, **again)
    one = await choice(worker, parallel_tool_calls=False, **again)

    assert len(many["message"]["tool_calls"]) > 1
    ids = [call["id"] for call in many["message"]["tool_calls"]]
    assert len(set(ids)) == len(ids)
    assert check(one) == ["now"]


async def test_without_a_choice_of_tools_nothing_is_called(
    start_worker: Any, family: Callable[[str], Path]
) -> None:
    worker = await start_worker(weights=family("hermes"))

    answer = await choice(worker, tool_choice="none", max_tokens=20)

    assert "tool_calls" not in answer["message"]


async def test_a_format_and_tools_give_one_or_the_other(
    start_worker: Any, family: Callable[[str], Path]
) -> None:
    worker = await start_worker(weights=family("hermes"))
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema | {
        "required": ["a"], "additionalProperties": False}}}  # fmt: skip
    call, think = map(worker.tokenizer.added_token_id, ("<tool_call>", "<think>"))

    text = await choice(worker, response_format=form, logit_bias={call: -100, think: -100})
    called = await choice(worker, response_format=form, logit_bias={call: 100, think: -100})

    assert text["finish_reason"] == "stop", text
    assert json.loads(text["message"]["content"]).keys() == {"a"}
    assert check(called)


async def test_a_call_goes_on_elsewhere_where_it_was(
    start_worker: Any, family: Callable[[str], Path]
) -> None:
    worker = await start_worker(weights=family("hermes"))
    asked = {"tool_choice": "required", "seed": 5}
    whole = await choice(worker, **asked)

    _, chunks = await streamed(worker, **asked)
    parts = [part for chunk in chunks for part in chunk["choices"]]

    for cut in range(1, len(parts), 20):
        sent = [token for part in parts[:cut] for token in part["token_ids"]]
        _, rest = await streamed(worker, tandem={"resume_token_ids": [sent]}, **asked)
        again = await choice(worker, tandem={"resume_token_ids": [sent]}, **asked)

        assert again == whole
        assert [part for chunk in rest for part in chunk["choices"]] == parts[cut:]


async def test_calls_survive_preemption_and_a_prefill_elsewhere(
    start_worker: Any, family: Callable[[str], Path]
) -> None:
    weights = family("hermes")
    tight = await start_worker(
        weights=weights, num_kv_blocks=32, max_num_seqs=4, prefix_cache=False
    )
    prefill = await start_worker("prefill", weights=weights)
    decode = await start_worker("decode", weights=weights)
    asked = {"tool_choice": "required"}

    answers = await asyncio.gather(*(choice(tight, seed=seed, **asked) for seed in range(4)))
    there = await choice(decode, seed=1, headers={"x-tandem-prefill": prefill.url}, **asked)

    for answer in answers:
        check(answer)
    assert there["token_ids"] == answers[1]["token_ids"]
    assert there["message"] == answers[1]["message"]
    text = decode.metrics.render().decode()
    assert 'tandem_worker_remote_prefills_total{model_name="tiny"} 1.0' in text


@pytest.mark.parametrize("name", CALLING)
async def test_history_with_results_reaches_the_template_as_transformers_renders_it(
    start_worker: Any, family: Callable[[str], Path], name: str
) -> None:
    import transformers

    worker = await start_worker(weights=family(name))
    call_id = "call_0a1b2c3d4e5f" if not name.startswith("mistral") else "abcdEFG12"
    arguments = {"city": "Köln", "unit": "C"}
    called = {"name": "get_weather", "arguments": json.dumps(arguments)}
    calls = [{"id": call_id, "type": "function", "function": called}]
    result = [{"type": "text", "text": '{"t":'}, {"type": "text", "text": "3}"}]
    history = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": call_id, "content": result},
    ]
    as_objects = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": call_id, "type": "function", "function": called | {"arguments": arguments}}]},
        {"role": "tool", "tool_call_id": call_id, "content": '{"t":\n3}'},
    ]  # fmt: skip

    async with httpx.AsyncClient(base_url=worker.url) as client:
        reply = await client.post("/tokenize", json={"messages": history, "tools": [WEATHER, TIME]})

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(family(name))
    expected = tokenizer.apply_chat_template(
        as_objects, tools=[WEATHER, TIME], add_generation_prompt=True, tokenize=False
    )
    assert worker.tokenizer.decode(reply.json()["tokens"], skip_special_tokens=False) == expected


async def test_ids_of_another_tiers_calls_pass_a_template_that_wants_its_own(
    start_worker: Any, family: Callable[[str], Path]
) -> None:
    worker = await start_worker(weights=family("mistral"))
    called = {"id": "call_of_another", "function": {"name": "now", "arguments": ""}}
    history = [
        USER,
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_of_another", "content": "12"},
    ]

    answer = await choice(worker, messages=history, tool_choice="required")

    check(answer)
    assert all(len(call["id"]) == 9 for call in answer["message"]["tool_calls"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0]="),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name='a b' must be 1 to"),
        ({"tools": [TIME, TIME]}, "must have different names"),
        ({"tools": [TIME] * 129}, "at most 128"),
        ({"tools": [{"function": {"name": "f", "parameters": {"type": "array"}}}]}, "an object"),
        ({"messages": [USER | {"x": DEEP}]}, "nested 200 deep"),
        ({"messages": [USER | {"x": DEEP}], "parse_special_tokens": True}, "nested 200 deep"),
        ({"tools": [{"function": {"name": "f", "parameters": DEEP}}]}, "nested 200 deep"),
        ({"tool_choice": "maybe"}, "tool_choice='maybe' must be 'none'"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "none of the tools"),
        ({"tools": [], "tool_choice": "required"}, "needs tools to choose from"),
        ({"ignore_eos": True}, "could break the answer's format"),
        ({"guided_regex": "a"}, "tools beside a format need response_format"),
        (
            {"tools": [{"function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
            "the answer's format cannot be used",
        ),
    ],
)
async def test_tools_that_cannot_be_had_are_refused(
    start_worker: Any, family: Callable[[str], Path], body: dict[str, Any], said: str
) -> None:
    worker = await start_worker(weights=family("hermes"))

    reply = await ask(worker, **body)

    assert reply.status_code == 400, reply.text
    assert said in reply.json()["error"]["message"]


async def test_schemas_that_cannot_be_held_are_left_to_the_model_unless_strict(
    start_worker: Any, family: Callable[[str], Path]
) -> None:
    worker = await start_worker(weights=family("hermes"))
    odd = {
        "type": "object",
        "properties": {"a": {"type": "array", "uniqueItems": True, "maxItems": 1}},
    }
    heavy = {"properties": {"a": {"allOf": [{"pattern": f"a.*{i}.*b"} for i in range(25)]}}}

    for parameters in (odd, heavy):
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        answer = await choice(worker, tools=[tool], tool_choice="required", temperature=0.3)
        for call in answer["message"]["tool_calls"]:
            if answer["finish_reason"] != "length":
                assert isinstance(json.loads(call["function"]["arguments"]), dict)


async def test_a_model_whose_template_shows_no_tools_says_so(start_worker: Any) -> None:
    worker = await start_worker()

    reply = await ask(worker)

    assert not worker.capabilities()["tools"]
    assert reply.status_code == 400
    assert "chat template shows no tools" in reply.json()["error"]["message"]
    assert (await ask(worker, tool_choice="none", max_tokens=2)).status_code == 200
