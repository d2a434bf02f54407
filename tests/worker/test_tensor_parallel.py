"""A model over several processes gives the tokens of one, and dies as one."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from eventually import eventually
from tandem_kernels.quantize import (
    QuantizedWeight,
    dequantize,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from tandem_worker.config import WorkerConfig
from tandem_worker.engine import tensor_parallel as ranks
from tandem_worker.engine.core import EngineCore
from tandem_worker.engine.requests import EngineRequest, TokenEvent
from tandem_worker.engine.runner import ModelRunner
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.engine.tensor_parallel import TensorParallelRunner, decode_batch, encode_batch
from tandem_worker.errors import ConfigError, WorkerError
from tandem_worker.models.sharding import Shard, columns, rows
from tandem_worker.models.spec import ModelSpec
from tandem_worker.models.transformer import Batch, Decodes, Prefills
from tandem_worker.scheduling.kv_blocks import BlockManager
from tandem_worker.scheduling.scheduler import Scheduler, SchedulerLimits
from tandem_worker.scheduling.sequence import Sequence

CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "two ranks, every bias": (2, "llama", {"attention_bias": True, "mlp_bias": True}),
    "two ranks, qwen2": (2, "qwen2", {"tie_word_embeddings": True}),
    "two ranks, a window": (2, "mistral", {"sliding_window": 50}),
    "four ranks, two KV heads": (4, "qwen3", {}),
    "two ranks, a mixture": (2, "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "four ranks, one KV head": (4, "llama", {"num_key_value_heads": 1}),
}


def settings(size: int) -> WorkerConfig:
    return WorkerConfig(
        served_model="m", num_kv_blocks=32, device="cpu", dtype="float32", tensor_parallel=size
    )


def generate(runner: ModelRunner, prompts: list[list[int]]) -> tuple[list[list[int]], int]:
    """Greedy and seeded answers, computed together where they can, and cached tokens used."""
    limits = SchedulerLimits(max_num_seqs=8, max_batched_tokens=96)
    scheduler = Scheduler(BlockManager(32), limits)
    core = EngineCore(runner, scheduler, eos_token_ids=frozenset())
    written: list[list[int]] = []
    for prompt in prompts:
        for temperature in (0.0, 0.7):
            to: list[int] = []
            written.append(to)

            def sink(event: object, to: list[int] = to) -> None:
                if isinstance(event, TokenEvent):
                    to.append(event.token_id)

            sampling = SamplingParams(temperature=temperature, seed=3, max_tokens=6)
            sequence = Sequence(str(len(written)), list(prompt), len(prompt))
            core.add(EngineRequest(sequence, sampling, sink))
        while core.has_work:
            for deliver, event in core.step():
                deliver(event)
    return written, scheduler.num_prefix_hits


@pytest.mark.parametrize("case", CASES)
def test_several_ranks_give_the_tokens_of_one(
    case: str, tmp_path: Path, build_model: Callable[..., Path]
) -> None:
    size, family, overrides = CASES[case]
    model = build_model(tmp_path / "model", family, **overrides)
    random = torch.Generator().manual_seed(1)
    long = torch.randint(2, 512, (150,), generator=random).tolist()
    prompts = [long, long[:140], long[:70], [5, 6, 7]]  # later ones find the first one's blocks
    expected, _ = generate(ModelRunner(settings(1), model), prompts)

    runner = TensorParallelRunner(settings(size), model)
    try:
        found, num_hits = generate(runner, prompts)
    finally:
        runner.close()

    assert found == expected
    assert num_hits > 0
    assert [process.returncode for process in runner.ranks] == [0] * (size - 1)


@pytest.mark.parametrize("bits", [8, 4])
def test_ranks_of_a_quantized_checkpoint_give_the_tokens_of_one(
    bits: int, tiny_llama: Path, tmp_path: Path
) -> None:
    """In groups of 32, of which the cut goes through some and leaves others whole."""
    path = Path(__file__).parents[2] / "examples" / "models" / "quantize.py"
    spec = importlib.util.spec_from_file_location("quantize", path)
    assert spec is not None
    assert spec.loader is not None
    quantize = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quantize)
    model = tmp_path / "quantized"
    quantize.write(tiny_llama, model, bits)
    prompts = [list(range(2, 100)), [5, 6, 7]]
    expected, _ = generate(ModelRunner(settings(1), model), prompts)

    runner = TensorParallelRunner(settings(2), model)
    try:
        found, _ = generate(runner, prompts)
    finally:
        runner.close()

    assert found == expected
    assert isinstance(runner.model.weights.layers[0].qkv, QuantizedWeight)


def test_each_rank_holds_its_part_of_weights_and_blocks(tiny_llama: Path) -> None:
    whole = ModelRunner(settings(1), tiny_llama)

    part = ModelRunner(settings(1), tiny_llama, shard=Shard(1, 2), reduce=lambda x: x)

    assert part.block_bytes * 2 == whole.block_bytes
    layer, full = part.model.weights.layers[0], whole.model.weights.layers[0]
    assert isinstance(full.mlp.down, torch.Tensor)
    assert torch.equal(layer.mlp.down, full.mlp.down[:, 48:])
    assert layer.qkv.shape == (64, 64)


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_fp8, quantize_int4])
@pytest.mark.parametrize("group", [None, 32, 64])
def test_quantized_weights_are_cut_as_dense_ones(
    quantize: Callable[..., QuantizedWeight], group: int | None
) -> None:
    if quantize is quantize_int4 and group is None:
        group = 128
    weight = quantize(torch.randn(48, 256), group)
    dense = dequantize(weight)

    for part in (slice(0, 128), slice(128, 256), slice(16, 48)):
        cut = columns(weight, part, torch.float32)
        ours = cut if isinstance(cut, torch.Tensor) else dequantize(cut)
        assert torch.equal(ours, dense[:, part])
    assert torch.equal(dequantize(rows(weight, slice(12, 36))), dense[12:36])


def test_a_batch_travels_unchanged() -> None:
    batch = Batch(
        token_ids=torch.tensor([4, 5, 6]),
        positions=torch.tensor([9, 0, 1]),
        slot_mapping=torch.tensor([73, 128, 129]),
        num_decodes=1,
        decodes=Decodes(torch.tensor([[1]]).int(), torch.tensor([10]).int()),
        prefills=Prefills(
            torch.tensor([[2]]).int(), torch.tensor([0, 2]).int(), torch.tensor([2]).int()
        ),
    )
    stream = io.BytesIO(encode_batch(batch) * 2)

    first, second, end = (decode_batch(stream) for _ in range(3))

    assert end is None
    for found in (first, second):
        assert found is not None
        assert torch.equal(found.slot_mapping, batch.slot_mapping)
        assert found.decodes is not None
        assert torch.equal(found.decodes.seq_lens, torch.tensor([10]).int())
        assert found.prefills is not None
        assert found.prefills.query_start.dtype == torch.int32
    assert decode_batch(io.BytesIO(encode_batch(batch)[:-3])) is None


@pytest.mark.parametrize(
    ("size", "message"),
    [(3, "does not divide num_attention_heads=4"), (64, "does not divide num_attention_heads=4")],
)
def test_a_number_that_the_model_cannot_be_cut_into_is_named(
    tiny_llama: Path, size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TensorParallelRunner(settings(size), tiny_llama)


def test_kv_heads_that_neither_divide_nor_are_divided_are_named() -> None:
    spec = ModelSpec("llama", 8, 96, 96, 1, 12, 3, 8, 1e-6, 1e4, 64)

    with pytest.raises(ConfigError, match="num_key_value_heads=3"):
        Shard(0, 4).spec(spec)


def test_a_rank_that_cannot_load_is_the_workers_failure_to_start(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    start = ranks.start_rank
    monkeypatch.setattr(ranks, "start_rank", lambda c, d, *more: start(c, d / "absent", *more))

    with pytest.raises(WorkerError, match="rank 1 of 2 ended while it loaded"):
        TensorParallelRunner(settings(2), model)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_rank_that_dies_or_hangs_is_the_workers_death(
    start_worker: Any, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(ranks, "SUM_TIMEOUT_S", 2.0)
    monkeypatch.setattr(ranks, "END_S", 0.5)
    worker = await start_worker(tensor_parallel=2, dtype="float32")
    runner = worker.engine.core.runner
    assert isinstance(runner, TensorParallelRunner)

    async with httpx.AsyncClient(base_url=worker.url, timeout=60) as client:
        body = {"prompt": [5, 6, 7], "max_tokens": 900, "ignore_eos": True, "temperature": 0}
        running = asyncio.create_task(client.post("/v1/completions", json=body))
        await eventually(lambda: worker.engine.core.counters.num_generated_tokens, 30.0)
        os.kill(runner.ranks[0].pid, number)

        answer = await running

        assert answer.status_code >= 500
        assert worker.failure is not None
        assert (await client.get("/health")).status_code == 503
        again = await client.post("/v1/completions", json=body)
        assert again.status_code >= 500


@pytest.mark.parametrize(
    ("prefill_ranks", "decode_ranks", "family", "kv"),
    [(2, 1, "llama", "auto"), (1, 4, "qwen3", "auto"), (4, 2, "llama", "int8")],
)
async def test_prefill_and_decode_over_unequal_numbers_of_ranks_give_the_tokens_of_one(
    start_worker: Any,
    build_model: Callable[..., Path],
    tmp_path: Path,
    prefill_ranks: int,
    decode_ranks: int,
    family: str,
    kv: str,
) -> None:
    """Of two KV heads, which two ranks hold one each and four in pairs."""
    common = {"weights": build_model(tmp_path / "m", family), "dtype": "float32"}
    common |= {"kv_cache_dtype": kv}
    alone = await start_worker(**common)
    prefill = await start_worker("prefill", tensor_parallel=prefill_ranks, **common)
    decode = await start_worker(
        "decode", tensor_parallel=decode_ranks, transfer={"checksum": True}, **common
    )
    text = alone.tokenizer.encode("a router sends each question to a small or large model " * 9)

    for prompt in (text[:5], text[:64], text[:200], text[:200] + text[:30]):
        expected = await complete(alone, prompt)
        assert await complete(decode, prompt, prefill.url) == expected

    metrics = decode.metrics.render().decode()
    assert 'tandem_worker_remote_prefills_total{model_name="tiny"} 4.0' in metrics
    assert 'tandem_worker_remote_prefill_failures_total{model_name="tiny"} 0.0' in metrics


async def complete(worker: Any, prompt: list[int], prefill: str = "") -> list[int]:
    headers = {"x-tandem-token-ids": "1"} | ({"x-tandem-prefill": prefill} if prefill else {})
    async with httpx.AsyncClient(base_url=worker.url, timeout=60) as client:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 8}
        reply = await client.post("/v1/completions", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    tokens: list[int] = reply.json()["choices"][0]["token_ids"]
    return tokens
