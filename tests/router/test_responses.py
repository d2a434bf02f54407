"""/v1/responses says the same as chat completions, in its own envelope."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tandem_router.balancing.worker import Load
from tandem_router.cache.response_cache import assemble
from tandem_router.openai.responses_api import ResponsesSend
from tandem_router.openai.sse import DONE, encode_event


async def ask(client: Any, **fields: Any) -> Any:
    body = {"model": "large", "input": "hello", "seed": 4, **fields}
    return await client.request("POST", "/v1/responses", body)


def events(reply: Any) -> list[dict[str, Any]]:
    found = []
    for event in reply.body.decode().split("\n\n")[:-1]:
        name, data = event.split("\n")
        payload = json.loads(data.removeprefix("data: "))
        assert name == f"event: {payload['type']}"
        found.append(payload)
    return found


async def test_a_response_holds_the_chat_answer_and_its_usage(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router({"large": {"decode": [await make_worker()]}}) as (client, _):
        chat = await client.chat(model="large", seed=4)
        reply = await ask(client)

    response = reply.json
    assert response["object"] == "response"
    assert response["status"] == "completed"
    assert (
        response["output"][0]["content"][0]["text"] == chat.json["choices"][0]["message"]["content"]
    )
    assert response["usage"]["output_tokens"] == 8
    assert reply.headers["x-tandem-tier"] == "large"
    assert int(reply.headers["content-length"]) == len(reply.body)


async def test_a_streamed_response_survives_its_worker_and_ends_complete(
    run_router: Any, make_worker: Any
) -> None:
    cuts = [None, 900]
    workers = [await make_worker(cut_after=cuts) for _ in range(2)]

    async with run_router({"large": {"decode": workers}}) as (client, app):
        whole = await ask(client)
        stream = events(await ask(client, stream=True))

    text = "".join(e["delta"] for e in stream if e["type"] == "response.output_text.delta")
    assert text == whole.json["output"][0]["content"][0]["text"]
    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    assert stream[0]["type"] == "response.created"
    assert stream[-1]["type"] in ("response.completed", "response.incomplete")
    assert stream[-1]["response"]["output"][0]["content"][0]["text"] == text
    assert stream[-1]["response"]["usage"]["output_tokens"] == 8
    assert app.services.decisions.last(1)[0]["num_failovers"] == 1


async def test_instructions_and_messages_become_chat_messages(
    run_router: Any, make_worker: Any
) -> None:
    worker = await make_worker()
    turns = [
        {"role": "developer", "content": "short"},
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    ]

    async with run_router({"large": {"decode": [worker]}}) as (client, _):
        await ask(client, instructions="be kind", input=turns, max_output_tokens=5)

    body = worker.inference[0].json
    assert body["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "system", "content": "short"},
        {"role": "user", "content": "hi"},
    ]
    assert body["max_completion_tokens"] == 5


async def test_a_response_that_is_not_streamed_may_say_so(
    run_router: Any, make_worker: Any
) -> None:
    """What clients send by default: `stream: false`, and what to include where there is any."""
    worker = await make_worker()

    async with run_router({"large": {"decode": [worker]}}) as (client, _):
        reply = await ask(client, stream=False, include=["reasoning.encrypted_content"])

    assert reply.json["status"] == "completed"
    assert "stream_options" not in worker.inference[0].json


async def test_log_probabilities_that_are_included_are_asked_for_and_given(
    run_router: Any, make_worker: Any
) -> None:
    worker = await make_worker()
    token = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    wanted = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    answer = {"index": 0, "message": {"content": "a"}, "logprobs": {"content": [token]}}
    chunk = {"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [token]}}
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async with run_router({"large": {"decode": [worker]}}) as (client, _):
        await ask(client, **wanted)
    whole, streamed = ResponsesSend(send, {}, "r"), ResponsesSend(send, {}, "r")
    await whole({"type": "http.response.start", "status": 200, "headers": []})
    await whole({"type": "http.response.body", "body": json.dumps({"choices": [answer]}).encode()})
    text = json.loads(sent[-1]["body"])["output"][0]["content"][0]
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await streamed({"type": "http.response.start", "status": 200, "headers": headers})
    await streamed(
        {"type": "http.response.body", "body": encode_event({"choices": [chunk]}) + DONE}
    )

    asked = worker.inference[0].json
    assert (asked["logprobs"], asked["top_logprobs"]) == (True, 2)
    assert text["logprobs"] == [token]
    last = json.loads(sent[-1]["body"].rpartition(b"data: ")[2])
    assert last["response"]["output"][0]["content"][0]["logprobs"] == [token]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input": None}, "`input`"),
        ({"input": []}, "`input`"),
        ({"input": [{"type": "web_search_call"}]}, "`input[0].type`"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "`input[0].arguments`"),
        ({"input": [{"type": "function_call_output", "output": "1"}]}, "`input[0].call_id`"),
        ({"input": [{"content": "hi"}]}, "`input[0].role`"),
        ({"input": [{"type": "reasoning"}]}, "`input` holds thoughts alone"),
        ({"tools": [{"type": "function"}]}, "`tools[0].name`"),
        ({"tool_choice": "sometimes"}, "`tool_choice`"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ({"tools": [{"type": "web_search"}]}, "`tools[0].type`"),
        ({"include": ["usage"]}, "`include[0]`"),
        ({"include": [{}]}, "`include[0]`"),
        ({"stream": "no"}, "`stream`"),
        ({"previous_response_id": "resp_1"}, "`previous_response_id`"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(
    run_router: Any, fields: dict[str, Any], said: str
) -> None:
    async with run_router({}) as (client, _):
        reply = await ask(client, **fields)

    assert reply.status == 400
    assert said in reply.error["message"]


async def test_an_emoji_that_a_server_sends_in_two_halves_arrives_whole_in_every_form() -> None:
    """In streams of /v1/responses and in what the cache keeps; JSON may escape half a pair."""
    halves = [
        {"choices": [{"index": 0, "delta": {"content": "\ud83d"}}], "model": "m", "created": 1},
        {"choices": [{"index": 0, "delta": {"content": "\ude00"}, "finish_reason": "stop"}]},
    ]
    stream = b"".join(map(encode_event, halves))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    kept = assemble(stream, "chat", {"prompt_tokens": 1})
    dressed = ResponsesSend(send, {}, "r")
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await dressed({"type": "http.response.start", "status": 200, "headers": headers})
    await dressed({"type": "http.response.body", "body": stream + DONE})

    assert kept is not None
    assert json.loads(kept)["choices"][0]["message"]["content"] == "\U0001f600"
    last = json.loads(sent[-1]["body"].rpartition(b"data: ")[2])
    assert last["response"]["output"][0]["content"][0]["text"] == "\U0001f600"


WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "of a place",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    "strict": True,
}


async def test_functions_calls_and_results_become_those_of_a_chat(
    run_router: Any, make_worker: Any
) -> None:
    worker = await make_worker(capabilities={"tools": True})
    able = Load.parse({"capabilities": {"tools": True}})
    said = [
        {"role": "user", "content": "How is it in Rome and Oslo?"},
        {"type": "reasoning", "summary": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "a", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "weather", "arguments": "[]"},
        {"type": "function_call_output", "call_id": "a", "output": "sun"},
        {
            "type": "function_call_output",
            "call_id": "b",
            "output": [{"type": "input_text", "text": "rain"}],
        },
    ]
    choice = {"type": "function", "name": "weather"}

    async with run_router({"large": {"decode": [worker]}}) as (client, app):
        for known in app.picker.workers:
            app.picker.observed(known, able)
        reply = await ask(
            client, input=said, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False
        )

    assert reply.status == 200
    body = worker.inference[0].json
    function = {key: WEATHER[key] for key in ("name", "description", "parameters", "strict")}
    assert body["tools"] == [{"type": "function", "function": function}]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert body["parallel_tool_calls"] is False
    calls = body["messages"][1]
    assert (calls["role"], calls["content"]) == ("assistant", "I look.")
    assert [call["id"] for call in calls["tool_calls"]] == ["a", "b"]
    assert calls["tool_calls"][1]["function"] == {"name": "weather", "arguments": "[]"}
    assert body["messages"][2:] == [
        {"role": "tool", "tool_call_id": "a", "content": "sun"},
        {"role": "tool", "tool_call_id": "b", "content": "rain"},
    ]
    assert reply.json["tools"] == [WEATHER]


async def test_a_body_with_tools_is_refused_where_no_tier_can(
    run_router: Any, make_worker: Any
) -> None:
    worker = await make_worker(capabilities={"tools": False})

    async with run_router({"large": {"decode": [worker]}}) as (client, _):
        reply = await ask(client, tools=[WEATHER])

    assert reply.status == 400
    assert "tools" in reply.error["message"]


async def test_calls_are_items_of_their_own_whole_and_streamed() -> None:
    """Text first, then two calls in pieces; both forms end with the same output."""
    calls = [
        {"index": 0, "id": "a", "function": {"name": "weather", "arguments": '{"pl'}},
        {"index": 0, "function": {"arguments": 'ace": "Rome"}'}},
        {"index": 1, "id": "b", "function": {"name": "time", "arguments": ""}},
        {"index": 1, "function": {"arguments": "{}"}},
    ]
    deltas: list[dict[str, Any]] = [{"content": "I "}, {"content": "look."}]
    deltas += [{"tool_calls": [call]} for call in calls]
    chunks = [{"choices": [{"index": 0, "delta": delta}], "model": "m"} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    whole_calls = [
        {"id": "a", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}},
        {"id": "b", "function": {"name": "time", "arguments": "{}"}},
    ]
    message = {"content": "I look.", "tool_calls": whole_calls}
    chat = {"choices": [{"message": message, "finish_reason": "tool_calls"}], "model": "m"}
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    streamed, whole = ResponsesSend(send, {}, "r"), ResponsesSend(send, {}, "r")
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await streamed({"type": "http.response.start", "status": 200, "headers": headers})
    stream = b"".join(map(encode_event, chunks)) + DONE
    await streamed({"type": "http.response.body", "body": stream})
    parts = [
        json.loads(event.split("\n")[1].removeprefix("data: "))
        for event in sent[-1]["body"].decode().split("\n\n")[:-1]
    ]
    await whole({"type": "http.response.start", "status": 200, "headers": []})
    await whole({"type": "http.response.body", "body": json.dumps(chat).encode()})
    output = json.loads(sent[-1]["body"])["output"]

    assert [item["type"] for item in output] == ["message", "function_call", "function_call"]
    assert output[1] == {
        "id": "fc_r_1",
        "type": "function_call",
        "call_id": "a",
        "name": "weather",
        "arguments": '{"place": "Rome"}',
        "status": "completed",
    }
    assert parts[-1]["response"]["output"] == output
    pieces = [p["delta"] for p in parts if p["type"] == "response.function_call_arguments.delta"]
    assert pieces == ['{"pl', 'ace": "Rome"}', "{}"]
    added = [p["item"]["status"] for p in parts if p["type"] == "response.output_item.added"]
    done = [p["output_index"] for p in parts if p["type"] == "response.output_item.done"]
    assert (added, done) == (["in_progress"] * 3, [0, 1, 2])
    assert [p["sequence_number"] for p in parts] == list(range(len(parts)))
