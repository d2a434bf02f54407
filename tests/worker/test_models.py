"""Each model family gives transformers' logits, however the prompt is cut into steps."""

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
from tandem_worker.errors import ConfigError, ModelError
from tandem_worker.models.spec import ModelSpec
from tandem_worker.scheduling.sequence import Chunk, Sequence

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-rope-llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral-window": ("mistral", {"sliding_window": 50}),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
        | {"norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "qwen3-moe-plain-weights": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"norm_topk_prob": False, "decoder_sparse_step": 2},
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-yarn": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
    ),
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def model_dir(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    build_model: Callable[..., Path],
) -> Path:
    family, overrides = VARIANTS[request.param]
    return build_model(tmp_path_factory.mktemp(request.param), family, **overrides)


def make_runner(directory: Path, num_kv_blocks: int = 16) -> ModelRunner:
    config = WorkerConfig(served_model="m", num_kv_blocks=num_kv_blocks, device="cpu")
    return ModelRunner(config, directory)


def run_chunks(runner: ModelRunner, tokens: list[int], sizes: list[int]) -> torch.Tensor:
    """Log-probabilities that follow each position, computed in chunks of these sizes."""
    blocks = [5, 2, 9, 11, 3][: -(-len(tokens) // 64)]
    sequence = Sequence("s", list(tokens), len(tokens), block_ids=blocks)
    request = EngineRequest(sequence, SamplingParams(), lambda event: None)
    hidden: list[torch.Tensor] = []
    start = 0
    for size in sizes:
        chunk = Chunk(sequence, start, size)
        with torch.inference_mode():
            batch = runner.pack([Work(chunk, request)], 1 if size == 1 else 0)
            hidden.append(runner.model.forward(batch, runner.kv_caches))
        start += size
    return runner.model.logits(torch.cat(hidden)).log_softmax(-1)


def test_logits_equal_those_of_transformers(model_dir: Path) -> None:
    import transformers

    runner = make_runner(model_dir)
    torch.manual_seed(1)
    tokens = torch.randint(0, 512, (150,)).tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)

    whole = run_chunks(runner, tokens, [150])
    chunked = run_chunks(runner, tokens, [70, 1, 1, 58, 1, 19])

    # float32 round-off through three layers with activations of order 10.
    torch.testing.assert_close(whole, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(chunked, expected, atol=2e-4, rtol=0)


def test_sharded_checkpoints_load_like_single_files(
    tmp_path: Path, tiny_llama: Path, build_model: Callable[..., Path]
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_llama / "model.safetensors")
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"part-{number}.safetensors")
    weight_map = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())

    sharded, single = make_runner(tmp_path), make_runner(tiny_llama)

    assert torch.equal(sharded.model.weights.lm_head, single.model.weights.lm_head)
    assert torch.equal(sharded.model.weights.layers[2].qkv, single.model.weights.layers[2].qkv)


def test_a_missing_tensor_is_named(tmp_path: Path, tiny_llama: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_llama / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())

    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is missing"):
        make_runner(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_key_value_heads": 3}, "not a multiple of"),
        ({"hidden_size": "big"}, "hidden_size='big' must be a positive integer"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a positive number"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta=-1 must be a positive number"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\] must be an object"),
        ({"eos_token_id": "2"}, "eos_token_id='2' must be a token id or a list"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        (
            {"model_type": "mistral", "sliding_window": "wide"},
            "sliding_window='wide' must be a positive integer",
        ),
        (
            {"model_type": "mistral", "sliding_window": 8, "layer_types": ["sliding_attention"]},
            "layer_types must name the kind of each of the 3 layers",
        ),
    ],
)
def test_an_unusable_config_is_refused_by_field(
    tiny_llama: Path, change: dict[str, Any], message: str
) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())

    with pytest.raises(ModelError, match=message):
        ModelSpec.from_config(config | change)


def test_an_unknown_rope_scaling_is_refused_by_name(tmp_path: Path, tiny_llama: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(tiny_llama / "model.safetensors", tmp_path)

    with pytest.raises(ModelError, match="rope_type='dynamic' is unknown; use one of"):
        make_runner(tmp_path)


def test_more_kv_blocks_than_memory_are_refused_with_their_size(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"2147483647 KV blocks need \d+ GiB .* num_kv_blocks"):
        make_runner(tiny_llama, num_kv_blocks=2**31 - 1)


def test_rope_settings_are_read_in_both_spellings() -> None:
    base = {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }

    old = ModelSpec.from_config(
        base | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    )
    new = ModelSpec.from_config(
        base | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    )

    assert old.rope_theta == new.rope_theta == 5e5
    assert old.rope_scaling["factor"] == new.rope_scaling["factor"] == 2.0
