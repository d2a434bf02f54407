"""What a client of the OpenAI API sees: models, forms of a prompt, error objects for all else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tandem_router.errors import ApiError
from tandem_router.testing.two_tiers import both


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"model":"\xff\xfe"}', "not UTF-8"),
        (b'{"model":"chat","messages":[{"role":"user"}],"temperature":NaN}', "not valid JSON"),
        (b'{"model":"chat","messages":[{"role":"user"}],"temperature":1e999}', "out of range"),
        (b'{"model":"\\ud800","messages":[]}', "not valid JSON"),
        (b'{"model":"chat","messages":[' + b"[]," * 70_000 + b"[]]}", "objects and lists"),
        ({"model": "chat", "messages": [], "kv_transfer_params": {}}, "reserved"),
        ({"model": "chat", "messages": [], "chat_template": "x"}, "`chat_template`"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "deeper than 32"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "deeper than 32"),
        ({"messages": [{"role": "user", "content": "x"}]}, "`model`"),
        ({"model": "chat"}, "`messages`"),
        ({"model": "chat", "messages": []}, "`messages`"),
        ({"model": "chat", "messages": ["x"]}, "`messages[0]`"),
        (
            {"model": "chat", "messages": [{"role": "user"}], "n": 17},
            "`n`=17 must be",
        ),
        ({"model": "chat", "messages": [{"role": "user"}], "n": True}, "whole number"),
        ({"model": "chat", "messages": [{"role": "user"}], "max_tokens": 1e9}, "whole number"),
        ({"model": "chat", "messages": [{"role": "user"}], "max_tokens": -1}, "from 0 to 131072"),
        (
            {"model": "chat", "messages": [{"role": "user"}], "stop": ["x"] * 17},
            "(17 entries)",
        ),
        ({"model": "chat", "messages": [{"role": "user"}], "stop": [1]}, "`stop[0]`"),
        ({"model": "chat", "messages": [{"role": "user"}], "stream": "yes"}, "`stream`"),
        ({"model": "chat", "messages": [{"role": "user"}], "stream_options": 1}, "stream_options"),
        ({"model": "chat", "messages": [{"role": "user"}], "tandem": {}}, "reserved"),
    ],
)
async def test_a_bad_request_gets_an_openai_error_that_names_the_field(
    run_router: Any, make_worker: Any, body: Any, said: str
) -> None:
    async with run_router({}) as (client, app):
        reply = await client.request("POST", "/v1/chat/completions", body)

    assert reply.status == 400
    assert said in reply.error["message"]
    assert reply.error["type"] == "invalid_request_error"
    assert reply.headers["x-should-retry"] == "false"
    assert app.services.ledger.num_inflight == 0


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/v1/moderations", 404, "unsupported_endpoint"),
        ("GET", "/v1/responses", 405, "method_not_allowed"),
        ("POST", "/v1/audio/speech", 404, "unsupported_endpoint"),
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("GET", "/v1/models/gpt-7", 404, "model_not_found"),
        ("GET", "/nowhere", 404, None),
    ],
)
async def test_what_is_not_served_is_refused_with_an_error_object(
    run_router: Any, method: str, path: str, status: int, code: str | None
) -> None:
    async with run_router({}) as (client, _):
        reply = await client.request(method, path, {} if method == "POST" else None)

    assert reply.status == status
    assert reply.error["code"] == code


async def test_an_unknown_model_is_named_with_those_that_exist(run_router: Any) -> None:
    async with run_router({}) as (client, _):
        reply = await client.chat(model="gpt-7")

    assert reply.status == 404
    assert reply.error["code"] == "model_not_found"
    assert "chat" in reply.error["message"]
    assert "large-model" in reply.error["message"]


async def test_an_error_leads_to_what_its_code_means_without_a_key(run_router: Any) -> None:
    tenants = [{"name": "t", "key_hashes": []}]
    async with run_router({}, tenants=tenants, peer_token="t") as (client, _):
        refused = await client.chat()
        page = await client.get(refused.error["doc_url"])
        unknown = await client.get("/errors/nonsense")

    assert refused.error["doc_url"] == "/errors/missing_api_key"
    assert page.headers["content-type"].startswith("text/plain")
    assert "Authorization: Bearer KEY" in page.body.decode()
    assert unknown.status == 404
    assert "missing_api_key" in unknown.error["message"]
    assert "doc_url" not in unknown.error


async def test_anthropics_form_of_an_error_leads_there_too(run_router: Any) -> None:
    body = {"model": "no", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}
    async with run_router({}) as (client, _):
        reply = await client.request("POST", "/v1/messages", body)

    assert reply.error["doc_url"] == "/errors/model_not_found"


async def test_a_providers_own_code_is_not_explained_here() -> None:
    error = json.loads(ApiError(400, "no", code="billing_hard_limit").body())["error"]

    assert error["code"] == "billing_hard_limit"
    assert "doc_url" not in error


async def test_a_body_above_the_limit_is_refused_before_it_is_read(run_router: Any) -> None:
    async with run_router({}, limits={"max_body_bytes": 2000}) as (client, _):
        declared = await client.request(
            "POST", "/v1/completions", b"x", {"content-length": "100000"}
        )
        sent = await client.request("POST", "/v1/completions", b"x" * 3000)

    assert declared.status == sent.status == 413


async def test_headers_above_the_limit_are_refused(run_router: Any) -> None:
    async with run_router({}) as (client, _):
        reply = await client.chat(headers={"x-long": "y" * 40_000})

    assert reply.status == 431


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-tandem-quality", "1.5"),
        ("x-tandem-quality", "nan"),
        ("x-tandem-max-cost-usd", "-1"),
        ("x-tandem-ttft-slo-ms", "soon"),
        ("x-tandem-priority", "0.5"),
    ],
)
async def test_an_override_header_out_of_range_is_refused_by_name(
    run_router: Any, name: str, value: str
) -> None:
    async with run_router({}) as (client, _):
        reply = await client.chat(headers={name: value})

    assert reply.status == 400
    assert name in reply.error["message"]


async def test_models_lists_the_router_its_tiers_and_their_models(run_router: Any) -> None:
    async with run_router({}) as (client, _):
        listed = (await client.get("/v1/models")).json
        one = (await client.get("/v1/models/large-model")).json

    assert [m["id"] for m in listed["data"]] == [
        "chat",
        "small",
        "large",
        "small-model",
        "large-model",
    ]
    assert one["object"] == "model"


@pytest.mark.parametrize("prompt", ["text", ["a", "b"], [1, 2, 3], [[1], [2, 3]]])
async def test_every_form_of_a_completion_prompt_is_accepted(
    run_router: Any, make_worker: Any, prompt: Any
) -> None:
    async with run_router(await both(make_worker)) as (client, _):
        reply = await client.request("POST", "/v1/completions", {"model": "chat", "prompt": prompt})

    assert reply.status == 200


@pytest.mark.parametrize("prompt", [None, [], 7, [1, "a"], {"a": 1}])
async def test_other_completion_prompts_are_refused(run_router: Any, prompt: Any) -> None:
    async with run_router({}) as (client, _):
        reply = await client.request("POST", "/v1/completions", {"model": "chat", "prompt": prompt})

    assert reply.status == 400
