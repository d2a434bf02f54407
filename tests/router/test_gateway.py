"""An endpoint picker's conversations: where requests go, what clients get, what is booked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from data_plane import (
    CHAT,
    HOME,
    DataPlane,
    answered,
    asked,
    body,
    heads,
    question,
    refusal,
    removed,
    streamed,
    trailers,
)
from tandem_router.api.api_keys import key_hash
from tandem_router.api.app import RouterApp
from tandem_router.gateway.session import ProtocolError
from tandem_router.testing.two_tiers import TIERS, Scores

SMALL = ["http://10.0.0.1:8100", "http://10.0.0.2:8100"]
LARGE = ["http://10.0.1.1:8100"]
ENDPOINT = "x-gateway-destination-endpoint"
SECRET = b"a-secret-of-sixteen-bytes"
TENANT = {"name": "a", "key_hashes": [key_hash(SECRET, "key-a")]}
REPLY = {
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "Hello there"}}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13},
}
EVENTS = [
    b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}\n\n',
    b'data: {"choices": [{"index": 0, "delta": {"content": "Hello"}}]}\n\n',
    b'data: {"choices": [{"index": 0, "delta": {"content": " there"}}]}\n\n',
    b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n',
    b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}\n\n',
    b"data: [DONE]\n\n",
]


@pytest.fixture
def picker(run_router: Any) -> Any:
    """`async with picker() as app`: a router that has two small workers and a large one."""

    @asynccontextmanager
    async def run(**changes: Any) -> AsyncIterator[RouterApp]:
        changes.setdefault("predictor", Scores(0.9, 0.9))
        async with run_router({}, background=False, peer_token="peer", **changes) as (_, app):
            app.set_table({"small": {"unified": tuple(SMALL)}, "large": {"unified": tuple(LARGE)}})
            yield app

    return run


def last(app: RouterApp) -> Any:
    return list(app.services.decisions.records())[-1]


def nothing_is_held(app: RouterApp) -> bool:
    ledger, workers = app.services.ledger, app.picker.workers
    return not ledger.num_inflight and not any(worker.num_inflight for worker in workers)


async def test_a_body_in_pieces_goes_whole_to_the_picked_worker(picker: Any) -> None:
    async with picker() as app:
        plane = DataPlane(app)
        sent = question("hi", temperature=0)
        plane.say(asked(), *(body(sent[i : i + 7], False) for i in range(0, len(sent), 7)))
        plane.say(body(b"", True))
        first, *parts = await plane.until(2)

        endpoint = heads(first)[ENDPOINT]
        metadata = first.dynamic_metadata["envoy.lb"][ENDPOINT]
        passed, ends = streamed(parts, "request")
        fields = json.loads(passed)
        assert first.request_headers.response.clear_route_cache
        assert metadata == endpoint
        assert {f"http://{each}" for each in endpoint.split(",")} == set(SMALL)
        assert fields == {**json.loads(sent), "model": "small-model"}
        assert heads(first)["content-length"] == str(len(passed))
        assert ends == [True]
        assert app.services.ledger.num_inflight == 1
        await plane.end()
        assert nothing_is_held(app)


@pytest.mark.parametrize("text", ["日本", "\x00 \n", "a" * 100])
async def test_a_renamed_model_leaves_the_words_as_they_are(picker: Any, text: str) -> None:
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(asked(), body(question(text)))
        _, *parts = await plane.until(2)
        await plane.end()

        passed = json.loads(streamed(parts, "request")[0])
        assert passed["messages"][0]["content"] == text


async def test_a_large_body_goes_on_in_pieces_that_data_planes_take(picker: Any) -> None:
    async with picker() as app:
        plane = DataPlane(app)
        sent = question("x" * 200_000)
        plane.say(asked(), body(sent))
        _, *parts = await plane.until(2)
        await plane.end()

        passed, ends = streamed(parts, "request")
        assert len(ends) == 4
        assert ends == [False, False, False, True]
        assert json.loads(passed)["messages"] == json.loads(sent)["messages"]


async def test_a_worker_is_told_what_the_router_knows_and_nothing_of_the_client(
    picker: Any,
) -> None:
    hostile = {
        "authorization": "Bearer key-a",
        "cookie": "session",
        "x_tandem_prefill": "http://evil.test",
        "x_tandem_ticket": "mine",
        "x_tandem_peer_token": "guess",
    }
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(asked(**hostile), body(question()))
        first, *_ = await plane.until(2)
        await plane.end()

        told = heads(first)
        assert told["x-tandem-model"] == "small-model"
        assert told["x-tandem-ticket"].count(".") == 2
        assert "peer" not in str(told)
        assert {"authorization", "cookie", "x-tandem-prefill", "x-tandem-peer-token"} <= removed(
            first
        )
        assert not removed(first) & told.keys()


async def test_a_whole_answer_brings_its_cost_and_is_booked(picker: Any) -> None:
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(asked(), body(question()))
        await plane.until(2)
        text = json.dumps(REPLY).encode()
        plane.say(answered(x_tandem_internal="1"), body(text[:9], False, "response"))
        assert len(await plane.until(2)) == 2  # headers wait: nothing is known of the answer yet
        plane.say(body(text[9:], True, "response"))
        _, _, first, *parts = await plane.end()

        assert streamed(parts, "response") == (text, [True])
        assert heads(first)["x-tandem-tier"] == "small"
        assert float(heads(first)["x-tandem-cost-usd"]) == pytest.approx(5e-6 + 16e-6)
        assert removed(first) == {"x-tandem-internal"}
        assert (last(app).status, last(app).output_tokens) == (200, 8)
        assert last(app).cost_usd == pytest.approx(21e-6)
        assert nothing_is_held(app)
        # What it answers elsewhere shows that it does not hang.
        assert max(worker.heard_at for worker in app.picker.workers) > 0.0


@pytest.mark.parametrize("size", [1, 7, 64, 100_000])
async def test_a_stream_is_the_same_however_it_is_cut(picker: Any, size: int) -> None:
    whole = b"".join(EVENTS)
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(asked(), body(question(stream=True)))
        await plane.until(2)
        plane.say(answered(content_type="text/event-stream", content_length="9"))
        for start in range(0, len(whole), size):
            end = start + size >= len(whole)
            plane.say(body(whole[start : start + size], end, "response"))
        _, _, first, *parts = await plane.end()

        shown, ends = streamed(parts, "response")
        # Usage was asked for by the router, not by the client.
        assert shown == b"".join([*EVENTS[:4], EVENTS[5]])
        assert ends == [False] * (len(ends) - 1) + [True]
        assert heads(first)["content-type"].startswith("text/event-stream")
        assert "content-length" in removed(first)
        assert (last(app).status, last(app).output_tokens) == (200, 2)
        assert last(app).ttft_s is not None


async def test_headers_of_a_stream_wait_for_its_first_token(picker: Any) -> None:
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(asked(), body(question(stream=True)))
        await plane.until(2)
        plane.say(answered(content_type="text/event-stream"), body(EVENTS[0], False, "response"))
        plane.say(body(b'data: {"error": {"message": "no", "type": "server_error"}}\n\n', True))
        plane.say(body(b"", True, "response"))
        told = await plane.end()

        status, error = refusal(told[-1])
        assert (status, error["code"]) == (502, "tier_failed")
        assert last(app).status == 502


async def test_a_stream_that_breaks_ends_with_an_error_and_pays_for_what_was_sent(
    picker: Any,
) -> None:
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(asked(), body(question(stream=True)))
        await plane.until(2)
        plane.say(answered(content_type="text/event-stream"))
        plane.say(body(b"".join(EVENTS[:3]), False, "response"), body(b"", True, "response"))
        told = await plane.end()

        shown, ends = streamed(told, "response")
        assert shown.startswith(b"".join(EVENTS[:3]))
        assert json.loads(shown.split(b"data: ")[-1])["error"]["code"] == "stream_lost"
        assert ends[-1]
        assert last(app).error is not None
        assert last(app).output_tokens > 0
        assert nothing_is_held(app)


@pytest.mark.parametrize("end", [b"", b"data: [DONE]\n\n"], ids=["cut", "done"])
async def test_a_chunk_that_is_not_json_ends_as_other_broken_answers_do(
    picker: Any, end: bytes
) -> None:
    broken = b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}].1\n\n'
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(asked(), body(question(stream=True)))
        await plane.until(2)
        plane.say(answered(content_type="text/event-stream"))
        plane.say(body(EVENTS[1] + broken, False, "response"), body(end, True, "response"))
        told = await plane.end()

        shown, ends = streamed(told, "response")
        assert shown.startswith(EVENTS[1] + broken)
        assert ends[-1]
        assert last(app).output_tokens > 1
        assert nothing_is_held(app)


async def test_an_answer_without_usage_is_estimated_never_free(picker: Any) -> None:
    reply = json.dumps({"choices": REPLY["choices"]}).encode()
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(asked(), body(question()))
        await plane.until(2)
        plane.say(answered(), body(reply, True, "response"))
        await plane.end()

        assert last(app).usage_estimated
        assert last(app).output_tokens == 3  # eleven letters
        assert last(app).cost_usd > 0


@pytest.mark.parametrize("reset", [True, False])
async def test_a_client_that_leaves_in_mid_stream_pays_for_what_it_got(
    picker: Any, reset: bool
) -> None:
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(asked(), body(question(stream=True)))
        await plane.until(2)
        plane.say(answered(content_type="text/event-stream"), body(b"".join(EVENTS[:3]), False))
        plane.say(body(b"".join(EVENTS[:3]), False, "response"))
        await plane.until(4)
        await (plane.vanish() if reset else plane.end())

        assert last(app).status == 499
        assert last(app).output_tokens > 0
        assert nothing_is_held(app)


async def test_a_client_that_leaves_before_its_body_is_here_leaves_nothing(picker: Any) -> None:
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(asked(), body(b'{"model"', False))
        told = await plane.end()

        assert told == []
        assert nothing_is_held(app)
        assert list(app.services.decisions.records()) == []


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[]", b'{"model": 1}', b""])
async def test_a_body_that_is_no_request_is_refused_in_our_words(picker: Any, text: bytes) -> None:
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(asked(), body(text))
        (told,) = await plane.end()

        status, error = refusal(told)
        assert (status, error["type"]) == (400, "invalid_request_error")
        assert heads(told)["x-should-retry"] == "false"
        assert nothing_is_held(app)


async def test_a_huge_body_is_refused_before_all_of_it_is_here(picker: Any) -> None:
    async with picker(limits={"max_body_bytes": 1024}) as app:
        plane = DataPlane(app)
        plane.say(asked(), *(body(b"x" * 400, False) for _ in range(3)))
        (told,) = await plane.until(1)

        assert refusal(told)[0] == 413
        assert app.front(HOME).bodies.num_bytes == 0
        await plane.end()


@pytest.mark.parametrize(
    "first",
    [
        asked("/v1/models", "GET", end=True),
        asked(CHAT, "POST", end=True),
        asked("/v1/responses"),
        asked("/v1/messages"),
        asked(CHAT, content_encoding="gzip"),
        asked(CHAT, origin="https://page.test"),
    ],
)
async def test_what_is_not_for_a_worker_goes_to_the_router_itself(picker: Any, first: Any) -> None:
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(first)
        if not first.request_headers.end_of_stream:
            plane.say(body(b"ab", False), body(b"cd", True))
        plane.say(answered(x_tandem_tier="small"), body(b"ef", True, "response"))
        told = await plane.end()

        assert heads(told[0]) == {ENDPOINT: HOME}
        assert told[0].dynamic_metadata["envoy.lb"][ENDPOINT] == HOME
        assert removed(told[0]) == set()
        if not first.request_headers.end_of_stream:
            assert streamed(told, "request") == (b"abcd", [False, True])
        assert streamed(told, "response") == (b"ef", [True])


async def test_an_external_tier_is_the_routers_own_to_ask_and_nothing_is_counted(
    picker: Any,
) -> None:
    outside = {"kind": "external", "url": "https://api.test/v1", "served_model": "big"}
    tiers = [TIERS[0], {**TIERS[1], **outside}]
    tenant = {**TENANT, "requests_per_minute": 1}
    async with picker(
        tiers=tiers, predictor=Scores(0.1, 0.9), tenants=[tenant], key_secret=SECRET
    ) as app:
        app.set_table({"small": {"unified": tuple(SMALL)}})
        for _ in range(2):  # the one request of this minute is still to come
            plane = DataPlane(app)
            plane.say(asked(authorization="Bearer key-a"), body(question()))
            told = await plane.end()

            assert heads(told[0]) == {ENDPOINT: HOME}
            assert streamed(told, "request") == (question(), [True])
        assert list(app.services.decisions.records()) == []
        assert nothing_is_held(app)


async def test_a_tier_whose_workers_are_all_away_is_waited_for_by_the_router_itself(
    picker: Any,
) -> None:
    async with picker() as app:
        app.set_table({"small": {}, "large": {}})
        plane = DataPlane(app)
        plane.say(asked(), body(question()))
        told = await plane.end()

        assert heads(told[0]) == {ENDPOINT: HOME}


async def test_a_cached_answer_is_the_routers_own_to_give(picker: Any) -> None:
    async with picker(cache={"enabled": True}) as app:
        for endpoint in (SMALL, [f"http://{HOME}"]):
            plane = DataPlane(app)
            plane.say(asked(), body(question(temperature=0, seed=1)))
            first, *_ = await plane.until(2)
            assert f"http://{heads(first)[ENDPOINT].split(',')[0]}" in endpoint
            plane.say(answered(), body(json.dumps(REPLY).encode(), True, "response"))
            await plane.end()


async def test_refusals_of_the_policy_are_the_http_paths(picker: Any) -> None:
    tenant = {**TENANT, "requests_per_minute": 1}
    async with picker(tenants=[tenant], key_secret=SECRET) as app:
        answers = []
        for key in ("", "Bearer wrong", "Bearer key-a", "Bearer key-a"):
            plane = DataPlane(app)
            plane.say(asked(**({"authorization": key} if key else {})), body(question()))
            answers.append((await plane.end())[0])

        nobody, stranger, let_in, too_fast = answers
        assert refusal(nobody)[1]["code"] == "missing_api_key"
        assert refusal(stranger)[1]["code"] == "invalid_api_key"
        assert let_in.WhichOneof("response") == "request_headers"
        assert (refusal(too_fast)[0], refusal(too_fast)[1]["code"]) == (429, "request_rate_limit")
        assert int(heads(too_fast)["retry-after"]) >= 1


async def test_a_worker_that_fails_is_left_alone_and_its_words_stay_inside(picker: Any) -> None:
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(asked(), body(question()))
        first, *_ = await plane.until(2)
        dead = heads(first)[ENDPOINT].split(",")[0]
        plane.say(answered(503), body(b"upstream connect error 10.0.0.1", True, "response"))
        told = await plane.end()

        status, error = refusal(told[-1])
        assert (status, error["code"]) == (503, "tier_not_ready")
        assert "10.0.0.1" not in error["message"]
        assert last(app).status == 503
        for _ in range(5):
            plane = DataPlane(app)
            plane.say(asked(), body(question()))
            first, *_ = await plane.until(2)
            assert dead not in heads(first)[ENDPOINT]
            await plane.end()


async def test_a_requests_own_fault_is_told_as_the_worker_says_it(picker: Any) -> None:
    said = {"error": {"message": "top_k is odd", "type": "invalid_request_error"}}
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(asked(), body(question()))
        await plane.until(2)
        plane.say(answered(400), body(json.dumps(said).encode(), True, "response"))
        told = await plane.end()

        status, error = refusal(told[-1])
        assert (status, error["message"]) == (400, "top_k is odd")
        assert last(app).cost_usd == 0.0


async def test_a_worker_that_stood_in_is_named_and_the_first_one_is_left_alone(
    picker: Any,
) -> None:
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(asked(), body(question()))
        first, *_ = await plane.until(2)
        wanted, stood_in = heads(first)[ENDPOINT].split(",")
        plane.say(answered(served=stood_in), body(json.dumps(REPLY).encode(), True, "response"))
        await plane.end()

        assert last(app).decode_worker == f"http://{stood_in}"
        assert last(app).num_failovers == 1
        failed = app.picker.worker("small", f"http://{wanted}")
        assert failed is not None
        assert failed.num_failures == 1


@pytest.mark.parametrize("subset", ["10.0.0.2:8100", ["10.0.0.2:8100", HOME], "10.0.0.2"])
async def test_only_endpoints_that_the_gateway_reaches_are_named(picker: Any, subset: Any) -> None:
    async with picker() as app:
        for _ in range(4):
            plane = DataPlane(app)
            plane.say(asked(subset=subset), body(question()))
            first, *_ = await plane.until(2)
            assert heads(first)[ENDPOINT] == "10.0.0.2:8100"
            await plane.end()


async def test_a_gateway_that_reaches_neither_workers_nor_the_router_is_told_so(
    picker: Any,
) -> None:
    async with picker() as app:
        for subset in ("10.9.9.9:1", []):
            plane = DataPlane(app)
            plane.say(asked(subset=subset), body(question()))
            (told,) = await plane.end()

            status, error = refusal(told)
            assert (status, error["code"]) == (503, "router_not_in_pool")
            assert nothing_is_held(app)


async def test_a_buffered_body_has_one_answer_for_each_message(picker: Any) -> None:
    modes = ("BUFFERED", "FULL_DUPLEX_STREAMED")
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(asked(modes=modes))
        (early,) = await plane.until(1)
        plane.say(body(question()))
        _, told = await plane.until(2)
        await plane.end()

        assert heads(early) == {}
        assert told.dynamic_metadata["envoy.lb"][ENDPOINT] == heads(told)[ENDPOINT]
        changed = told.request_body.response.body_mutation.body
        assert heads(told)["content-length"] == str(len(changed))
        assert json.loads(changed)["model"] == "small-model"


async def test_a_workers_span_is_the_child_of_the_routers(picker: Any) -> None:
    class Traces:
        def __init__(self) -> None:
            self.open: list[str] = []
            self.ended: list[str | None] = []

        def begin(self, request_id: str, name: str, headers: Any) -> None:
            self.open.append(request_id)

        def headers(self, request_id: str) -> list[tuple[bytes, bytes]]:
            return [(b"traceparent", request_id.encode())]

        def note(self, request_id: str, said: Any) -> None:
            pass

        def end(self, request_id: str, error: str | None = None) -> None:
            self.ended.append(error)

    async with picker() as app:
        traces: Any = Traces()
        app.services.tracing = traces
        plane = DataPlane(app)
        plane.say(asked(traceparent="mine"), body(question()))
        first, *_ = await plane.until(2)
        plane.say(answered(), body(json.dumps(REPLY).encode(), True, "response"))
        await plane.end()

        assert [heads(first)["traceparent"]] == traces.open
        assert traces.ended == [None]


async def test_trailers_end_bodies_as_well(picker: Any) -> None:
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(asked(), body(question(), False), trailers("request"))
        await plane.until(3)
        text = json.dumps(REPLY).encode()
        plane.say(answered(), body(text, False, "response"), trailers("response"))
        told = await plane.end()

        kinds = [each.WhichOneof("response") for each in told]
        assert kinds[:3] == ["request_headers", "request_body", "request_trailers"]
        assert kinds[3:] == ["response_headers", "response_body", "response_trailers"]
        assert streamed(told, "request")[1] == [False]
        assert streamed(told, "response") == (text, [False])
        assert last(app).status == 200


@pytest.mark.parametrize(
    ("modes", "said"),
    [
        (("NONE", "FULL_DUPLEX_STREAMED"), "request_body_mode NONE"),
        (("STREAMED", "FULL_DUPLEX_STREAMED"), "request_body_mode STREAMED"),
        (("BUFFERED", "BUFFERED"), "response_body_mode BUFFERED"),
    ],
)
async def test_modes_that_cannot_work_are_named(
    picker: Any, modes: tuple[str, str], said: str
) -> None:
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(asked(modes=modes))
        (told,) = await plane.end()

        status, error = refusal(told)
        assert (status, error["code"]) == (500, "gateway_body_mode")
        assert said in error["message"]


async def test_metadata_that_holds_nothing_says_nothing(picker: Any) -> None:
    first = asked()
    entry = first.metadata_context.filter_metadata.add(key="envoy.lb.subset_hint")
    entry.value.fields["x-gateway-destination-endpoint-subset"].SetInParent()
    async with picker() as app:
        plane = DataPlane(app)
        plane.say(first, body(question()))
        told = await plane.until(2)
        await plane.end()

        assert heads(told[0])[ENDPOINT]


async def test_what_is_not_the_protocol_ends_the_conversation(picker: Any) -> None:
    watching = asked()
    watching.observability_mode = True
    async with picker() as app:
        for message in (body(b"x"), watching):
            plane = DataPlane(app)
            plane.say(message)
            with pytest.raises(ProtocolError):
                await plane.end()


def test_a_router_that_no_gateway_asks_loads_nothing_of_it() -> None:
    code = (
        "import sys, tandem_router.api.app; "
        "print([n for n in sys.modules if n.startswith(('grpc', 'google.protobuf', "
        "'tandem_router.gateway'))])"
    )

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert said.stdout.strip() == "[]"
