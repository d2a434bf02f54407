"""Both ends of each HTTP link of `docs/contract.md`, each against the same vectors.

The packages share no code, so each vector is checked twice: the side that writes it writes exactly
that, the side that reads it understands exactly that.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from tandem_router.api.app import RouterApp
from tandem_router.balancing.worker import TEXT_WORKER, Load
from tandem_router.config import parse_config
from tandem_router.engines.ticket import ticket
from tandem_router.policy import Capabilities
from tandem_router.predictor.cascade import TokenStatistics
from tandem_router.testing.asgi_client import Client
from tandem_router.testing.fake_worker import FakeWorker
from tandem_router.testing.two_tiers import CONFIG
from tandem_worker.config import WorkerConfig
from tandem_worker.server.worker import Worker
from tandem_worker.transfer import KVPool, create_receiver
from worker_kit import Served, save_model

HERE = Path(__file__).parent
VECTORS: dict[str, Any] = json.loads((HERE / "vectors" / "http.json").read_text())
FORWARDED: dict[str, Any] = VECTORS["forwarded"]
ORDER: dict[str, Any] = VECTORS["prefill_order"]
TOKEN = FORWARDED["headers"]["x-tandem-peer-token"]


def neighbour(area: str) -> ModuleType:
    """The test kit of another area: its fake worker, its tiny model."""
    path = HERE.parent / area / "conftest.py"
    spec = importlib.util.spec_from_file_location(f"contract_{area}_kit", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def shape(value: Any) -> Any:
    """Keys and JSON types, all the way down."""
    if isinstance(value, dict):
        return {key: shape(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shape(part) for part in value[:1]]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return type(value).__name__


# -- GET /v1/load --------------------------------------------------------------------------------


def test_the_router_reads_a_load_report_as_the_page_says() -> None:
    silent = {name: value for name, value in VECTORS["load"].items() if name != "capabilities"}

    load = Load.parse(silent)

    assert load == Load(
        ready=True,
        draining=False,
        num_requests=4,
        pending_prefill_tokens=812,
        expected_tokens=410.0,
        kv_free_share=480 / 512,
        revision="a1b2",
        max_model_len=2048,
        step_time_s=0.021,
        prefill_profile=(0.002, 0.00003, 0.0),
        decode_profile=(0.001, 0.0, 0.0005),
        # A worker that says nothing of its capabilities serves text, as long as its context.
        capabilities=replace(TEXT_WORKER, context_length=2048),
    )


def test_the_router_reads_what_a_worker_says_it_can() -> None:
    said = {"tools": True, "structured_output": True, "images": False, "context_length": 4096}

    load = Load.parse({**VECTORS["load"], "capabilities": said})

    assert load.capabilities == Capabilities(
        tools=True,
        structured_output=True,
        images=False,
        logprobs=True,
        embeddings=False,
        context_length=4096,
    )


async def test_a_worker_writes_a_load_report_of_that_shape(worker: Worker) -> None:
    report = worker.load()

    if report["profile"] is None:
        report["profile"] = VECTORS["load"]["profile"]
    assert shape(report) == shape(VECTORS["load"])
    blocks = report["kv_blocks"]
    assert blocks["free"] + blocks["cached"] + blocks["used"] == blocks["total"]


# -- router to worker ----------------------------------------------------------------------------


@pytest.fixture
async def routed(tmp_path: Path) -> AsyncIterator[tuple[Any, Any]]:
    """(client of a router, the fake decode worker behind it)."""
    decode = await FakeWorker().start()
    prefill = await FakeWorker().start()
    app = RouterApp(
        parse_config(json.dumps({**CONFIG, "slo": {"ttft_ms": 800}})),
        endpoints_path=tmp_path / "endpoints.json",
        rng=random.Random(7),
        peer_token=TOKEN,
    )
    app.set_table({"large": {"decode": (decode.url,), "prefill": (prefill.url,)}})
    yield Client(app), decode
    app.services.client.close()
    await decode.stop()
    await prefill.stop()


async def test_the_router_forwards_the_body_unchanged_with_the_headers_of_the_page(
    routed: tuple[Any, Any],
) -> None:
    client, decode = routed
    body = json.dumps(FORWARDED["body"], indent=1).encode()
    spoofed = {"x-request-id": "mine", "x-tandem-prefill": "http://evil", "x-tandem-seed": "1"}

    await client.request("POST", FORWARDED["path"], body, {**spoofed, "x-tandem-priority": "-5"})

    seen = decode.inference[0]
    assert seen.path == FORWARDED["path"]
    assert seen.body == body
    transport_only = {"host", "content-length", "accept", "connection", "accept-encoding"}
    assert seen.headers.keys() - transport_only == FORWARDED["headers"].keys()
    assert seen.headers["x-request-id"] != "mine"
    assert seen.headers["x-tandem-prefill"].startswith("http://127.0.0.1:")
    assert 0 <= int(seen.headers["x-tandem-seed"]) < 2**64
    assert abs(int(seen.headers["x-tandem-created"]) - time.time()) < 60
    assert 0 < int(seen.headers["x-tandem-deadline-ms"]) <= 800
    for name in ("x-tandem-model", "x-tandem-priority", "x-tandem-token-ids", "x-tandem-usage"):
        assert seen.headers[name] == FORWARDED["headers"][name]


async def test_the_router_resumes_with_the_same_headers_and_the_ids_it_has_forwarded(
    routed: tuple[Any, Any],
) -> None:
    client, decode = routed
    whole = await client.request("POST", FORWARDED["path"], FORWARDED["body"])
    decode.cut_after = [900]

    reply = await client.request("POST", FORWARDED["path"], {**FORWARDED["body"], "seed": 3})

    first, second = decode.inference[1:]
    resumed = second.json.pop("tandem")["resume_token_ids"]
    assert {key: second.json[key] for key in first.json} == first.json
    assert len(resumed) == 1
    assert 0 < len(resumed[0]) < len(whole.token_ids())
    assert reply.token_ids()[: len(resumed[0])] == resumed[0]
    same = {name for name in FORWARDED["headers"] if name != "x-tandem-deadline-ms"}
    assert {name: first.headers.get(name) for name in same} == {
        name: second.headers.get(name) for name in same
    }


# -- the worker's side ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("contract") / "llama", "llama")


@pytest.fixture
async def worker(weights: Path) -> AsyncIterator[Worker]:
    """A decode worker, which has the routes of a prefill worker too."""
    config = WorkerConfig(
        served_model="tiny",
        role="decode",
        num_kv_blocks=32,
        kv_port=0,
        local_prefill_max_tokens=0,
    )
    served = await Served.start(config, weights, TOKEN.encode())
    yield served.worker
    await served.stop()


async def post(worker: Worker, path: str, body: Any, headers: dict[str, str]) -> httpx.Response:
    async with httpx.AsyncClient(base_url=worker.url, timeout=30) as client:
        return await client.post(path, json=body, headers=headers)


def chunks(reply: httpx.Response) -> list[dict[str, Any]]:
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


async def test_a_worker_answers_a_forwarded_request_as_the_headers_say(worker: Worker) -> None:
    # nobody listens at the prefill URL: the worker prefills by itself
    headers = {**FORWARDED["headers"], "x-tandem-prefill": "http://127.0.0.1:9"}

    reply = await post(worker, FORWARDED["path"], FORWARDED["body"], headers)

    assert reply.status_code == 200
    parsed = chunks(reply)
    for chunk in parsed:
        assert chunk["id"] == "chatcmpl-" + headers["x-request-id"]
        assert chunk["created"] == int(headers["x-tandem-created"])
        assert chunk["model"] == headers["x-tandem-model"]
    assert parsed[0]["choices"][0]["delta"]["role"] == "assistant"
    assert parsed[-1]["choices"] == []
    ids = [id for chunk in parsed[:-1] for id in chunk["choices"][0]["token_ids"]]
    assert parsed[-1]["usage"]["completion_tokens"] == len(ids)


async def test_a_worker_goes_on_where_another_one_stopped(worker: Worker) -> None:
    headers = {
        name: value for name, value in FORWARDED["headers"].items() if name != "x-tandem-prefill"
    }
    body = {**FORWARDED["body"], "ignore_eos": True}
    whole = chunks(await post(worker, FORWARDED["path"], body, headers))
    events = [chunk["choices"][0] for chunk in whole[:-1]]
    ids = [id for choice in events for id in choice["token_ids"]]
    resumed = {**body, "tandem": {"resume_token_ids": [ids[:5]]}}

    rest = chunks(await post(worker, FORWARDED["path"], resumed, headers))

    more = [chunk["choices"][0] for chunk in rest[:-1]]
    assert [id for choice in more for id in choice["token_ids"]] == ids[5:]
    assert all("role" not in choice["delta"] for choice in more)
    assert rest[-1]["usage"] == whole[-1]["usage"]
    text = "".join(choice["delta"].get("content") or "" for choice in events)
    tail = "".join(choice["delta"].get("content") or "" for choice in more)
    assert text.endswith(tail)


async def test_the_router_reads_what_a_worker_tells_of_its_tokens(worker: Worker) -> None:
    headers = {**FORWARDED["headers"], "x-tandem-token-statistics": "1"}
    del headers["x-tandem-prefill"]

    reply = await post(worker, FORWARDED["path"], {**FORWARDED["body"], "stream": False}, headers)

    told = reply.json()["tandem"]["token_statistics"]
    statistics = TokenStatistics.parse(told)
    assert statistics is not None
    assert asdict(statistics) == pytest.approx(told)
    assert statistics.num_tokens == reply.json()["usage"]["completion_tokens"]


async def test_a_worker_expects_as_many_tokens_as_the_router_predicts(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    add = worker.engine.add

    def note(request: Any) -> None:
        taken.append(request.sequence.predicted_output_tokens)
        add(request)

    monkeypatch.setattr(worker.engine, "add", note)
    headers = {n: v for n, v in FORWARDED["headers"].items() if n != "x-tandem-prefill"}
    for said in ({"x-tandem-expected-tokens": "7"}, {"x-tandem-expected-tokens": "700"}, {}):
        await post(worker, FORWARDED["path"], FORWARDED["body"], {**headers, **said})

    assert taken == [7, 12, 12]  # never more than max_tokens


async def test_a_request_without_the_peer_token_is_refused(worker: Worker) -> None:
    for path in ("/v1/chat/completions", "/internal/prefill", "/internal/abort"):
        reply = await post(worker, path, {}, {})

        assert reply.status_code == 401
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code", "doc_url"}
        assert error["doc_url"] == "/errors/invalid_peer_token"


# -- decode worker to prefill worker -------------------------------------------------------------


async def test_a_decode_worker_orders_a_prefill_as_the_page_says(worker: Worker) -> None:
    got: asyncio.Future[tuple[str, dict[str, Any]]] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        if not got.done():
            got.set_result((head, body))
        writer.write(b"HTTP/1.1 503 x\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = "http://{}:{}".format(*server.sockets[0].getsockname()[:2])
    headers = {**FORWARDED["headers"], "x-tandem-prefill": url}
    body = {"prompt": ORDER["token_ids"], "temperature": 0, "max_tokens": 12, "logprobs": 2}

    reply = await post(worker, "/v1/completions", body, headers)

    assert reply.status_code == 200
    head, order = await got
    assert head.startswith("POST /internal/prefill HTTP/1.1\r\n")
    assert f"x-tandem-peer-token: {TOKEN}" in head
    # identities differ from run to run; everything else is the vector
    assert order["request_id"].startswith(FORWARDED["headers"]["x-request-id"])
    assert order["epoch"] > 2**60
    assert order["kv"]["address"] == worker.kv_address
    variable = {name: order[name] for name in ("request_id", "epoch", "kv", "deadline_ms")}
    variable["kv"] = {"address": worker.kv_address, "block_ids": order["kv"]["block_ids"]}
    assert order == {**ORDER, **variable}
    assert len(order["kv"]["block_ids"]) == 1
    assert 0 < order["deadline_ms"] <= 800
    server.close()


async def test_a_worker_takes_a_ticket_with_its_body_and_no_other(worker: Worker) -> None:
    body = json.dumps({"prompt": "the quick", "max_tokens": 1}).encode()
    headers = {"x-request-id": "a", "x-tandem-created": "1", "x-tandem-model": "m"}
    signed = [(name.encode(), value.encode()) for name, value in headers.items()]
    given = ticket(TOKEN.encode(), "/v1/completions", signed, body, time.time())
    headers["x-tandem-ticket"] = given.decode()

    async with httpx.AsyncClient(base_url=worker.url) as client:
        good = await client.post("/v1/completions", content=body, headers=headers)
        other = await client.post("/v1/completions", content=body + b" ", headers=headers)
        aside = await client.post("/drain", headers=headers)

    assert good.status_code == 200, good.text
    assert (other.status_code, aside.status_code) == (401, 401)
    assert other.json()["error"]["code"] == "invalid_peer_token"


async def test_a_prefill_worker_fulfils_that_order(worker: Worker) -> None:
    layout = worker.kv_layout
    pool = KVPool.allocate(layout, 8)
    receiver = create_receiver(pool, token=TOKEN.encode())
    await receiver.start("127.0.0.1", 0)
    block_ids = ORDER["kv"]["block_ids"]
    reservation = receiver.reserve(
        ORDER["request_id"], ORDER["epoch"], block_ids, time.monotonic() + 30
    )
    order = {**ORDER, "kv": {"address": receiver.address, "block_ids": block_ids}}
    headers = {"x-tandem-peer-token": TOKEN}

    reply = await post(worker, "/internal/prefill", order, headers)

    assert reply.status_code == 200
    assert reply.json()["ok"] is True
    assert reply.json()["prefill_time_s"] > 0
    final = await reservation.completed()
    assert final.num_tokens == len(ORDER["token_ids"])
    assert final.logprob is not None
    assert len(final.top_logprobs) == 2
    body = {"prompt": ORDER["token_ids"], "temperature": 0, "max_tokens": 1}
    alone = await post(worker, "/v1/completions", body, {**headers, "x-tandem-token-ids": "1"})
    assert alone.json()["choices"][0]["token_ids"] == [final.first_token]
    assert any(pool.get_bytes(layout.num_layers - 1, block_ids))
    await receiver.aclose()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": 3}, "version"),
        ({"num_computed_tokens": 3}, "multiple of 64"),
        ({"position": 5}, "position"),
        ({"kv": {"address": "127.0.0.1:1", "block_ids": [1, 2]}}, "block_ids"),
        ({"token_ids": []}, "token_ids"),
        ({"epoch": -1}, "epoch"),
    ],
)
async def test_a_prefill_worker_says_what_is_wrong_with_an_order(
    worker: Worker, change: dict[str, Any], text: str
) -> None:
    reply = await post(
        worker, "/internal/prefill", {**ORDER, **change}, {"x-tandem-peer-token": TOKEN}
    )

    assert reply.status_code == 400
    assert text in reply.json()["error"]["message"]


async def test_an_order_whose_blocks_nobody_reserved_fails_with_the_reason(
    worker: Worker,
) -> None:
    receiver = create_receiver(KVPool.allocate(worker.kv_layout, 4), token=TOKEN.encode())
    await receiver.start("127.0.0.1", 0)
    order = {**ORDER, "kv": {**ORDER["kv"], "address": receiver.address}}

    reply = await post(worker, "/internal/prefill", order, {"x-tandem-peer-token": TOKEN})

    assert reply.status_code == 502
    assert "no reservation of request" in reply.json()["error"]["message"]
    await receiver.aclose()


def test_the_page_shows_the_load_report_and_names_every_header() -> None:
    page = (HERE.parents[1] / "docs" / "contract.md").read_text()

    for name in FORWARDED["headers"]:
        assert name == "content-type" or name in page
    for name in (*VECTORS["load"], *VECTORS["load"]["kv_blocks"], *ORDER):
        assert f'"{name}"' in page or f"`{name}`" in page, name
