"""What a client of the OpenAI API sees: answers, headers, and error objects for all else."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from tandem_router.policy import PlainScore


class Scores:
    """A predictor that says the same for every prompt and remembers what it was asked."""

    def __init__(self, small: float, large: float) -> None:
        self.quality = {"small": small, "large": large}
        self.prompts: list[str] = []

    def score(self, prompt: str) -> PlainScore:
        self.prompts.append(prompt)
        return PlainScore(self.quality)


async def both(make_worker: Any) -> dict[str, Any]:
    return {"small": {"unified": [await make_worker()]}, "large": {"decode": [await make_worker()]}}


async def test_the_router_chooses_by_gain_and_says_so(run_router: Any, make_worker: Any) -> None:
    table = await both(make_worker)

    for scores, tier, reason in (
        (Scores(0.2, 0.9), "large", "gain"),
        (Scores(0.9, 0.92), "small", "sufficient"),
    ):
        async with run_router(table, predictor=scores, threshold=0.1) as (client, _):
            reply = await client.chat("What is 2 + 3?")

        assert reply.headers["x-tandem-tier"] == tier
        assert reply.headers["x-tandem-reason"] == reason
        assert float(reply.headers["x-tandem-gain"]) == pytest.approx(
            scores.quality["large"] - scores.quality["small"], abs=1e-4
        )
        assert float(reply.headers["x-tandem-difficulty"]) == pytest.approx(
            1 - scores.quality["small"], abs=1e-4
        )
        assert reply.json["model"] == f"{tier}-model"
        assert scores.prompts[-1] == "What is 2 + 3?"


@pytest.mark.parametrize("model", ["small", "small-model"])
async def test_naming_a_tier_or_its_model_forces_it(
    run_router: Any, make_worker: Any, model: str
) -> None:
    async with run_router(await both(make_worker), predictor=Scores(0.0, 1.0)) as (client, _):
        reply = await client.chat(model=model)

    assert (reply.headers["x-tandem-tier"], reply.headers["x-tandem-reason"]) == ("small", "forced")


async def test_the_last_user_message_is_what_is_scored(run_router: Any, make_worker: Any) -> None:
    scores = Scores(0.5, 0.5)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "text", "text": "second"}]},
    ]

    async with run_router(await both(make_worker), predictor=scores) as (client, _):
        await client.chat(messages=messages)

    assert scores.prompts[-1] == "second"


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
        for _ in range(200):
            if worker.num_disconnects:
                break
            await asyncio.sleep(0.01)

    assert worker.num_disconnects == 1
    assert app.services.admission.num_inflight == 0
    record = app.services.decisions.last(1)[0]
    assert (record["status"], record["error"]) == (499, "the client went away")
    assert all(known.num_inflight == 0 for known in app.picker.workers)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"model":"chat","messages":[{"role":"user"}],"temperature":NaN}', "NaN"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "deeper than 32"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "deeper than 32"),
        ({"messages": [{"role": "user", "content": "x"}]}, "`model`"),
        ({"model": "chat"}, "`messages`"),
        ({"model": "chat", "messages": []}, "`messages`"),
        ({"model": "chat", "messages": ["x"]}, "`messages[0]`"),
        ({"model": "chat", "messages": [{"role": "user"}], "n": 17}, "`n`=17 is outside 1..16"),
        ({"model": "chat", "messages": [{"role": "user"}], "n": True}, "whole number"),
        ({"model": "chat", "messages": [{"role": "user"}], "max_tokens": 1e9}, "whole number"),
        ({"model": "chat", "messages": [{"role": "user"}], "max_tokens": -1}, "outside"),
        ({"model": "chat", "messages": [{"role": "user"}], "stop": ["x"] * 17}, "17 strings"),
        ({"model": "chat", "messages": [{"role": "user"}], "stop": [1]}, "`stop`"),
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
    assert app.services.admission.num_inflight == 0


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/v1/embeddings", 404, "unsupported_endpoint"),
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


async def test_a_quality_floor_in_a_header_moves_the_request_to_the_large_tier(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(await both(make_worker), predictor=Scores(0.8, 0.85), threshold=0.1) as (
        client,
        _,
    ):
        plain = await client.chat()
        demanding = await client.chat(headers={"x-tandem-quality": "0.99"})

    assert plain.headers["x-tandem-tier"] == "small"
    assert demanding.headers["x-tandem-tier"] == "large"
    assert demanding.headers["x-tandem-reason"] == "quality-floor"


async def test_a_cost_ceiling_in_a_header_moves_the_request_to_the_small_tier(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(await both(make_worker), predictor=Scores(0.1, 0.9)) as (client, _):
        reply = await client.chat(max_tokens=100, headers={"x-tandem-max-cost-usd": "0.0005"})

    assert reply.headers["x-tandem-tier"] == "small"
    assert reply.headers["x-tandem-reason"] == "max-cost"


async def test_a_tier_without_workers_is_replaced_with_a_reason_unless_it_was_named(
    run_router: Any, make_worker: Any
) -> None:
    table = {"small": {"unified": [await make_worker()]}}

    async with run_router(
        table,
        predictor=Scores(0.1, 0.9),
        failover={"wait_s": 0.2, "wake_s": 0.2, "tier_wait_s": 0.05},
    ) as (client, _):
        routed = await client.chat()
        forced = await client.chat(model="large")

    assert routed.headers["x-tandem-tier"] == "small"
    assert routed.headers["x-tandem-reason"] == "unavailable"
    assert forced.status == 503
    assert forced.headers["retry-after"]
    assert "large" in forced.error["message"]


async def test_a_request_is_held_until_a_worker_appears(run_router: Any, make_worker: Any) -> None:
    worker = await make_worker()

    async with run_router({}) as (client, app):
        task = asyncio.ensure_future(client.chat(model="large"))
        await asyncio.sleep(0.05)
        assert not task.done()
        app.set_table({"large": {"decode": (worker.url,)}})
        reply = await task

    assert reply.status == 200


async def test_a_late_predictor_means_the_fallback_tier(run_router: Any, make_worker: Any) -> None:
    class Slow:
        def score(self, prompt: str) -> PlainScore:
            time.sleep(0.1)
            return PlainScore({"small": 1.0, "large": 1.0})

    async with run_router(await both(make_worker), predictor=Slow()) as (client, app):
        reply = await client.chat()

    assert not app.services.routing.scorer.inline
    assert reply.headers["x-tandem-tier"] == "large"
    assert reply.headers["x-tandem-reason"] == "predictor-late"


async def test_a_broken_predictor_means_the_fallback_tier(
    run_router: Any, make_worker: Any
) -> None:
    class Broken:
        def score(self, prompt: str) -> PlainScore:
            raise ValueError("no")

    class Silly:
        def score(self, prompt: str) -> PlainScore:
            return PlainScore({"small": float("nan"), "large": float("nan")})

    for predictor in (Broken(), Silly()):
        async with run_router(await both(make_worker), predictor=predictor) as (client, _):
            reply = await client.chat()

        assert reply.headers["x-tandem-tier"] == "large"
        assert reply.headers["x-tandem-reason"] == "predictor-failed"


async def test_a_workers_refusal_of_the_request_is_passed_on(
    run_router: Any, make_worker: Any
) -> None:
    error = {"error": {"message": "too long", "type": "invalid_request_error", "code": "x"}}
    worker = await make_worker(
        refuse=[(400, {}, json.dumps(error).encode()), (418, {}, b"<html>teapot</html>")]
    )

    async with run_router({"large": {"decode": [worker]}}) as (client, _):
        worded = await client.chat(model="large")
        wordless = await client.chat(model="large")

    assert (worded.status, worded.json) == (400, error)
    assert wordless.status == 418
    assert "418" in wordless.error["message"]


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


async def test_tokenizing_is_proxied(run_router: Any, make_worker: Any) -> None:
    async with run_router(await both(make_worker)) as (client, _):
        reply = await client.request("POST", "/tokenize", {"model": "small", "prompt": "x"})

    assert reply.json == {"tokens": [1, 2]}


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


async def test_decisions_hold_no_text_and_can_be_followed(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(await both(make_worker), predictor=Scores(0.2, 0.9)) as (client, _):
        first = await client.chat("a secret question", stream=True)
        await client.chat("another")
        everything = (await client.get("/admin/decisions")).json
        newer = (await client.get("/admin/decisions?after=1")).json
        one = (await client.get(f"/admin/decisions/{first.headers['x-request-id']}")).json
        missing = await client.get("/admin/decisions/nope")

    assert [record["sequence"] for record in everything["decisions"]] == [2, 1]
    assert [record["sequence"] for record in newer["decisions"]] == [2]
    assert one["ttft_s"] is not None
    assert one["gain"] == pytest.approx(0.7)
    assert missing.status == 404
    assert "secret" not in json.dumps(everything)


async def test_set_points_move_with_the_peer_token_only(run_router: Any, make_worker: Any) -> None:
    table = await both(make_worker)
    async with run_router(table, predictor=Scores(0.5, 0.7), threshold=0.1, peer_token="t") as (
        client,
        _,
    ):
        before = await client.chat()
        refused = await client.request("PUT", "/admin/set-points", {"gain_threshold": 0.5})
        unknown = await client.request(
            "PUT", "/admin/set-points", {"gain": 0.5}, {"x-tandem-peer-token": "t"}
        )
        moved = await client.request(
            "PUT",
            "/admin/set-points",
            b'{"gain_threshold": 0.5}',
            {"x-tandem-peer-token": "t", "content-type": "application/json"},
        )
        after = await client.chat()

    assert refused.status == 401
    assert unknown.status == 400
    assert moved.json["gain_threshold"] == 0.5
    assert before.headers["x-tandem-tier"] == "large"
    assert after.headers["x-tandem-tier"] == "small"


async def test_metrics_carry_the_prefix_and_count_what_happened(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(await both(make_worker), predictor=Scores(0.2, 0.9)) as (client, _):
        await client.chat(stream=True)
        await client.chat(model="small")
        text = (await client.get("/metrics")).body.decode()

    assert 'tandem_decisions_total{reason="gain",tier="large"} 1.0' in text
    assert 'tandem_requests_total{status="200",tier="small"} 1.0' in text
    assert 'tandem_ttft_seconds_count{tier="large"} 1.0' in text
    assert 'tandem_workers{role="decode",state="usable",tier="large"} 1.0' in text
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line[0] != "#"}
    assert all(name.startswith("tandem_") for name in names)


async def test_ready_needs_a_usable_worker_or_tiers_that_sleep(
    run_router: Any, make_worker: Any
) -> None:
    """Scaled to zero it takes requests and holds them; without any table it knows nothing yet."""
    worker = await make_worker()
    gone = await make_worker()
    await gone.stop()
    async with run_router({}) as (client, app):
        asleep = await client.get("/ready")
        app.has_table = False
        unknown = await client.get("/ready")
        app.set_table({"large": {"decode": (gone.url,)}})
        app.picker.failed(app.picker.worker(gone.url), "gone")
        unreachable = await client.get("/ready")
        app.set_table({"large": {"decode": (worker.url,)}})
        usable = await client.get("/ready")
        health = await client.get("/health")

    statuses = [reply.status for reply in (asleep, unknown, unreachable, usable, health)]
    assert statuses == [200, 503, 503, 200, 200]


async def test_a_tier_that_sleeps_is_waited_for_as_long_as_a_worker_takes_to_start(
    run_router: Any, make_worker: Any
) -> None:
    worker = await make_worker()
    failover = {"wait_s": 0.2, "wake_s": 30.0, "tier_wait_s": 0.1}
    async with run_router({}, failover=failover) as (client, app):
        held = asyncio.create_task(client.chat(model="large"))
        await asyncio.sleep(0.5)
        waiting = not held.done()
        app.set_table({"large": {"decode": (worker.url,)}})
        answer = await held

    assert waiting
    assert answer.status == 200


async def test_a_tier_that_never_wakes_is_refused_with_a_time_to_come_back(
    run_router: Any,
) -> None:
    async with run_router({}, failover={"wait_s": 0.1, "wake_s": 0.2}) as (client, _):
        answer = await client.chat(model="large")

    assert answer.status == 503
    assert answer.headers["retry-after"]
    assert "no worker" in answer.error["message"]


async def test_a_missed_slo_moves_requests_or_sheds_them_as_the_router_says(
    run_router: Any, make_worker: Any
) -> None:
    scores = Scores(0.75, 0.9)
    slow = await make_worker(pause_s=0.1, write_size=300)
    table = {"small": {"unified": [await make_worker()]}, "large": {"decode": [slow]}}

    async with run_router(table, predictor=scores, threshold=0.1, slo={"ttft_ms": 60}) as (
        client,
        _,
    ):
        await client.chat(model="large", stream=True)
        one_known = await client.chat()
        await client.chat(model="small", stream=True)
        both_known = await client.chat()

        async with run_router(
            {"large": {"decode": [slow]}}, slo={"ttft_ms": 5}, budget={"on_exhausted": "Reject"}
        ) as (rejecting, _):
            await rejecting.chat(model="large", stream=True)
            shed = await rejecting.chat()

    assert shed.status == 429
    assert shed.error["code"] == "slo"
    assert shed.headers["retry-after"]
    assert one_known.headers["x-tandem-tier"] == "large"
    assert both_known.headers["x-tandem-tier"] == "small"
    assert both_known.headers["x-tandem-reason"] == "slo"
