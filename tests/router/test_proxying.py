"""What passes between client and worker: bytes, prices, headers, refusals, the end of a wait."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from eventually import eventually
from tandem_router.testing.two_tiers import Scores, both


async def test_the_body_reaches_the_worker_byte_for_byte(run_router: Any, make_worker: Any) -> None:
    worker = await make_worker()
    body = b'{"model":"large",  "messages":[{"role":"user","content":"h\\u00e9"}], "odd_field":[1]}'

    async with run_router({"large": {"decode": [worker]}}) as (client, _):
        await client.request("POST", "/v1/chat/completions", body)

    assert worker.inference[0].body == body


async def test_cost_is_exact_in_the_header_of_a_whole_reply_and_in_the_usage_of_a_stream(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(await both(make_worker)) as (client, _):
        whole = await client.chat(model="large")
        stream = await client.chat(
            model="large", stream=True, stream_options={"include_usage": True}
        )
        state = (await client.get("/admin/state")).json

    exact = (5 * 10.0 + 8 * 20.0) / 1e6
    assert float(whole.headers["x-tandem-cost-usd"]) == pytest.approx(exact)
    assert stream.chunks[-1]["usage"]["completion_tokens"] == 8
    assert stream.chunks[-1]["tandem"]["cost_usd"] == pytest.approx(exact)
    assert state["cost_usd"] == pytest.approx(2 * exact)


async def test_usage_is_measured_but_not_sent_to_clients_who_did_not_ask(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(await both(make_worker)) as (client, app):
        reply = await client.chat(model="small", stream=True)

    assert not any("usage" in chunk for chunk in reply.chunks)
    assert app.services.decisions.last(1)[0]["output_tokens"] == 8


async def test_prefill_is_named_to_decode_workers_and_never_to_unified_ones(
    run_router: Any, make_worker: Any
) -> None:
    small, prefill, decode = [await make_worker() for _ in range(3)]
    table = {"small": {"unified": [small]}, "large": {"prefill": [prefill], "decode": [decode]}}

    async with run_router(table, peer_token="secret", slo={"ttft_ms": 500}) as (client, _):
        await client.chat(model="small")
        await client.chat(model="large", headers={"x-tandem-priority": "3"})

    assert "x-tandem-prefill" not in small.inference[0].headers
    headers = decode.inference[0].headers
    assert headers["x-tandem-prefill"] == prefill.url
    assert headers["x-tandem-peer-token"] == "secret"
    assert headers["x-tandem-priority"] == "3"
    assert 0 < int(headers["x-tandem-deadline-ms"]) <= 500
    assert not prefill.inference


async def test_without_prefill_workers_the_decode_worker_is_asked_to_prefill_itself(
    run_router: Any, make_worker: Any
) -> None:
    worker = await make_worker()

    async with run_router({"large": {"prefill": [], "decode": [worker]}}) as (client, _):
        reply = await client.chat(model="large")

    assert reply.status == 200
    assert "x-tandem-prefill" not in worker.inference[0].headers


async def test_client_headers_never_reach_a_worker(run_router: Any, make_worker: Any) -> None:
    worker = await make_worker()
    inbound = {
        "x-request-id": "mine",
        "x-tandem-prefill": "http://evil:1",
        "x-tandem-seed": "1",
        "x-tandem-peer-token": "guess",
        "x-tandem-model": "other",
        "authorization": "Bearer key",
        "cookie": "a=b",
    }

    async with run_router({"large": {"decode": [worker]}}) as (client, _):
        reply = await client.chat(model="large", headers=inbound)

    headers = worker.inference[0].headers
    assert headers["x-request-id"] == reply.headers["x-request-id"] != "mine"
    assert not {"x-tandem-prefill", "x-tandem-peer-token", "authorization", "cookie"} & set(headers)
    assert headers["x-tandem-seed"] != "1"


async def test_a_client_that_leaves_cancels_the_worker(run_router: Any, make_worker: Any) -> None:
    worker = await make_worker(pause_s=0.02, write_size=100)

    async with run_router({"large": {"decode": [worker]}}, background=False) as (client, app):
        await client.chat(model="large", stream=True, leave_after=1)
        await eventually(lambda: worker.num_disconnects)

    assert worker.num_disconnects == 1
    assert app.services.ledger.num_inflight == 0
    record = app.services.decisions.last(1)[0]
    assert (record["status"], record["error"]) == (499, "the client went away")
    assert all(known.num_inflight == 0 for known in app.picker.workers)


async def test_a_workers_refusal_of_the_request_is_passed_on(
    run_router: Any, make_worker: Any
) -> None:
    error = {"error": {"message": "too long", "type": "invalid_request_error", "code": "x"}}
    worker = await make_worker(
        refuse=[(400, {}, json.dumps(error).encode()), (422, {}, b"<html>teapot</html>")]
    )

    async with run_router({"large": {"decode": [worker]}}) as (client, _):
        worded = await client.chat(model="large")
        wordless = await client.chat(model="large")

    assert (worded.status, worded.json) == (400, error)
    assert wordless.status == 422
    assert "422" in wordless.error["message"]


async def test_a_prompt_too_long_for_one_tier_goes_to_another_unless_the_tier_was_named(
    run_router: Any, make_worker: Any
) -> None:
    error = {"error": {"message": "too long", "code": "context_length_exceeded"}}
    refusal = (400, {}, json.dumps(error).encode())
    small = await make_worker(refuse=[refusal, refusal])
    table = {"small": {"unified": [small]}, "large": {"decode": [await make_worker()]}}

    async with run_router(table, predictor=Scores(0.9, 0.9)) as (client, _):
        routed = await client.chat()
        forced = await client.chat(model="small")

    assert routed.headers["x-tandem-tier"] == "large"
    assert (forced.status, forced.json) == (400, error)


async def test_a_full_tier_is_left_for_another_one_or_refused_with_retry_after(
    run_router: Any, make_worker: Any
) -> None:
    full = (429, {"retry-after": "7"}, b'{"error": {"message": "full"}}')
    large = await make_worker(refuse=[full, full])
    table = {"small": {"unified": [await make_worker()]}, "large": {"decode": [large]}}

    async with run_router(table, predictor=Scores(0.1, 0.9)) as (client, _):
        routed = await client.chat()
        forced = await client.chat(model="large")

    assert routed.headers["x-tandem-tier"] == "small"
    assert forced.status == 429
    assert forced.headers["retry-after"] == "7"


async def test_a_worker_that_fails_twice_gives_a_server_error(
    run_router: Any, make_worker: Any
) -> None:
    crash = (500, {}, b"oops")
    workers = [await make_worker(refuse=[crash, crash]) for _ in range(2)]

    async with run_router({"large": {"decode": workers}}) as (client, _):
        reply = await client.chat(model="large")

    assert reply.status == 502
    assert reply.error["type"] == "server_error"


async def test_tokenizing_is_proxied(run_router: Any, make_worker: Any) -> None:
    async with run_router(await both(make_worker)) as (client, _):
        reply = await client.request("POST", "/tokenize", {"model": "small", "prompt": "x"})

    assert reply.json["tokens"] == [1, 2]


async def test_an_external_tier_gets_its_model_its_key_and_nothing_of_ours(
    run_router: Any, make_worker: Any, tmp_path: Any
) -> None:
    worker = await make_worker()
    key = tmp_path / "key"
    key.write_text("sk-external\n")
    tiers = [
        {"name": "small", "served_model": "s"},
        {
            "name": "cloud",
            "served_model": "big-1",
            "kind": "external",
            "url": worker.url + "/v1",
            "api_key_file": str(key),
        },
    ]

    async with run_router({}, tiers=tiers, fallback_tier="cloud") as (client, _):
        reply = await client.chat(model="cloud")

    seen = worker.inference[0]
    assert reply.status == 200
    assert seen.path == "/v1/chat/completions"
    assert seen.json["model"] == "big-1"
    assert seen.headers["authorization"] == "bearer sk-external"
    assert not [name for name in seen.headers if name.startswith("x-tandem")]


async def test_a_whole_reply_is_read_once(
    run_router: Any, make_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is an answer, what it used and what it cost come of one look at its JSON."""
    loads, read = msgspec.json.decode, []

    def counted(text: Any, *args: Any, **options: Any) -> Any:
        found = loads(text, *args, **options)
        if isinstance(found, dict) and "choices" in found:
            read.append(found)
        return found

    async with run_router({"large": {"decode": [await make_worker()]}}) as (client, app):
        monkeypatch.setattr(msgspec.json, "decode", counted)
        reply = await client.chat(model="large")
        monkeypatch.undo()
        record = app.services.decisions.last(1)[0]

    assert len(read) == 1
    assert record["output_tokens"] == reply.json["usage"]["completion_tokens"]
