"""The CPU's forward pass computes what the kernels' references compute, for every kind of step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem_worker.config import WorkerConfig
from tandem_worker.engine.requests import EngineRequest, Work
from tandem_worker.engine.runner import ModelRunner
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.models.cpu_linear import CpuMatrix, is_suited, prefers_float32
from tandem_worker.models.cpu_transformer import CpuTransformer
from tandem_worker.models.transformer import Transformer
from tandem_worker.scheduling.sequence import Chunk, Sequence

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "window": ("mistral", {"sliding_window": 50}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "qk-norm": ("qwen3", {}),
    "mixture": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
}

STEPS: list[list[tuple[int, int]]] = [
    [(0, 130), (1, 1), (2, 64), (3, 20)],  # whole prompts
    [(3, 1), (0, 60), (1, 40), (2, 1)],  # decodes beside chunks with a context
    [(0, 1), (1, 1), (2, 1), (3, 1)],  # ragged decodes
    [(3, 1)],
    [(2, 1), (0, 33)],
]
"""(sequence, tokens) of each step; a single token is a decode."""


def run(
    runner: ModelRunner, model: Transformer
) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Logits of every step's rows and the caches it leaves."""
    caches = [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in runner.kv_caches]
    for k, _ in caches:
        k[15].fill_(float("nan"))  # a block that nobody was given
    torch.manual_seed(2)
    blocks = [[3, 9, 1, 12], [0], [7, 2], [5]]
    sequences = [
        Sequence(str(n), torch.randint(0, 512, (256,)).tolist(), 256, block_ids=ids)
        for n, ids in enumerate(blocks)
    ]
    logits = []
    for step in STEPS:
        step = sorted(step, key=lambda part: part[1] > 1)  # decodes first
        work = []
        for number, size in step:
            sequence = sequences[number]
            request = EngineRequest(sequence, SamplingParams(), lambda event: None)
            work.append(Work(Chunk(sequence, sequence.num_computed_tokens, size), request))
            sequence.num_computed_tokens += size
        with torch.inference_mode():
            batch = runner.pack(work, sum(size == 1 for _, size in step))
            logits.append(model.logits(model.forward(batch, caches)))
    return logits, caches


def both(directory: Path, dtype: str) -> tuple[ModelRunner, Transformer]:
    """A runner with the CPU's forward pass, and the plain one over the same weights."""
    config = WorkerConfig.model_validate(
        {"served_model": "m", "num_kv_blocks": 16, "device": "cpu", "dtype": dtype}
    )
    runner = ModelRunner(config, directory)
    assert isinstance(runner.model, CpuTransformer)
    plain = Transformer(runner.own_spec, runner.model.weights, max_positions=1025)
    return runner, plain


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_that_of_the_references(
    family: str, tmp_path: Path, build_model: Callable[..., Path]
) -> None:
    name, options = FAMILIES[family]
    runner, plain = both(build_model(tmp_path, name, **options), "float32")

    logits, caches = run(runner, runner.model)
    expected, expected_caches = run(runner, plain)

    for mine, theirs in zip(logits, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    for (k, v), (their_k, their_v) in zip(caches, expected_caches, strict=True):
        torch.testing.assert_close(k[:15], their_k[:15], atol=1e-4, rtol=0)
        torch.testing.assert_close(v[:15], their_v[:15], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_strays_no_further_from_float32_than_the_references_do(
    family: str, tmp_path: Path, build_model: Callable[..., Path]
) -> None:
    name, options = FAMILIES[family]
    directory = build_model(tmp_path, name, **options)
    exact, _ = run(*both(directory, "float32"))
    runner, plain = both(directory, "bfloat16")

    def error(found: list[torch.Tensor]) -> float:
        pairs = zip(found, exact, strict=True)
        return float(torch.cat([(f - e).abs().flatten() for f, e in pairs]).mean())

    assert error(run(runner, runner.model)[0]) <= 1.1 * error(run(runner, plain)[0])


def test_auto_takes_the_type_of_the_checkpoint_where_the_cpu_computes_it(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "llama")
    description = json.loads((folder / "config.json").read_text())

    def dtype_of(stored: str, natively: bool) -> torch.dtype:
        (folder / "config.json").write_text(json.dumps(description | {"dtype": stored}))
        monkeypatch.setattr("tandem_worker.engine.runner.computes_bfloat16", lambda: natively)
        config = WorkerConfig(served_model="m", num_kv_blocks=16, device="cpu")
        return ModelRunner(config, folder).dtype

    assert dtype_of("bfloat16", natively=True) == torch.bfloat16
    assert dtype_of("float16", natively=True) == torch.bfloat16
    assert dtype_of("bfloat16", natively=False) == torch.float32
    assert dtype_of("float32", natively=True) == torch.float32


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 95, 96, 200])
def test_a_matrix_gives_the_same_product_in_each_layout(rows: int) -> None:
    torch.manual_seed(3)
    weight, bias = torch.randn(80, 96).bfloat16(), torch.randn(80).bfloat16()
    x = torch.randn(rows, 96).bfloat16()
    if not is_suited(weight):
        pytest.skip("this CPU does not multiply bfloat16 natively")
    expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    wide = prefers_float32(rows)

    with torch.inference_mode():
        product = CpuMatrix(weight).linear(x.float() if wide else x, bias)

    assert product.dtype == (torch.float32 if wide else torch.bfloat16)
    tolerance = 1e-4 if wide else 0.2  # half a unit in the last place of 16 bits, around 40
    torch.testing.assert_close(product.float(), expected, atol=tolerance, rtol=0)
