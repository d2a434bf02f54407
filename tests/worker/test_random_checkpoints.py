"""Checkpoints that nobody thought of: families, sizes and options drawn at random."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem_worker.config import WorkerConfig
from tandem_worker.engine.requests import EngineRequest, Work
from tandem_worker.engine.runner import ModelRunner
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.scheduling.sequence import Chunk, Sequence
from worker_kit import save_model

SEEDS = range(6)
"""A few in every run; more by hand."""
STEPS = (70, 1, 1, 33, 64, 10, 1)
"""Tokens of a step; 1 is a decode."""
ROPES: list[dict[str, Any] | None] = [
    None,
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 128}
    | {"attention_factor": 0.9},
]


def drawn(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A family and its configuration."""
    family = rng.choice(["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"])
    heads = rng.choice([4, 6, 8])
    options: dict[str, Any] = {
        "hidden_size": heads * 16 if family == "qwen2" else rng.choice([48, 64, 96]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([1, 2, heads]),
        "head_dim": 16 if family == "qwen2" else rng.choice([16, 32]),
        "intermediate_size": rng.choice([72, 96, 200]),
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "tie_word_embeddings": rng.random() < 0.5,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "vocab_size": rng.choice([401, 512, 777]),
    }
    if family == "llama":
        if options["hidden_size"] % heads:  # transformers refuses it
            options["hidden_size"] = 16 * heads
        options |= {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5}
    elif family == "mistral":
        options["sliding_window"] = rng.choice([None, 7, 64, 100])
    elif family in ("qwen2", "qwen3") and rng.random() < 0.5:
        window = {"sliding_window": rng.choice([9, 64]), "max_window_layers": rng.choice([0, 1])}
        options |= {"use_sliding_window": True, **window}
    elif family == "mixtral":
        options |= {"num_local_experts": rng.choice([2, 5]), "num_experts_per_tok": 2}
    elif family == "qwen3_moe":
        options |= {"num_experts": 6, "num_experts_per_tok": rng.choice([1, 3])}
        options |= {"moe_intermediate_size": 40, "norm_topk_prob": rng.random() < 0.5}
        options |= {"decoder_sparse_step": rng.choice([1, 2])}
    if rope := rng.choice(ROPES):
        options["rope_parameters"] = {**rope, "rope_theta": rng.choice([1e4, 5e5])}
    return family, options


def spelled_as_before(directory: Path) -> None:
    """`rope_scaling` with `type` beside `rope_theta`, as older releases saved it."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters", None) or {}
    config["rope_theta"] = rope.pop("rope_theta", 1e4)
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_are_those_of_transformers_however_the_prompt_is_cut(
    seed: int, tmp_path: Path
) -> None:
    import transformers

    rng = random.Random(seed)
    family, options = drawn(rng)
    save_model(tmp_path, family, **options)
    if rng.random() < 0.5:
        spelled_as_before(tmp_path)
    tokens = [rng.randrange(2, 400) for _ in range(sum(STEPS))]
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        wanted = peer.eval()(torch.tensor([tokens])).logits[0]

    runner = ModelRunner(
        WorkerConfig(served_model="m", num_kv_blocks=16, device="cpu", dtype="float32"), tmp_path
    )
    sequence = Sequence("s", tokens, len(tokens), block_ids=[5, 2, 9, 1])
    found = []
    for size in STEPS:
        chunk = Chunk(sequence, sequence.num_computed_tokens, size)
        request = EngineRequest(sequence, SamplingParams(), lambda event: None)
        with torch.inference_mode():
            batch = runner.pack([Work(chunk, request)], int(size == 1))
            hidden = runner.model.forward(batch, runner.kv_caches)
            found.append(runner.model.logits(hidden))
        sequence.num_computed_tokens += size

    assert torch.allclose(torch.cat(found), wanted, atol=2e-4, rtol=1e-4), (family, options)
