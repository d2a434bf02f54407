"""KV blocks of 8 bits: what they do to logits, and that nothing else decides what they hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tandem_kernels.int8_kv import codes_and_scales
from tandem_worker.config import WorkerConfig
from tandem_worker.engine.requests import EngineRequest, Work
from tandem_worker.engine.runner import ModelRunner
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.models.transformer import Transformer
from tandem_worker.scheduling.scheduler import Chunk, Sequence
from tandem_worker.server.worker import Worker

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "window": ("mistral", {"sliding_window": 50}),
    "qk-norm": ("qwen3", {}),
}
TEXT = "a router sends each question to a small or a large model, the quick brown fox "
KINDS = ("int8", "fp8")


def rounded(values: torch.Tensor, kind: str) -> torch.Tensor:
    """What a cache of this kind gives back, written down once more."""
    if kind == "fp8":
        return values.to(torch.float8_e4m3fn).float()
    scale = values.abs().amax(-1, keepdim=True) / 127
    return (values / scale + 0.5).floor() * scale


def runner_of(directory: Path, kind: str, dtype: str = "float32") -> ModelRunner:
    config = WorkerConfig.model_validate(
        {"served_model": "m", "num_kv_blocks": 16, "device": "cpu", "dtype": dtype}
        | {"kv_cache_dtype": kind}
    )
    return ModelRunner(config, directory)


def logits_in(
    runner: ModelRunner, tokens: list[int], sizes: list[int], model: Transformer | None = None
) -> torch.Tensor:
    """Logits of every position, computed in chunks of these sizes; 1 is a decode."""
    model = model or runner.model
    caches = [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in runner.kv_caches]
    sequence = Sequence("s", tokens, len(tokens), block_ids=[5, 2, 9, 1])
    found = []
    for size in sizes:
        work = [Work(Chunk(sequence, sequence.num_computed_tokens, size), EngineRequest(
            sequence, SamplingParams(), lambda event: None))]  # fmt: skip
        with torch.inference_mode():
            batch = runner.pack(work, int(size == 1))
            found.append(model.logits(model.forward(batch, caches)))
        sequence.num_computed_tokens += size
    return torch.cat(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_with_rounded_keys_and_values(
    family: str, kind: str, tmp_path: Path, build_model: Callable[..., Path]
) -> None:
    import transformers

    class Rounding(transformers.DynamicCache):
        def update(self, key_states: Any, value_states: Any, *rest: Any, **more: Any) -> Any:
            return super().update(
                rounded(key_states, kind), rounded(value_states, kind), *rest, **more
            )

    name, options = FAMILIES[family]
    directory = build_model(tmp_path, name, **options)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.manual_seed(4)
    tokens = torch.randint(0, 512, (150,)).tolist()
    with torch.inference_mode():
        ids = torch.tensor([tokens])
        expected = reference(ids, past_key_values=Rounding(), use_cache=True).logits[0]
        exact = reference(ids).logits[0]

    found = logits_in(runner_of(directory, kind), tokens, [150])

    # A value next to the middle of two codes may fall the other way: a last bit decides.
    assert (found - expected).abs().mean() < 0.1 * (exact - expected).abs().mean()
    assert (exact - expected).abs().mean() < 0.15 * exact.std()  # of random weights


@pytest.mark.parametrize("kind", KINDS)
def test_neither_chunks_nor_the_forward_pass_decide_what_is_seen(
    kind: str, tiny_llama: Path
) -> None:
    runner = runner_of(tiny_llama, kind)
    plain = Transformer(runner.own_spec, runner.model.weights, max_positions=1025)
    torch.manual_seed(5)
    tokens = torch.randint(0, 512, (140,)).tolist()
    whole = logits_in(runner, tokens, [140])

    for sizes in ([64, 70, 1, 1, 1, 3], [1, 1, 130, 8]):
        assert (logits_in(runner, tokens, sizes) - whole).abs().median() < 1e-4
    assert (logits_in(runner, tokens, [64, 75, 1], plain) - whole).abs().median() < 1e-4


def test_bytes_of_a_block_are_counted_with_their_scales(tiny_llama: Path) -> None:
    sizes = {kind: runner_of(tiny_llama, kind).block_bytes for kind in ("auto", *KINDS)}

    assert sizes == {
        "auto": 2 * 3 * 2 * 64 * 16 * 4,
        "int8": 2 * 3 * 2 * 64 * (16 + 4),
        "fp8": 2 * 3 * 2 * 64 * 16,
    }
    (k, _), *_ = runner_of(tiny_llama, "int8").kv_caches
    codes, scales = codes_and_scales(k)
    assert codes.shape == (16, 2, 64, 16)
    assert scales.shape == (16, 2, 64)
    assert k.numel() == codes.numel() + 4 * scales.numel()


async def complete(worker: Worker, prompt: list[int], prefill: str = "", **body: Any) -> list[int]:
    headers = {"x-tandem-token-ids": "1"} | ({"x-tandem-prefill": prefill} if prefill else {})
    async with httpx.AsyncClient(base_url=worker.url, timeout=60) as client:
        reply = await client.post(
            "/v1/completions",
            json={"prompt": prompt, "temperature": 0, "max_tokens": 12} | body,
            headers=headers,
        )
    assert reply.status_code == 200, reply.text
    tokens: list[int] = reply.json()["choices"][0]["token_ids"]
    return tokens


@pytest.mark.parametrize("kind", KINDS)
async def test_split_prefix_hits_preemption_and_failover_change_no_token(
    start_worker: Any, kind: str
) -> None:
    """Of this model: a last bit of float32 may move a code, see docs/checkpoints.md."""
    # Random weights lose more than a model would be served with.
    settings = {"kv_cache_dtype": kind, "dtype": "float32", "max_loss": 1.0}
    prefill = await start_worker("prefill", **settings)
    decode = await start_worker("decode", **settings)
    tight = await start_worker(num_kv_blocks=14, max_num_seqs=4, prefix_cache=False, **settings)
    text = decode.tokenizer.encode(TEXT * 12)
    prompts = [text[:length] for length in (1, 64, 65, 200, 333)]

    alone = [await complete(tight, prompt) for prompt in prompts]
    crowded = await asyncio.gather(*(complete(tight, prompt) for prompt in prompts[1:]))
    there = [await complete(decode, prompt, prefill.url) for prompt in prompts]
    again = [await complete(decode, prompt, prefill.url) for prompt in prompts]
    moved = [
        await complete(tight, prompt, tandem={"resume_token_ids": [tokens[:5]]})
        for prompt, tokens in zip(prompts, alone, strict=True)
    ]

    assert there == again == alone
    assert crowded == alone[1:]
    assert moved == alone
    metrics = decode.metrics.render().decode()
    assert 'tandem_worker_remote_prefill_failures_total{model_name="tiny"} 0.0' in metrics


@pytest.mark.parametrize(
    ("theirs", "mine", "named"),
    [("auto", "int8", "float32, this worker has int8"), ("int8", "fp8", "int8, this worker has")],
)
async def test_a_prefill_worker_of_another_type_is_refused_and_costs_no_answer(
    start_worker: Any, theirs: str, mine: str, named: str
) -> None:
    prefill = await start_worker("prefill", kv_cache_dtype=theirs, dtype="float32")
    decode = await start_worker("decode", kv_cache_dtype=mine, dtype="float32", max_loss=1.0)
    prompt = decode.tokenizer.encode(TEXT * 3)

    assert len(await complete(decode, prompt, prefill.url)) == 12

    assert decode.kv_address is not None
    report = await prefill.check_kv_link(decode.kv_address)
    assert not report["ok"]
    assert "kv_cache_dtype" in report["error"]
    assert "KV dtype=" in report["error"]
