"""A real Envoy, a router process as its endpoint picker, and workers that check who sends them.

One test, so that one Envoy and one router start however the suite is spread.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

import envoy_kit
from certificates import write_pair
from tandem_router.api.api_keys import key_hash
from tandem_router.testing.fake_server import Seen, plain_reply
from tandem_router.testing.fake_worker import FakeWorker
from tandem_router.testing.two_tiers import CONFIG
from tandem_worker.server import ticket

TOKEN = "a-peer-token-of-the-namespace"
SECRET = "a-secret-of-sixteen-bytes"
EASY, HARD = "hi", "please " * 400


@dataclass(eq=False)
class StrictWorker(FakeWorker):
    """As a worker of ours: the peer token or a ticket, else 401."""

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        if seen.headers.get("x-tandem-peer-token") != TOKEN:
            held = [TOKEN.encode()]
            digest = ticket.expected_digest(seen.headers, seen.path, held, time.time())
            if digest != hashlib.sha256(seen.body).hexdigest():
                return await plain_reply(writer, 401, {}, b'{"error": {"message": "who?"}}')
        return await super().answer(seen, writer)


@dataclass
class Stand:
    """Everything that runs, and a client of the gateway."""

    client: httpx.AsyncClient  # of a gateway that fails closed
    open_url: str  # of one that fails open
    router_url: str
    workers: dict[str, list[StrictWorker]]

    async def ask(self, text: str = EASY, key: str = "key-a", **fields: Any) -> httpx.Response:
        body = {"model": "chat", "messages": [{"role": "user", "content": text}], **fields}
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return await self.client.post("/v1/chat/completions", json=body, headers=headers)

    async def told(self, path: str) -> dict[str, Any]:
        """What the router's own pages say."""
        async with httpx.AsyncClient() as client:
            answer = await client.get(
                f"{self.router_url}{path}", headers={"x-tandem-peer-token": TOKEN}
            )
        said: dict[str, Any] = answer.json()
        return said

    def asked(self, tier: str) -> list[Seen]:
        return [seen for worker in self.workers[tier] for seen in worker.inference]


async def test_an_envoy_asks_the_router_where_each_request_goes(tmp_path: Path) -> None:
    tiers = {tier: [await StrictWorker().start() for _ in "12"] for tier in ("small", "large")}
    http, picker, closed, opened, buffered, unread, *others = envoy_kit.free_ports(9)
    second_http, secure_picker, private = others
    tenants = [
        {"name": "a", "key_hashes": [key_hash(SECRET.encode(), "key-a")]},
        {
            "name": "b",
            "key_hashes": [key_hash(SECRET.encode(), "key-b")],
            "requests_per_minute": 1,
        },
    ]
    config = {
        **CONFIG,
        "gateway_port": picker,
        "predictor": {"type": "Length"},
        "tenants": tenants,
        "drain_timeout_s": 1.0,
    }
    table = {tier: {"unified": [w.url for w in workers]} for tier, workers in tiers.items()}
    pool = [worker.port for workers in tiers.values() for worker in workers]
    listeners: dict[int, dict[str, Any]] = {
        closed: {},
        opened: {"fail_open": True},
        buffered: {"request_body_mode": "BUFFERED"},
        unread: {"response_body_mode": "NONE"},
        private: {"picker": "secure-picker"},
    }
    write_pair(tmp_path / "tls", "picker")
    secure = envoy_kit.SecurePicker(secure_picker, tmp_path / "tls" / "tls.crt")
    by_tls = {**config, "gateway_port": secure_picker}
    envoy_listens = envoy_kit.envoy_config(listeners, picker, [*pool, http, second_http], secure)
    with (
        envoy_kit.router(
            tmp_path, config, http, table, peer_token=TOKEN, key_secret=SECRET
        ) as process,
        envoy_kit.router(
            *(tmp_path / "second", by_tls, second_http, table),
            *("--gateway-tls", str(tmp_path / "tls")),
            peer_token=TOKEN,
            key_secret=SECRET,
        ),
        envoy_kit.envoy(tmp_path, envoy_listens),
    ):
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{closed}", timeout=10)
        opened_url, router_url = f"http://127.0.0.1:{opened}", f"http://127.0.0.1:{http}"
        stand = Stand(client, opened_url, router_url, tiers)
        await check_that_prompts_go_to_the_tier_they_need(stand)
        await check_that_nothing_internal_is_taken_from_or_shown_to_clients(stand)
        await check_that_a_picker_is_asked_by_tls(f"http://127.0.0.1:{private}")
        await check_that_a_stream_comes_as_it_is_made(stand)
        await check_that_a_broken_stream_never_looks_whole(stand)
        await check_that_refusals_are_ours(stand)
        await check_that_other_paths_reach_the_router_itself(stand)
        await check_other_body_modes(stand, buffered, unread)
        await check_that_a_dead_workers_requests_go_to_another(stand)
        await check_that_the_books_show_everything(stand)
        process.terminate()
        process.wait()
        await check_what_a_gateway_does_without_a_picker(stand)
        await client.aclose()
    for workers in tiers.values():
        for worker in workers:
            await worker.stop()


