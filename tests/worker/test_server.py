"""What a client of one worker sees: greedy truth, streams, errors, resumption, draining."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from eventually import eventually
from tandem_worker.errors import InvariantError
from tandem_worker.server.http_server import HttpServer, listen, url_of
from tandem_worker.server.worker import Worker

PROMPTS = [
    "the quick brown fox",
    "hello",
    "a router sends each question to a small or a large model " * 12,
    "你好世界 naïve café 🙂",
]
Greedy = Callable[[list[int], int], list[int]]


async def post(worker: Worker, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx.AsyncClient(base_url=worker.url, timeout=60) as client:
        return await client.post(path, json=body, headers=named)


async def stream(
    worker: Worker, path: str, body: dict[str, Any], **headers: str
) -> list[dict[str, Any]]:
    """The events of a streamed answer, [DONE] checked and removed."""
    named = {"x-tandem-token-ids": "1"} | {k.replace("_", "-"): v for k, v in headers.items()}
    events = []
    async with (
        httpx.AsyncClient(base_url=worker.url, timeout=60) as client,
        client.stream("POST", path, json=body | {"stream": True}, headers=named) as reply,
    ):
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def token_ids(events: list[dict[str, Any]], index: int = 0) -> list[int]:
    return [
        token
        for event in events
        for choice in event["choices"]
        if choice["index"] == index
        for token in choice["token_ids"]
    ]


def text_of(events: list[dict[str, Any]], index: int = 0) -> str:
    parts = []
    for event in events:
        for choice in event["choices"]:
            if choice["index"] == index:
                parts.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
    return "".join(parts)


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """The smallest ASGI application."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


async def test_connections_send_each_token_at_once() -> None:
    """Held back until the router's delayed acknowledgement, a token would be 40 ms late."""
    listener = listen("127.0.0.1", 0)
    server = HttpServer(hello, listener)
    await server.start()
    async with httpx.AsyncClient(base_url=url_of(*listener.getsockname())) as client:
        await client.get("/")

        options = [s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for s in server.sockets]

    await server.stop()
    assert options
    assert all(options)


async def test_greedy_answers_are_those_of_transformers(start_worker: Any, greedy: Greedy) -> None:
    worker = await start_worker()
    prompts = [worker.tokenizer.encode(prompt) for prompt in PROMPTS]

    answers = await asyncio.gather(
        *(
            stream(worker, "/v1/completions", {"prompt": p, "temperature": 0, "max_tokens": 30})
            for p in prompts
        )
    )

    for prompt, events in zip(prompts, answers, strict=True):
        assert token_ids(events) == greedy(prompt, 30)


async def test_a_prefix_hit_changes_nothing_but_the_usage(
    start_worker: Any, greedy: Greedy
) -> None:
    worker = await start_worker()
    prompt = worker.tokenizer.encode(PROMPTS[2])
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 20}

    first = await stream(worker, "/v1/completions", body, x_tandem_usage="1")
    second = await stream(worker, "/v1/completions", body, x_tandem_usage="1")

    assert token_ids(first) == token_ids(second) == greedy(prompt, 20)
    cached = [e[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] for e in (first, second)]
    assert cached[0] == 0
    assert cached[1] == len(prompt) // 64 * 64 > 0


async def test_chat_streams_role_text_reason_and_usage(start_worker: Any) -> None:
    worker = await start_worker()
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        "max_tokens": 5,
        "stream_options": {"include_usage": True},
    }

    events = await stream(
        worker,
        "/v1/chat/completions",
        body,
        x_request_id="abc",
        x_tandem_created="7",
        x_tandem_model="routed",
        x_tandem_seed="1",
    )

    head = {key: events[0][key] for key in ("id", "object", "created", "model")}
    assert head == {
        "id": "chatcmpl-abc",
        "object": "chat.completion.chunk",
        "created": 7,
        "model": "routed",
    }
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-2]["choices"][0]["finish_reason"] in ("length", "stop")
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == len(token_ids(events))


async def test_whole_and_streamed_answers_are_equal(start_worker: Any) -> None:
    worker = await start_worker()
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 20,
        "n": 2,
        "seed": 11,
    }

    whole = (await post(worker, "/v1/chat/completions", body)).json()
    events = await stream(worker, "/v1/chat/completions", body)

    for choice in whole["choices"]:
        assert choice["message"]["content"] == text_of(events, choice["index"])
    assert whole["choices"][0]["message"] != whole["choices"][1]["message"]


async def test_the_same_seed_gives_the_same_sample_in_any_company(start_worker: Any) -> None:
    worker = await start_worker()
    body = {"prompt": PROMPTS[0], "max_tokens": 25, "seed": 5, "top_p": 0.95, "top_k": 50}

    alone = await stream(worker, "/v1/completions", body)
    other = {"prompt": PROMPTS[1], "max_tokens": 40, "temperature": 1.5}
    crowd = await asyncio.gather(
        stream(worker, "/v1/completions", body),
        *(stream(worker, "/v1/completions", other | {"seed": seed}) for seed in range(4)),
    )
    by_header = await stream(
        worker,
        "/v1/completions",
        {k: v for k, v in body.items() if k != "seed"},
        x_tandem_seed="5",
    )

    assert token_ids(alone) == token_ids(crowd[0]) == token_ids(by_header)


