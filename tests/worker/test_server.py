"""What a client of one worker is answered: greedy truth, streams, resumption, scores."""

from __future__ import annotations

import asyncio
import math
import socket
from typing import Any

import httpx
import pytest

from ask_kit import PROMPTS, Greedy, post, stream, text_of, token_ids
from tandem_worker.server.http_server import HttpServer, listen, url_of


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


async def test_echo_returns_the_prompt_as_it_was_given(start_worker: Any) -> None:
    worker = await start_worker()
    given = "</s> two  spaces\r\n"

    reply = await post(worker, "/v1/completions", {"prompt": given, "echo": True, "max_tokens": 0})

    assert reply.json()["choices"][0]["text"] == given