async def check_that_prompts_go_to_the_tier_they_need(stand: Stand) -> None:
    easy, hard = await stand.ask(EASY), await stand.ask(HARD)

    assert (easy.status_code, hard.status_code) == (200, 200), (easy.text, hard.text)
    assert easy.headers["x-tandem-tier"] == "small"
    assert hard.headers["x-tandem-tier"] == "large"
    assert easy.json()["model"] == "small-model"
    assert float(easy.headers["x-tandem-cost-usd"]) == 5e-6 + 8 * 2e-6
    assert [json.loads(seen.body)["model"] for seen in stand.asked("large")] == ["large-model"]


async def check_that_nothing_internal_is_taken_from_or_shown_to_clients(stand: Stand) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": EASY}]}
    answer = await stand.client.post(
        "/v1/chat/completions",
        json=body,
        headers={
            "authorization": "Bearer key-a",
            "x-tandem-prefill": "http://127.0.0.1:1",
            "x-tandem-peer-token": "guess",
            "x-gateway-destination-endpoint": "127.0.0.1:1",
        },
    )

    request_id = answer.headers["x-request-id"]
    (seen,) = [s for s in stand.asked("small") if s.headers["x-request-id"] == request_id]
    assert answer.status_code == 200
    assert TOKEN not in str(seen.headers)
    for name in ("authorization", "x-tandem-prefill", "x-tandem-peer-token"):
        assert name not in seen.headers
    assert not {"x-tandem-ticket", "x-gateway-destination-endpoint"} & answer.headers.keys()


async def check_that_a_picker_is_asked_by_tls(gateway: str) -> None:
    """Envoy trusts the picker's certificate alone, and fails closed."""
    headers = {"authorization": "Bearer key-a"}
    async with httpx.AsyncClient(headers=headers, timeout=10) as client:
        answers = [
            await client.post(
                f"{gateway}/v1/chat/completions",
                json={"model": "chat", "messages": [{"role": "user", "content": text}]},
            )
            for text in (EASY, HARD)
        ]

    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    assert [answer.headers["x-tandem-tier"] for answer in answers] == ["small", "large"]


async def check_that_a_stream_comes_as_it_is_made(stand: Stand) -> None:
    for worker in stand.workers["small"]:
        worker.write_size, worker.pause_s = 150, 0.02
    body = {"model": "chat", "stream": True, "stream_options": {"include_usage": True}}
    request = stand.client.stream(
        "POST",
        "/v1/chat/completions",
        json={**body, "messages": [{"role": "user", "content": EASY}]},
        headers={"authorization": "Bearer key-a"},
    )
    async with request as answer:
        parts = [part async for part in answer.aiter_raw()]
    for worker in stand.workers["small"]:
        worker.write_size, worker.pause_s = None, 0.0

    events = b"".join(parts).split(b"\n\n")
    usage = json.loads(events[-3].removeprefix(b"data: "))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert len(parts) > 4
    assert events[-2:] == [b"data: [DONE]", b""]
    assert usage["usage"]["completion_tokens"] == 8
    assert usage["tandem"]["tier"] == "small"


async def check_that_a_broken_stream_never_looks_whole(stand: Stand) -> None:
    for worker in stand.workers["large"]:
        worker.cut_after, worker.write_size, worker.pause_s = [700], 350, 0.05
    body = {"model": "large", "stream": True, "messages": [{"role": "user", "content": EASY}]}
    headers = {"authorization": "Bearer key-a"}
    parts: list[bytes] = []
    broke = False
    try:
        request = stand.client.stream("POST", "/v1/chat/completions", json=body, headers=headers)
        async with request as answer:
            async for part in answer.aiter_raw():
                parts.append(part)
    except httpx.HTTPError:
        broke = True
    for worker in stand.workers["large"]:
        worker.cut_after, worker.write_size, worker.pause_s = [], None, 0.0

    assert parts
    assert b"data: [DONE]" not in b"".join(parts)
    assert broke