@pytest.mark.parametrize("cut", [0, 1, 2, 7, 16])
@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"seed": 3, "frequency_penalty": 0.5, "stop": ["q", "zz"]}],
    ids=["greedy", "sampled"],
)
async def test_a_resumed_stream_continues_byte_for_byte(
    start_worker: Any, cut: int, settings: dict[str, Any]
) -> None:
    first, second = await start_worker(), await start_worker()
    body = {
        "messages": [{"role": "user", "content": PROMPTS[3]}],
        "max_tokens": 24,
        "stream_options": {"include_usage": True},
        **settings,
    }
    headers = {"x_request_id": "r", "x_tandem_created": "1"}
    events = await stream(first, "/v1/chat/completions", body, **headers)

    sent = token_ids(events)[:cut]
    resumed = await stream(
        second, "/v1/chat/completions", body | {"tandem": {"resume_token_ids": [sent]}}, **headers
    )

    for usage in (events[-1]["usage"], resumed[-1]["usage"]):
        del usage["prompt_tokens_details"]  # the second worker had no such prefix
    assert resumed == events[len(sent) :]


async def test_a_stream_that_was_complete_resumes_to_its_end(start_worker: Any) -> None:
    worker = await start_worker()
    body = {"prompt": "hello", "max_tokens": 4, "temperature": 0}
    events = await stream(worker, "/v1/completions", body)

    resumed = await stream(
        worker,
        "/v1/completions",
        body | {"tandem": {"resume_token_ids": [token_ids(events)]}},
        x_tandem_usage="1",
    )

    assert [event["choices"] for event in resumed] == [[]]
    assert resumed[0]["usage"]["completion_tokens"] == 4


async def test_stop_strings_end_the_answer_and_are_cut_off(start_worker: Any) -> None:
    worker = await start_worker()
    body = {"prompt": PROMPTS[0], "max_tokens": 30, "temperature": 0}
    full = (await post(worker, "/v1/completions", body)).json()["choices"][0]["text"]
    stop = full[5:8]

    events = await stream(worker, "/v1/completions", body | {"stop": stop})

    assert text_of(events) == full[: full.index(stop)]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


async def test_echo_scores_the_prompt(start_worker: Any, reference: Any) -> None:
    import torch

    worker = await start_worker()
    prompt = worker.tokenizer.encode(PROMPTS[2])
    body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}

    choice = (await post(worker, "/v1/completions", body)).json()["choices"][0]

    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = expected[:-1].gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert choice["text"] == PROMPTS[2]
    assert choice["logprobs"]["token_logprobs"][0] is None
    torch.testing.assert_close(
        torch.tensor(choice["logprobs"]["token_logprobs"][1:]), expected, atol=2e-4, rtol=0
    )


async def test_chat_logprobs_name_the_chosen_token_first_when_greedy(start_worker: Any) -> None:
    worker = await start_worker()
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 3,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 4,
    }

    reply = (await post(worker, "/v1/chat/completions", body)).json()

    for entry in reply["choices"][0]["logprobs"]["content"]:
        assert len(entry["top_logprobs"]) == 4
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]


async def test_how_sure_the_model_was_is_told_where_the_router_asks_and_nowhere_else(
    start_worker: Any,
) -> None:
    worker = await start_worker()
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0}

    plain = (await post(worker, "/v1/chat/completions", body)).json()
    shown = (await post(worker, "/v1/chat/completions", {**body, "logprobs": True})).json()
    told = (await post(worker, "/v1/chat/completions", body, x_tandem_token_statistics="1")).json()

    drawn = [entry["logprob"] for entry in shown["choices"][0]["logprobs"]["content"]]
    statistics = told["tandem"]["token_statistics"]
    assert statistics["num_tokens"] == len(drawn)
    assert statistics["mean_logprob"] == pytest.approx(sum(drawn) / len(drawn), abs=1e-4)
    assert statistics["lowest_logprob"] == pytest.approx(min(drawn), abs=1e-4)
    assert statistics["doubtful_share"] == sum(p < math.log(0.5) for p in drawn) / len(drawn)
    assert told["choices"][0] == plain["choices"][0]
    assert "tandem" not in plain


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


async def test_tokenize_and_detokenize_are_inverse(start_worker: Any) -> None:
    worker = await start_worker()

    tokens = (await post(worker, "/tokenize", {"prompt": PROMPTS[3]})).json()["tokens"]
    text = (await post(worker, "/detokenize", {"tokens": tokens})).json()["prompt"]

    assert text == PROMPTS[3]


async def test_the_openai_client_can_talk_to_a_worker(start_worker: Any) -> None:
    import openai

    worker = await start_worker()
    client = openai.AsyncOpenAI(base_url=f"{worker.url}/v1", api_key="none")

    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=4,
            stream=True,
        )
    ]
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await client.completions.create(model="tiny", prompt="x", temperature=7)
    await client.close()

    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")


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


async def test_echo_returns_the_prompt_as_it_was_given(start_worker: Any) -> None:
    worker = await start_worker()
    given = "</s> two  spaces\r\n"

    reply = await post(worker, "/v1/completions", {"prompt": given, "echo": True, "max_tokens": 0})

    assert reply.json()["choices"][0]["text"] == given
