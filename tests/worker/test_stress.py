"""Everything at once: little memory, clients that leave, peers that fail; answers stay exact."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import httpx

from eventually import eventually

Greedy = Callable[[list[int], int], list[int]]


async def test_answers_stay_exact_when_blocks_run_short_and_clients_leave(
    start_worker: Any, greedy: Greedy
) -> None:
    prefill = await start_worker("prefill", num_kv_blocks=12, max_model_len=320)
    decode = await start_worker(
        "decode", num_kv_blocks=9, max_model_len=320, local_prefill_max_tokens=40
    )
    rng = random.Random(5)
    shared = [rng.randrange(2, 400) for _ in range(260)]
    jobs = [
        (shared[: rng.randrange(1, 260)], rng.randrange(1, 25), rng.random() < 0.3)
        for _ in range(40)
    ]
    urls = [prefill.url, prefill.url, prefill.url, "http://127.0.0.1:9"]

    async def ask(
        number: int, prompt: list[int], max_tokens: int, leaves: bool
    ) -> list[int] | None:
        await asyncio.sleep(rng.random() * 0.5)
        async with httpx.AsyncClient(base_url=decode.url, timeout=60) as client:
            request = client.post(
                "/v1/completions",
                json={"prompt": prompt, "temperature": 0, "max_tokens": max_tokens},
                headers={"x-tandem-token-ids": "1", "x-tandem-prefill": urls[number % 4]},
            )
            if leaves:
                try:
                    await asyncio.wait_for(request, rng.random() * 0.2)
                except TimeoutError:
                    return None
            reply = await request if not leaves else None
            if reply is None:
                return None
            assert reply.status_code == 200, reply.text
            tokens: list[int] = reply.json()["choices"][0]["token_ids"]
            return tokens

    answers = await asyncio.gather(*(ask(i, *job) for i, job in enumerate(jobs)))

    for answer, (prompt, max_tokens, leaves) in zip(answers, jobs, strict=True):
        if not leaves:
            assert answer == greedy(prompt, max_tokens)
    for worker in (decode, prefill):

        async def none_used(worker: Any = worker) -> bool:
            return not await worker.engine.call(lambda core: core.scheduler.blocks.num_used)

        await eventually(none_used)
        await worker.engine.call(lambda core: core.scheduler.blocks.check())