async def check_that_refusals_are_ours(stand: Stand) -> None:
    nobody = await stand.ask(key="")
    stranger = await stand.ask(key="key-x")
    first, second = await stand.ask(key="key-b"), await stand.ask(key="key-b")
    nonsense = await stand.client.post(
        "/v1/chat/completions", content=b"{", headers={"authorization": "Bearer key-a"}
    )

    assert (nobody.status_code, stranger.status_code) == (401, 401)
    assert nobody.json()["error"]["code"] == "missing_api_key"
    assert (first.status_code, second.status_code) == (200, 429)
    assert second.json()["error"]["code"] == "request_rate_limit"
    assert int(second.headers["retry-after"]) >= 1
    assert nonsense.status_code == 400
    assert nonsense.json()["error"]["type"] == "invalid_request_error"


async def check_that_other_paths_reach_the_router_itself(stand: Stand) -> None:
    key = {"authorization": "Bearer key-a"}
    models = await stand.client.get("/v1/models", headers=key)
    said = {"model": "chat", "input": EASY}
    response = await stand.client.post("/v1/responses", json=said, headers=key)

    assert [each["id"] for each in models.json()["data"]][:3] == ["chat", "small", "large"]
    assert response.status_code == 200, response.text
    assert response.json()["object"] == "response"


async def check_other_body_modes(stand: Stand, buffered: int, unread: int) -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": HARD}]}
    headers = {"authorization": "Bearer key-a"}
    async with httpx.AsyncClient(headers=headers, timeout=10) as client:
        whole = await client.post(f"http://127.0.0.1:{buffered}/v1/chat/completions", json=body)
        blind = await client.post(f"http://127.0.0.1:{unread}/v1/chat/completions", json=body)

    assert whole.status_code == 200, whole.text
    assert whole.headers["x-tandem-tier"] == "large"
    assert any("content-length" in seen.headers for seen in stand.asked("large"))
    assert blind.status_code == 500
    assert "response_body_mode NONE" in blind.json()["error"]["message"]


async def check_that_a_dead_workers_requests_go_to_another(stand: Stand) -> None:
    dead, alive = stand.workers["small"]
    await dead.stop()
    before = len(alive.inference)

    answers = [await stand.ask(EASY) for _ in range(6)]

    assert [answer.status_code for answer in answers] == 6 * [200]
    assert len(alive.inference) == before + 6


async def check_that_the_books_show_everything(stand: Stand) -> None:
    decisions = (await stand.told("/admin/decisions"))["decisions"]

    served = [each for each in decisions if each["status"] == 200]
    assert {each["tenant"] for each in served} == {"a", "b"}
    assert all(each["cost_usd"] > 0 and each["output_tokens"] == 8 for each in served)
    (broken,) = [each for each in decisions if each["status"] != 200]
    assert broken["status"] == 499
    assert broken["output_tokens"] > 0
    streamed = [each for each in served if each["stream"]]
    assert all(each["ttft_s"] is not None for each in streamed)
    inflight = [
        line
        for line in (await _metrics(stand)).splitlines()
        if line.startswith("tandem_inflight_requests{")
    ]
    assert inflight
    assert all(line.endswith(" 0.0") for line in inflight)


async def _metrics(stand: Stand) -> str:
    async with httpx.AsyncClient() as client:
        headers = {"x-tandem-peer-token": TOKEN}
        return (await client.get(f"{stand.router_url}/metrics", headers=headers)).text


async def check_what_a_gateway_does_without_a_picker(stand: Stand) -> None:
    before = [len(each.inference) for each in stand.workers["large"]]

    refused = await stand.ask(EASY)
    async with httpx.AsyncClient(timeout=10) as client:
        passed = [await client.get(f"{stand.open_url}/v1/models") for _ in range(8)]

    assert refused.status_code >= 500
    assert [len(each.inference) for each in stand.workers["large"]] != before
    # Open, it tries anybody; but workers let in nobody whom no router sent.
    statuses = {answer.status_code for answer in passed}
    assert 401 in statuses
    assert 200 not in statuses
