"""Request options: each does what OpenAI's or vLLM's documentation says, streamed or not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from eventually import eventually
from tandem_worker.server.worker import Worker

Greedy = Callable[[list[int], int], list[int]]
PROMPT = "the quick brown fox"


class Client:
    """Talks to one worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    async def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.worker.url, timeout=60) as client:
            return await client.post(path, json=body, headers={"x-tandem-token-ids": "1"})

    async def choices(self, **body: Any) -> list[dict[str, Any]]:
        reply = await self.post(**({"prompt": PROMPT, "temperature": 0, "max_tokens": 12} | body))
        assert reply.status_code == 200, reply.text
        choices: list[dict[str, Any]] = reply.json()["choices"]
        return choices

    async def stream(self, **body: Any) -> list[dict[str, Any]]:
        """The choices of all chunks."""
        reply = await self.post(
            **({"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "stream": True} | body)
        )
        lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
        assert lines[-1] == "[DONE]"
        return [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]


@pytest.fixture
async def client(start_worker: Any) -> Client:
    return Client(await start_worker())


async def test_several_prompts_and_choices_are_numbered_prompt_by_prompt(client: Client) -> None:
    choices = await client.choices(prompt=["hello", PROMPT], n=2, temperature=1, seed=4)
    alone = await client.choices(prompt="hello", n=2, temperature=1, seed=4)

    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [c["token_ids"] for c in choices[:2]] == [c["token_ids"] for c in alone]
    assert len({tuple(choice["token_ids"]) for choice in choices}) == 4


async def test_usage_counts_the_cached_prompt_once_whatever_n(client: Client) -> None:
    reply = await client.post(prompt=[7] * 130, n=4, temperature=1, max_tokens=2)

    usage = reply.json()["usage"]
    assert usage["prompt_tokens"] == 130
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0

    again = await client.post(prompt=[7] * 130, n=4, temperature=1, max_tokens=2)
    assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 128


async def test_only_requests_of_one_cache_salt_share_a_prefix(client: Client) -> None:
    """Else a tenant could learn from `cached_tokens`, or the time, what another one has sent."""
    cached = []
    for salt in ("mine", "mine", "yours", None):
        body = {"prompt": [7] * 130, "max_tokens": 1}
        reply = await client.post(**body | ({"cache_salt": salt} if salt else {}))
        cached.append(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    refused = await client.post(prompt="x", cache_salt="")

    assert cached == [0, 128, 0, 0]
    assert refused.status_code == 400
    assert "cache_salt='' must be a string" in refused.json()["error"]["message"]


async def test_a_temperature_next_to_nothing_is_greedy(client: Client) -> None:
    """Logits divided by it would overflow and make the first large one win."""
    (greedy_choice,) = await client.choices()
    (cold,) = await client.choices(temperature=1e-40, top_p=0.9)

    assert cold["token_ids"] == greedy_choice["token_ids"]


async def test_streamed_choices_are_the_whole_ones(client: Client) -> None:
    body = {"n": 3, "temperature": 1.0, "seed": 9, "logprobs": 2, "echo": True}

    whole = await client.choices(**body)
    chunks = await client.stream(**body)

    for choice in whole:
        mine = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in mine) == choice["text"]
        assert [t for chunk in mine for t in chunk["token_ids"]] == choice["token_ids"]
        for key in ("tokens", "text_offset", "token_logprobs"):
            joined = [v for chunk in mine for v in (chunk["logprobs"] or {key: []})[key]]
            # Who else is in a step, and so float32 rounding, differs from run to run.
            assert joined in (
                choice["logprobs"][key],
                pytest.approx(choice["logprobs"][key], abs=2e-4),
            )


async def test_every_choice_of_a_stream_resumes_where_it_was(client: Client) -> None:
    body = {"n": 2, "temperature": 1.0, "seed": 9, "max_tokens": 10}
    chunks = await client.stream(**body)
    per_choice = [[c for c in chunks if c["index"] == index] for index in range(2)]
    sent = [
        [t for c in per_choice[0][:3] for t in c["token_ids"]],
        [t for c in per_choice[1] for t in c["token_ids"]],  # this one was complete
    ]

    resumed = await client.stream(**body, tandem={"resume_token_ids": sent})

    assert resumed == per_choice[0][3:]


async def test_a_resumed_stream_keeps_the_text_offsets_of_its_logprobs(client: Client) -> None:
    body = {"logprobs": 1, "echo": True, "max_tokens": 8}
    chunks = await client.stream(**body)
    tokens = [t for chunk in chunks for t in chunk["token_ids"]]

    resumed = await client.stream(**body, tandem={"resume_token_ids": [tokens[:4]]})

    rest = [chunk for chunk in chunks if chunk["token_ids"]][4:]
    assert [c["text"] for c in resumed] == [c["text"] for c in rest]
    for mine, theirs in zip(resumed, rest, strict=True):
        assert mine["logprobs"]["text_offset"] == theirs["logprobs"]["text_offset"]
        assert mine["logprobs"]["token_logprobs"] == pytest.approx(
            theirs["logprobs"]["token_logprobs"], abs=1e-4
        )


async def test_a_stop_token_ends_the_answer(client: Client) -> None:
    (full,) = await client.choices()
    third = full["token_ids"][2]

    (choice,) = await client.choices(stop_token_ids=[third])

    assert choice["token_ids"] == full["token_ids"][: full["token_ids"].index(third) + 1]
    assert choice["finish_reason"] == "stop"


async def test_the_end_token_can_be_forced_forbidden_and_ignored(client: Client) -> None:
    (forced,) = await client.choices(logit_bias={"1": 100})
    (delayed,) = await client.choices(logit_bias={"1": 100}, min_tokens=3)
    (ignored,) = await client.choices(logit_bias={"1": 100}, ignore_eos=True)

    assert (forced["token_ids"], forced["finish_reason"], forced["text"]) == ([1], "stop", "")
    assert len(delayed["token_ids"]) == 4
    assert delayed["token_ids"][-1] == 1
    assert ignored["token_ids"] == [1] * 12
    assert ignored["finish_reason"] == "length"


async def test_penalties_stop_repetition(client: Client) -> None:
    body = {"logit_bias": {"40": 100, "41": 99}}

    (plain,) = await client.choices(**body)
    (penalised,) = await client.choices(**body, frequency_penalty=2.0)

    assert plain["token_ids"] == [40] * 12
    assert set(penalised["token_ids"]) == {40, 41}


async def test_token_prompts_answer_like_text_prompts(client: Client) -> None:
    ids = client.worker.tokenizer.encode(PROMPT)

    assert await client.choices(prompt=ids) == await client.choices(prompt=PROMPT)


async def test_a_seed_decides_and_no_seed_does_not(client: Client) -> None:
    body = {"temperature": 1.5, "max_tokens": 16}

    seeded = [await client.choices(**body, seed=-3) for _ in range(2)]
    free = [await client.choices(**body) for _ in range(2)]

    assert seeded[0] == seeded[1]
    assert free[0] != free[1]


async def test_a_context_can_be_filled_to_its_last_token(client: Client, greedy: Greedy) -> None:
    limit = client.worker.max_model_len
    prompt = [5, 9, 13, 60] * (limit // 4)
    prompt = prompt[: limit - 3]

    (choice,) = await client.choices(prompt=prompt, max_tokens=3)
    refused = await client.post(prompt=prompt, max_tokens=4)

    assert choice["token_ids"] == greedy(prompt, 3)
    assert refused.json()["error"]["code"] == "context_length_exceeded"


async def test_a_full_queue_answers_429_with_retry_after(start_worker: Any) -> None:
    client = Client(await start_worker(max_num_seqs=1, max_waiting=2))
    body = {"prompt": PROMPT, "max_tokens": 100, "ignore_eos": True}
    running = [asyncio.create_task(client.post(**body)) for _ in range(3)]
    await eventually(lambda: client.worker.engine.load.num_waiting >= 2)

    refused = await client.post(**body)

    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "queue_full"
    for task in running:
        assert (await task).status_code == 200


@pytest.mark.parametrize("order", ["mlfq", "sjf", "edf"])
async def test_every_order_gives_the_same_answers(
    start_worker: Any, greedy: Greedy, order: str
) -> None:
    client = Client(await start_worker(scheduler=order, max_num_seqs=2, num_kv_blocks=20))
    tokenizer = client.worker.tokenizer
    prompts = [tokenizer.encode(text) for text in ("hello", PROMPT * 9, "a router", "lazy dog")]

    answers = await asyncio.gather(*(client.choices(prompt=p) for p in prompts))

    for prompt, (choice,) in zip(prompts, answers, strict=True):
        assert choice["token_ids"] == greedy(prompt, 12)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"prompt": "x", "max_tokens": 1e400}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "stop": [1]}',
        b'{"prompt": "x", "logit_bias": {"a": 1}}',
        b'{"prompt": "x", "logit_bias": {"\xc2\xb2": 1}}',
        b'{"prompt": "x", "logit_bias": {"1": 1' + b"0" * 400 + b"}}",
        b'{"prompt": "x", "temperature": 1' + b"0" * 400 + b"}",
        b'{"prompt": "x", "seed": 1.5}',
        b'{"prompt": "x", "tandem": {"resume_token_ids": [[-1]]}}',
        b'{"prompt": "x", "stream_options": 3}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
async def test_no_completion_body_gets_more_than_an_error_object(
    client: Client, body: bytes
) -> None:
    async with httpx.AsyncClient(base_url=client.worker.url, timeout=60) as http:
        reply = await http.post("/v1/completions", content=body)

    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["message"]


async def test_no_template_variable_gets_more_than_an_error_object(client: Client) -> None:
    for name in ("self", "messages", "bos_token"):
        reply = await client.post(
            "/v1/chat/completions",
            messages=[{"role": "user", "content": "x"}],
            chat_template_kwargs={name: 1},
            max_tokens=1,
        )

        assert reply.status_code in (200, 400), (name, reply.text)
