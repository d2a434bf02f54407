"""/v1/messages says the same as chat completions, in Anthropic's envelope; errors too."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tandem_router.anthropic.reply import MessagesSend
from tandem_router.anthropic.request import to_chat
from tandem_router.openai.sse import DONE, encode_event

TOOL = {"name": "add", "description": "adds", "input_schema": {"type": "object"}}
CAN = {"tools": True, "images": True}


async def ask(client: Any, path: str = "", **fields: Any) -> Any:
    turn = {"role": "user", "content": "hello"}
    body = {"model": "large", "max_tokens": 8, "messages": [turn], **fields}
    return await client.request("POST", f"/v1/messages{path}", body)


def events(body: bytes) -> list[dict[str, Any]]:
    found = []
    for event in body.decode().split("\n\n")[:-1]:
        name, data = event.split("\n")
        payload = json.loads(data.removeprefix("data: "))
        assert name == f"event: {payload['type']}"
        found.append(payload)
    return found


async def dressed(*messages: dict[str, Any]) -> bytes:
    """What a client of /v1/messages gets of these chat chunks."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    reply = MessagesSend(send, "r")
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await reply({"type": "http.response.start", "status": 200, "headers": headers})
    for message in messages:
        body = encode_event(message)
        await reply({"type": "http.response.body", "body": body, "more_body": True})
    await reply({"type": "http.response.body", "body": DONE})
    return b"".join(message.get("body", b"") for message in sent)


async def test_a_message_holds_the_chat_answer_and_its_usage(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router({"large": {"decode": [await make_worker()]}}) as (client, _):
        reply = await ask(client)

    message = reply.json
    assert (message["type"], message["role"], message["model"]) == (
        "message",
        "assistant",
        "large-model",
    )
    (block,) = message["content"]
    assert block["type"] == "text"
    assert block["text"]
    assert message["stop_reason"] == "end_turn"
    assert message["usage"]["output_tokens"] == 8
    assert int(reply.headers["content-length"]) == len(reply.body)
    assert reply.headers["request-id"] == reply.headers["x-request-id"]


async def test_a_stream_survives_its_worker_and_has_every_event_once(
    run_router: Any, make_worker: Any
) -> None:
    cuts = [900]
    workers = [await make_worker(cut_after=cuts) for _ in range(2)]

    async with run_router({"large": {"decode": workers}}) as (client, app):
        stream = events((await ask(client, stream=True)).body)

    kinds = [event["type"] for event in stream]
    deltas = [event["delta"]["text"] for event in stream if event["type"] == "content_block_delta"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert kinds.count("message_start") == kinds.count("content_block_start") == 1
    assert "".join(deltas)
    assert stream[-2]["delta"]["stop_reason"] == "max_tokens"
    assert stream[-2]["usage"]["output_tokens"] == 8
    assert app.services.decisions.last(1)[0]["num_failovers"] == 1


async def test_thoughts_text_and_tools_are_blocks_one_after_the_other() -> None:
    def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
        return {
            "model": "m",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        }

    call = {"index": 0, "id": "t1", "function": {"name": "add", "arguments": ""}}
    more = {"index": 0, "function": {"arguments": '{"a": 1}'}}
    other = {"index": 1, "id": "t2", "function": {"name": "sub", "arguments": "{}"}}

    stream = events(
        await dressed(
            chunk(role="assistant", content=""),
            chunk(reasoning_content="Hm"),
            chunk(content="I "),
            chunk(content="add"),
            chunk(tool_calls=[call]),
            chunk(tool_calls=[more]),
            chunk(tool_calls=[other]),
            chunk("tool_calls"),
            {"model": "m", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}},
        )
    )

    starts = [event for event in stream if event["type"] == "content_block_start"]
    stops = [event["index"] for event in stream if event["type"] == "content_block_stop"]
    deltas = [(e["index"], e["delta"]) for e in stream if e["type"] == "content_block_delta"]
    assert [(event["index"], event["content_block"]["type"]) for event in starts] == [
        (0, "thinking"),
        (1, "text"),
        (2, "tool_use"),
        (3, "tool_use"),
    ]
    assert stops == [0, 1, 2, 3]
    assert [starts[2]["content_block"][name] for name in ("id", "name", "input")] == [
        "t1",
        "add",
        {},
    ]
    assert (2, {"type": "input_json_delta", "partial_json": '{"a": 1}'}) in deltas
    assert [index for index, _ in deltas] == [0, 1, 1, 2, 3]
    assert stream[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert stream[-2]["usage"] == {
        "input_tokens": 3,
        "output_tokens": 9,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }


async def test_a_conversation_with_tools_and_images_becomes_chat_messages(
    run_router: Any, make_worker: Any, reported: Any
) -> None:
    worker = await make_worker(capabilities=CAN)
    picture = {"type": "base64", "media_type": "image/png", "data": "AA=="}
    used = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "2", "is_error": True}
    turns = [
        {"role": "user", "content": [{"type": "image", "source": picture}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}, used]},
        {"role": "user", "content": [{"type": "text", "text": "go on"}, result]},
    ]

    async with run_router({"large": {"decode": [worker]}}) as (client, app):
        await reported(app)
        reply = await ask(
            client,
            system=[{"type": "text", "text": "be kind", "cache_control": {"type": "ephemeral"}}],
            messages=turns,
            tools=[TOOL],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
            stop_sequences=["X"],
            metadata={"user_id": "u"},
        )

    assert reply.status == 200, reply.body
    body = worker.inference[0].json
    call = {"name": "add", "arguments": '{"a": 1}'}
    url = {"url": "data:image/png;base64,AA=="}
    assert body["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "image_url", "image_url": url}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "t1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "Error: 2"},
        {"role": "user", "content": "go on"},
    ]
    function = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
    assert body["tools"] == [{"type": "function", "function": function}]
    assert (body["tool_choice"], body["parallel_tool_calls"]) == ("required", False)
    assert (body["stop"], body["user"], body["max_tokens"]) == (["X"], "u", 8)


