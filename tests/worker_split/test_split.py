"""Prefill and decode in different processes: the answer is that of one worker, and of transformers.

Whatever happens to the prefill worker, a request is delayed and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eventually import eventually

pytestmark = pytest.mark.slow  # each worker process imports torch

VOCABULARY = 512
MAX_TOKENS = 6
Start = Callable[..., Awaitable[list[Any]]]


def make_prompts(num_prompts: int) -> list[list[int]]:
    """Short and long; a third of them share a long prefix with an earlier one, some are repeats."""
    rng = random.Random(11)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(2, VOCABULARY) for _ in range(count)]

    stems = [tokens(rng.choice([64, 100, 128, 300, 512])) for _ in range(10)]
    prompts: list[list[int]] = [tokens(length) for length in (1, 2, 63, 64, 65, 127, 128, 129, 900)]
    while len(prompts) < num_prompts:
        kind = rng.randrange(6)
        if kind < 2:
            prompts.append(tokens(rng.randint(1, 60)))
        elif kind == 2:
            prompts.append(tokens(rng.randint(61, 600)))
        elif kind == 3:
            prompts.append(rng.choice(prompts))
        else:
            prompts.append(rng.choice(stems) + tokens(rng.randint(0, 90)))
    return prompts


def is_greedy(reference: Any, prompt: list[int], answer: list[int]) -> bool:
    """Whether transformers, given the prompt and the answer so far, always picks the next token."""
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + answer[:-1]])).logits[0]
    picked: list[int] = logits[len(prompt) - 1 :].argmax(-1).tolist()
    return picked == answer


async def gather_limited(limit: int, calls: list[Callable[[], Awaitable[Any]]]) -> list[Any]:
    gate = asyncio.Semaphore(limit)

    async def one(call: Callable[[], Awaitable[Any]]) -> Any:
        async with gate:
            return await call()

    return await asyncio.gather(*(one(call) for call in calls))


async def test_200_prompts_and_samples_are_the_same_split_unified_and_in_transformers(
    start: Start, reference: Any
) -> None:
    unified, prefill, decode = await start(
        "unified", "prefill", "decode", transfer={"checksum": True}
    )
    prompts = make_prompts(210)
    settings = {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True}

    alone = await gather_limited(
        8, [lambda p=prompt: unified.complete(p, **settings) for prompt in prompts]
    )
    split = await gather_limited(
        8, [lambda p=prompt: decode.complete(p, prefill.url, **settings) for prompt in prompts]
    )

    answers: dict[tuple[int, ...], list[int]] = {}
    for prompt, one, other in zip(prompts, alone, split, strict=True):
        assert one["token_ids"] == other["token_ids"], f"prompt of {len(prompt)} tokens"
        assert len(one["token_ids"]) == MAX_TOKENS
        answers.setdefault(tuple(prompt), one["token_ids"])
        assert answers[tuple(prompt)] == one["token_ids"], "a repeated prompt"
    for prompt_key, answer in answers.items():
        assert is_greedy(reference, list(prompt_key), answer), f"{len(prompt_key)} tokens"
    assert await decode.metric("tandem_worker_remote_prefills_total") == len(prompts)
    assert await decode.metric("tandem_worker_remote_prefill_failures_total") == 0
    assert await decode.metric("vllm:prefix_cache_hits_total") > 0
    assert await decode.metric("tandem_worker_kv_received_bytes_total") > 0
    for worker in (unified, prefill, decode):
        await worker.idle()

    for number, prompt in enumerate(prompts[:24]):
        sampling = {"seed": 1000 + number, "max_tokens": 12, "temperature": 0.9, "top_p": 0.95}
        one = await unified.complete(prompt, **sampling)
        other = await decode.complete(prompt, prefill.url, **sampling)
        assert one["token_ids"] == other["token_ids"], f"seed {sampling['seed']}"
        assert one["text"] == other["text"]

    link = await prefill.client.post(
        "/internal/kv-link", json={"address": (await decode.load())["kv_address"]}
    )
    assert link.status_code == 200
    assert link.json()["ok"], link.text

    assert [await worker.stop() for worker in (unified, prefill, decode)] == [0, 0, 0]


async def busy(worker: Any) -> None:
    """Wait until the worker is computing a prefill."""

    async def computes() -> bool:
        load = await worker.load()
        return bool(load["num_running"] and load["pending_prefill_tokens"])

    await eventually(computes, 60.0, 0.002)


async def test_killed_and_frozen_prefill_workers_only_delay_and_a_killed_decode_leaks_nothing(
    start: Start, reference: Any
) -> None:
    # small steps: a prefill takes long enough to be met in the middle
    killed, frozen, decode = await start(
        "prefill",
        "prefill",
        "decode",
        max_batched_tokens=16,
        transfer={"reserve_timeout_s": 2.0, "attempts": 1},
    )
    prompt = make_prompts(9)[8]
    settings = {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True}

    request = asyncio.create_task(decode.complete(prompt, killed.url, **settings))
    await busy(killed)
    killed.kill()
    answer = await request
    assert is_greedy(reference, prompt, answer["token_ids"])
    assert await decode.metric("tandem_worker_remote_prefills_total") == 0
    assert await decode.metric("tandem_worker_local_prefill_fallbacks_total") == 1
    await decode.idle()

    # the next request meets a worker that is not there
    answer = await decode.complete(prompt[1:200], killed.url, **settings)
    assert is_greedy(reference, prompt[1:200], answer["token_ids"])

    request = asyncio.create_task(decode.complete(prompt[2:], frozen.url, **settings))
    await busy(frozen)
    frozen.kill(signal.SIGSTOP)
    answer = await request
    assert is_greedy(reference, prompt[2:], answer["token_ids"])
    assert await decode.metric("tandem_worker_local_prefill_fallbacks_total") == 3
    await decode.idle()

    # woken again, its late writes find no reservation, and it serves on
    frozen.kill(signal.SIGCONT)
    answer = await decode.complete(prompt[3:300], frozen.url, **settings)
    assert is_greedy(reference, prompt[3:300], answer["token_ids"])
    assert await decode.metric("tandem_worker_remote_prefills_total") == 1
    await frozen.idle()
    await decode.idle()

    request = asyncio.create_task(decode.complete(prompt[4:], frozen.url, max_tokens=4))
    await busy(frozen)
    decode.kill()
    await asyncio.gather(request, return_exceptions=True)
    await frozen.idle()
    assert (await frozen.client.get("/health")).status_code == 200


async def test_a_taken_kv_port_ends_a_worker_with_a_sentence(
    tiny_llama: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = {"served_model": "tiny", "role": "decode", "num_kv_blocks": 32}
        config["kv_port"] = taken.getsockname()[1]
        (tmp_path / "config.json").write_text(json.dumps(config))

        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tandem_worker", "--config", str(tmp_path / "config.json")),
            *("--weights", str(tiny_llama), "--host", "127.0.0.1", "--port", "0"),
            stderr=asyncio.subprocess.PIPE,
        )
        _, stderr = await asyncio.wait_for(process.communicate(), 90)

    assert process.returncode == 1
    assert "choose another kv_port" in stderr.decode()
    assert "Traceback" not in stderr.decode()
