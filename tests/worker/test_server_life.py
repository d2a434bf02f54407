"""A worker among its clients and peers: refusals, tokens, leaving, draining, health."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest

from ask_kit import PROMPTS, Greedy, post, stream, token_ids
from eventually import eventually
from tandem_worker.errors import InvariantError


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/completions", {}, 400, "prompt is required"),
        ("/v1/completions", {"prompt": "x", "temperature": 9}, 400, "temperature=9 must be"),
        (
            "/v1/completions",
            {"prompt": "x", "max_tokens": 5000},
            400,
            "maximum context length is 1024",
        ),
        ("/v1/completions", {"prompt": [7, 9999]}, 400, "vocabulary ends at 511"),
        ("/v1/completions", {"prompt": "x", "n": 0}, 400, "n=0 must be at least 1"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages=[] must have at least 1"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "tools": [{}]},
            400,
            "tools[0]={} must be",
        ),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "x"}],
                "response_format": {"type": "xml"},
            },
            400,
            "response_format.type='xml' must be",
        ),
        ("/v1/nothing", {}, 404, "there is no route"),
        ("/v1/models", {}, 405, "POST is not allowed"),
    ],
)
async def test_errors_are_openai_objects(
    start_worker: Any, path: str, body: dict[str, Any], status: int, said: str
) -> None:
    worker = await start_worker()

    reply = await post(worker, path, body)

    assert reply.status_code == status
    error = reply.json()["error"]
    assert said in error["message"]
    assert set(error) - {"doc_url"} == {"message", "type", "param", "code"}
    if error["code"] is not None:
        async with httpx.AsyncClient(base_url=worker.url) as client:
            assert (await client.get(error["doc_url"])).text.startswith(error["code"])


async def test_internal_and_model_routes_need_the_peer_token(start_worker: Any) -> None:
    worker = await start_worker(token=b"secret")

    for path in ("/v1/completions", "/internal/prefill"):
        assert (await post(worker, path, {"prompt": "x"})).status_code == 401
    known = await post(worker, "/v1/completions", {"prompt": "x"}, x_tandem_peer_token="secret")

    assert known.status_code == 200


async def test_while_the_token_changes_a_worker_takes_the_old_and_the_new(
    start_worker: Any,
) -> None:
    tokens = [b"old"]
    worker = await start_worker(token=lambda: tuple(tokens))

    async def status(token: str) -> int:
        body = {"prompt": "x", "max_tokens": 1}
        reply = await post(worker, "/v1/completions", body, x_tandem_peer_token=token)
        return reply.status_code

    answers = []
    for now in ([b"old"], [b"new", b"old"], [b"new"]):
        tokens[:] = now
        assert worker.peer_token == now[0]
        answers.append((await status("old"), await status("new")))

    assert answers == [(200, 401), (200, 200), (401, 200)]


async def test_two_requests_of_one_id_do_not_disturb_each_other(
    start_worker: Any, greedy: Greedy
) -> None:
    """A retry can reach the worker before it has seen that the first connection is gone."""
    worker = await start_worker()
    prompts = [worker.tokenizer.encode(text) for text in PROMPTS[:2]]
    bodies = [{"prompt": p, "temperature": 0, "max_tokens": 30} for p in prompts]

    answers = await asyncio.gather(
        *(stream(worker, "/v1/completions", body, x_request_id="same") for body in bodies)
    )
    abandoned = asyncio.create_task(
        post(worker, "/v1/completions", bodies[0] | {"max_tokens": 900}, x_request_id="same")
    )
    await eventually(lambda: worker.num_requests)
    retried = asyncio.create_task(stream(worker, "/v1/completions", bodies[0], x_request_id="same"))
    abandoned.cancel()
    async with asyncio.timeout(20):
        again = await retried

    for prompt, events in zip([*prompts, prompts[0]], [*answers, again], strict=True):
        assert token_ids(events) == greedy(prompt, 30)


async def test_a_client_that_leaves_frees_its_blocks(start_worker: Any) -> None:
    worker = await start_worker(prefix_cache=False)
    body = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}

    async with (
        httpx.AsyncClient(base_url=worker.url) as client,
        client.stream("POST", "/v1/completions", json=body) as reply,
    ):
        await anext(reply.aiter_lines())
    await eventually(lambda: not worker.num_requests and worker.engine.load.is_idle)

    assert await worker.engine.call(lambda core: core.scheduler.blocks.num_used) == 0


async def test_a_draining_worker_finishes_what_runs_and_refuses_the_rest(
    start_worker: Any,
) -> None:
    worker = await start_worker()
    body = {"prompt": "x", "max_tokens": 60, "ignore_eos": True}
    running = asyncio.create_task(post(worker, "/v1/completions", body))
    await eventually(lambda: worker.num_requests)

    drained = asyncio.create_task(worker.drain(30))
    await asyncio.sleep(0)
    refused = await post(worker, "/v1/completions", body)
    async with httpx.AsyncClient(base_url=worker.url) as client:
        ready = await client.get("/ready")

    assert refused.status_code == 503
    assert refused.headers["x-tandem-draining"] == "1"
    assert ready.status_code == 503
    assert (await running).json()["usage"]["completion_tokens"] == 60
    assert await drained


async def test_draining_waits_for_a_request_whose_prompt_is_being_tokenized(
    start_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await start_worker()
    begun, go_on = threading.Event(), threading.Event()
    encode = worker.tokenizer.encode

    def slow(text: str, **options: Any) -> list[int]:
        begun.set()
        go_on.wait(20)
        return encode(text, **options)

    monkeypatch.setattr(worker.tokenizer, "encode", slow)
    body = {"prompt": "a" * 9000, "max_tokens": 1}  # tokenized in another thread
    asking = asyncio.create_task(post(worker, "/v1/completions", body))
    await asyncio.to_thread(begun.wait, 20)

    drained = asyncio.create_task(worker.drain(30))
    await asyncio.sleep(0)
    counted = worker.num_requests
    go_on.set()

    assert counted == 1
    assert (await asking).status_code in (200, 400)
    assert await drained


async def test_load_and_metrics_tell_what_the_router_needs(start_worker: Any) -> None:
    worker = await start_worker("decode")
    await post(worker, "/v1/completions", {"prompt": "x", "max_tokens": 12, "ignore_eos": True})

    async with httpx.AsyncClient(base_url=worker.url) as client:
        load = (await client.get("/v1/load")).json()
        metrics = (await client.get("/metrics")).text
        models = (await client.get("/v1/models")).json()

    assert load["role"] == "decode"
    assert load["ready"] is True
    assert load["kv_address"].startswith("127.0.0.1:")
    blocks = load["kv_blocks"]
    assert blocks["free"] + blocks["cached"] + blocks["used"] == blocks["total"] == 64
    assert 'vllm:generation_tokens_total{model_name="tiny"} 12.0' in metrics
    assert models["data"][0]["id"] == "tiny"


async def test_a_worker_with_inconsistent_blocks_reports_itself_unhealthy(
    start_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem_worker.engine.thread.CHECK_EVERY_S", 0.0)
    worker = await start_worker()
    blocks = worker.engine.core.scheduler.blocks

    def lost() -> None:
        raise InvariantError("a block is lost")

    async with httpx.AsyncClient(base_url=worker.url) as client:
        healthy = await client.get("/health")
        monkeypatch.setattr(blocks, "check", lost)
        for _ in range(1000):  # a call may be answered just before the engine's next look
            await worker.engine.call(lambda core: None)
            if worker.engine.broken is not None:
                break
        sick, ready = await client.get("/health"), await client.get("/ready")

    assert healthy.status_code == 200
    assert (sick.status_code, ready.status_code) == (503, 503)
    assert "inconsistent" in sick.json()["message"]


async def test_a_worker_whose_steps_all_fail_reports_itself_unhealthy(
    start_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await start_worker()

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as broken:
        broken.setattr(worker.engine.core.runner, "execute", fail)
        replies = [await post(worker, "/v1/completions", {"prompt": "x"})]
        once = worker.failure
        replies += [await post(worker, "/v1/completions", {"prompt": "x"}) for _ in range(2)]

    assert [reply.status_code for reply in replies] == [500, 500, 500]
    assert once is None
    assert worker.failure == "3 steps in a row have failed"
    async with httpx.AsyncClient(base_url=worker.url) as client:
        health, ready = await client.get("/health"), await client.get("/ready")
    assert (health.status_code, ready.status_code) == (503, 503)
    assert ready.json() == {"status": "failed"}


async def test_a_step_that_hangs_makes_the_worker_unhealthy_until_it_ends(
    start_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await start_worker()
    runner = worker.engine.core.runner
    execute, entered, go_on = runner.execute, threading.Event(), threading.Event()

    def hang(*arguments: Any) -> Any:
        entered.set()
        go_on.wait(30)
        return execute(*arguments)

    monkeypatch.setattr(runner, "execute", hang)
    answer = asyncio.create_task(post(worker, "/v1/completions", {"prompt": "x", "max_tokens": 1}))
    await asyncio.to_thread(entered.wait, 30)
    async with httpx.AsyncClient(base_url=worker.url) as client:
        early = await client.get("/health")
        monkeypatch.setattr("tandem_worker.engine.thread.HANG_S", 0.0)
        late = await client.get("/health")
        go_on.set()
        served = await answer
        monkeypatch.undo()
        after = await client.get("/health")

    assert [early.status_code, late.status_code, after.status_code] == [200, 503, 200]
    assert "a step hangs" in late.json()["message"]
    assert served.status_code == 200