async def test_tokens_are_counted_by_a_worker_of_the_tier(
    run_router: Any, make_worker: Any
) -> None:
    worker = await make_worker()

    async with run_router({"large": {"decode": [worker]}}) as (client, _):
        reply = await ask(client, "/count_tokens", max_tokens=None)

    assert reply.json == {"input_tokens": 2}
    assert worker.inference[0].path == "/tokenize"


@pytest.mark.parametrize(
    ("fields", "status", "kind", "said"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "`max_tokens`"),
        ({"messages": []}, 400, "invalid_request_error", "`messages`"),
        ({"messages": [{"role": "x", "content": "a"}]}, 400, "invalid_request_error", "role"),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 99_999}},
            400,
            "invalid_request_error",
            "`thinking.budget_tokens`=99999",
        ),
        ({"thinking": {"type": "enabled"}}, 400, "invalid_request_error", "budget_tokens"),
        (
            {"thinking": {"type": "disabled", "budget_tokens": 9}},
            400,
            "invalid_request_error",
            "type enabled",
        ),
        ({"tools": [{"type": "bash_20250124"}]}, 400, "invalid_request_error", "tools[0].type"),
        ({"tools": [TOOL]}, 400, "invalid_request_error", "lacks tools"),
        ({"mcp_servers": [{}]}, 400, "invalid_request_error", "`mcp_servers`"),
        ({"model": "nobody"}, 404, "not_found_error", "nobody"),
        ({"system": [{"type": "image"}]}, 400, "invalid_request_error", "system[0].type"),
    ],
)
async def test_errors_are_anthropics(
    run_router: Any, make_worker: Any, fields: dict[str, Any], status: int, kind: str, said: str
) -> None:
    async with run_router({"large": {"decode": [await make_worker()]}}) as (client, _):
        reply = await ask(client, **fields)

    assert reply.status == status
    assert reply.json["type"] == "error"
    assert reply.json["error"]["type"] == kind
    assert said in reply.json["error"]["message"]
    assert reply.json["request_id"] == reply.headers["x-request-id"]


async def test_what_a_worker_says_is_wrong_is_anthropics_too(
    run_router: Any, make_worker: Any
) -> None:
    wrong = {"error": {"message": "too hot", "type": "invalid_request_error", "code": None}}
    refusal = (400, {}, json.dumps(wrong).encode())
    worker = await make_worker(refuse=[refusal])

    async with run_router({"large": {"decode": [worker]}}) as (client, _):
        reply = await ask(client, temperature=99)

    assert reply.json["error"] == {"type": "invalid_request_error", "message": "too hot"}


async def test_an_error_in_a_stream_is_an_event(run_router: Any, make_worker: Any) -> None:
    broken = {"error": {"message": "gone", "type": "server_error"}}
    hello = {"model": "m", "choices": [{"index": 0, "delta": {"content": "a"}}]}

    stream = events((await dressed(hello, broken)).partition(b"event: content_block_stop")[0])

    assert stream[-1]["error"] == {"type": "api_error", "message": "gone"}


@pytest.mark.parametrize("header", ["x-api-key", "authorization"])
async def test_a_key_comes_in_either_header(run_router: Any, header: str) -> None:
    tenants = [{"name": "a", "key_hashes": ["hmac-sha256:" + 64 * "0"]}]

    secret = b"0123456789abcdef"
    peer = {"x-tandem-peer-token": "p", "content-type": "application/json"}

    async with run_router({}, tenants=tenants, key_secret=secret, peer_token="p") as (client, _):
        minted = await client.request("POST", "/admin/keys", {"tenant": "a"}, peer)
        key = minted.json["key"]
        value = key if header == "x-api-key" else f"Bearer {key}"
        known = await client.get("/v1/models", headers={header: value})
        unknown = await client.request("POST", "/v1/messages", {}, {header: "wrong"})

    assert known.status == 200
    assert unknown.status == 401
    assert unknown.json["error"]["type"] == "authentication_error"


def test_what_a_schema_asks_is_asked_of_the_tier() -> None:
    schema = {"type": "object"}
    said = {"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    form = {"format": {"type": "json_schema", "schema": schema}}

    chat = to_chat({**said, "output_config": form})

    assert chat["response_format"]["json_schema"]["schema"] == schema


async def test_a_budget_of_thought_is_the_workers_to_keep(
    run_router: Any, make_worker: Any
) -> None:
    worker = await make_worker()

    async with run_router({"large": {"decode": [worker]}}) as (client, _):
        budget = {"type": "enabled", "budget_tokens": 5}
        await ask(client, thinking=budget, max_tokens=50)
        await ask(client, thinking={"type": "adaptive"})

    asked = [seen.json.get("thinking_token_budget") for seen in worker.inference]
    assert asked == [5, None]
