"""Which answers are the same whoever computes them: all in float32, nearly all in 16 bits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ask_kit import post

NUM_PROMPTS, NUM_TOKENS = 16, 16
# Log-probabilities of two tokens that 16 bits cannot tell apart for certain.
NEAR_TIE = {"bfloat16": 0.25, "float16": 0.05}


async def answers(worker: Any, together: bool) -> list[dict[str, Any]]:
    """The log-probabilities of each greedy answer; batched, or one after the other."""

    async def ask(number: int) -> dict[str, Any]:
        body = {
            "prompt": [5 + number, *range(20, 40), 7 + 3 * number],
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 2,
        }
        reply = await post(worker, "/v1/completions", body)
        return dict(reply.json()["choices"][0]["logprobs"])

    if together:
        return await asyncio.gather(*map(ask, range(NUM_PROMPTS)))
    return [await ask(number) for number in range(NUM_PROMPTS)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
async def test_a_greedy_answer_depends_on_its_batch_only_in_16_bits_and_only_at_near_ties(
    start_worker: Any, dtype: str
) -> None:
    worker = await start_worker(dtype=dtype, prefix_cache=False, num_kv_blocks=128)

    alone, batched = await answers(worker, False), await answers(worker, True)

    gaps = []
    for one, other in zip(alone, batched, strict=True):
        assert len(one["tokens"]) == len(other["tokens"]) == NUM_TOKENS
        parted = [i for i in range(NUM_TOKENS) if one["tokens"][i] != other["tokens"][i]]
        if parted:
            first, second = sorted(one["top_logprobs"][parted[0]].values(), reverse=True)[:2]
            gaps.append(first - second)
    if dtype == "float32":
        assert gaps == []
    else:
        assert all(gap <= NEAR_TIE[dtype] for gap in gaps), gaps
