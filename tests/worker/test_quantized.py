"""Quantized checkpoints in their published layouts give the logits of what their codes stand for.

Each layout is written here by plain loops after the code that published checkpoints come from
(named in tandem_worker.models.quantized), with its tensors' names and its configuration; the
reference is a plain checkpoint of the dequantized weights.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem_kernels.quantize import QuantizedWeight
from tandem_worker.config import WorkerConfig
from tandem_worker.engine.requests import EngineRequest, Work
from tandem_worker.engine.runner import ModelRunner
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.errors import ModelError
from tandem_worker.models.quantization import read_quantization
from tandem_worker.models.spec import ModelSpec
from tandem_worker.scheduling.sequence import Chunk, Sequence

Tensors = dict[str, torch.Tensor]
Packed = tuple[Tensors, torch.Tensor]
"""A layer's tensors by the last part of their names, and the weight that they stand for."""
Layout = Callable[[torch.Tensor], Packed]


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes along the last axis into int32 words, low bits first."""
    per_word = 32 // bits
    words = torch.zeros(codes.shape[0], -(-codes.shape[1] // per_word), dtype=torch.int64)
    for column in range(codes.shape[1]):
        shift = bits * (column % per_word)
        words[:, column // per_word] |= codes[:, column].long() << shift
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def grouped(weight: torch.Tensor, group: int, low: int, high: int) -> tuple[torch.Tensor, ...]:
    """Codes in low..high, scales and zero points per group; w = (code - zero) * scale."""
    parts = weight.view(weight.shape[0], -1, group)
    smallest, largest = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scale = (largest - smallest) / (high - low)
    zero = (low - smallest / scale).round().clamp(low, high)
    codes = (parts / scale[..., None] + zero[..., None]).round().clamp(low, high)
    dense = ((codes - zero[..., None]) * scale[..., None]).view_as(weight)
    return codes.view_as(weight).int(), scale, zero.int(), dense


def symmetric(weight: torch.Tensor, group: int, limit: int) -> tuple[torch.Tensor, ...]:
    parts = weight.view(weight.shape[0], -1, group)
    scale = parts.abs().amax(-1) / limit
    codes = (parts / scale[..., None]).round().clamp(-limit - 1, limit)
    dense = (codes * scale[..., None]).view_as(weight)
    return codes.view_as(weight).int(), scale, dense


# -- compressed-tensors ----------------------------------------------------------------------------


def ct_int8_channel(weight: torch.Tensor) -> Packed:
    codes, scale, dense = symmetric(weight, weight.shape[1], 127)
    return {"weight": codes.to(torch.int8), "weight_scale": scale}, dense


def ct_int8_asymmetric(weight: torch.Tensor) -> Packed:
    codes, scale, zero, dense = grouped(weight, weight.shape[1], -128, 127)
    tensors = {
        "weight": codes.to(torch.int8),
        "weight_scale": scale,
        "weight_zero_point": zero.to(torch.int8),
    }
    return tensors, dense


def ct_fp8_tensor(weight: torch.Tensor) -> Packed:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": scale[None], "input_scale": torch.ones(1)}
    return tensors, codes.float() * scale


def ct_fp8_channel(weight: torch.Tensor) -> Packed:
    scale = weight.abs().amax(-1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def ct_packed(bits: int, group: int | None, *, zero_points: bool = False) -> Layout:
    def pack(weight: torch.Tensor) -> Packed:
        size = group or weight.shape[1]
        half = 1 << (bits - 1)
        tensors: Tensors = {"weight_shape": torch.tensor(weight.shape)}
        if zero_points:
            codes, scale, zero, dense = grouped(weight, size, -half, half - 1)
            tensors["weight_zero_point"] = pack_rows((zero + half).T, bits).T.contiguous()
        else:
            codes, scale, dense = symmetric(weight, size, half - 1)
        tensors |= {"weight_packed": pack_rows(codes + half, bits), "weight_scale": scale}
        return tensors, dense

    return pack


def ct_reordered(weight: torch.Tensor) -> Packed:
    """Activation order: groups of inputs that are not neighbours."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(5))
    tensors, dense = ct_packed(4, 32)(weight[:, order])
    back = torch.argsort(order)
    codes = (tensors["weight_packed"][..., None] >> torch.arange(0, 32, 4)) & 15
    tensors["weight_packed"] = pack_rows(codes.reshape(weight.shape)[:, back], 4)
    tensors["weight_g_idx"] = (back // 32).int()
    return tensors, dense[:, back]


def ct_config(bits: int, kind: str, layout: str, strategy: str, **more: Any) -> dict[str, Any]:
    weights = {
        "num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False,
        "group_size": None, "block_structure": None, "actorder": None, "observer": "minmax",
        "observer_kwargs": {},
    } | more  # fmt: skip
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"],
        "config_groups": {"group_0": group}, "quantization_status": "compressed",
        "kv_cache_scheme": None, "global_compression_ratio": 1.5,
    }  # fmt: skip


# -- fp8 by blocks, AWQ, GPTQ ----------------------------------------------------------------------


def fp8_blocks(weight: torch.Tensor) -> Packed:
    n, k = weight.shape
    scale = torch.zeros(-(-n // 128), -(-k // 128))
    codes, dense = torch.zeros_like(weight), torch.zeros_like(weight)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            box = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            scale[i, j] = weight[box].abs().max() / 448
            codes[box] = weight[box] / scale[i, j]
            dense[box] = codes[box].to(torch.float8_e4m3fn).float() * scale[i, j]
    return {"weight": codes.to(torch.float8_e4m3fn), "weight_scale_inv": scale}, dense


def awq(weight: torch.Tensor) -> Packed:
    codes, scale, zero, dense = grouped(weight, 64, 0, 15)

    def interleaved(values: torch.Tensor) -> torch.Tensor:
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        return values.view(values.shape[0], -1, 8)[:, :, order].reshape(values.shape)

    tensors = {
        "qweight": pack_rows(interleaved(codes.T.contiguous()), 4),
        "qzeros": pack_rows(interleaved(zero.T.contiguous()), 4),
        "scales": scale.T.contiguous(),
    }
    return tensors, dense


def gptq(bits: int, *, offset: int = 1, order: bool = False, even: bool = False) -> Layout:
    def pack(weight: torch.Tensor) -> Packed:
        k, group = weight.shape[1], 32
        index = torch.arange(k)
        if order:
            index = torch.randperm(k, generator=torch.Generator().manual_seed(5))
        if even:
            half = 1 << (bits - 1)
            codes, scale, dense = symmetric(weight[:, index], group, half - 1)
            codes, zero = codes + half, torch.full(scale.shape, half, dtype=torch.int32)
        else:
            codes, scale, zero, dense = grouped(weight[:, index], group, 1, (1 << bits) - 1)
        back = torch.argsort(index)
        tensors = {
            "qweight": pack_rows(codes[:, back], bits).T.contiguous(),
            "qzeros": pack_rows((zero - offset).T.contiguous(), bits),
            "scales": scale.T.contiguous(),
            "g_idx": (back // group).int(),
        }
        return tensors, dense[:, back]

    return pack


FP8 = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
    "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"],
}  # fmt: skip
AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": None,
}  # fmt: skip


def gptq_config(bits: int, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, "sym": True,
        "damp_percent": 0.1, "static_groups": False, "true_sequential": True, "lm_head": False,
        "checkpoint_format": "gptq",
    } | more  # fmt: skip


LAYOUTS: dict[str, tuple[Layout, dict[str, Any], torch.dtype | None]] = {
    "W8A8": (ct_int8_channel, ct_config(8, "int", "int-quantized", "channel"), torch.int8),
    "W8A8 with zero points": (
        ct_int8_asymmetric,
        ct_config(8, "int", "int-quantized", "channel", symmetric=False),
        None,
    ),
    "FP8 by tensor": (
        ct_fp8_tensor,
        ct_config(8, "float", "float-quantized", "tensor"),
        torch.float8_e4m3fn,
    ),
    "FP8 by channel": (
        ct_fp8_channel,
        ct_config(8, "float", "float-quantized", "channel"),
        torch.float8_e4m3fn,
    ),
    "W8A16 by channel": (
        ct_packed(8, None),
        ct_config(8, "int", "pack-quantized", "channel"),
        torch.int8,
    ),
    "W8A16 by group": (
        ct_packed(8, 64),
        ct_config(8, "int", "pack-quantized", "group", group_size=64),
        torch.int8,
    ),
    "W4A16": (
        ct_packed(4, 64),
        ct_config(4, "int", "pack-quantized", "group", group_size=64),
        torch.uint8,
    ),
    "W4A16 with zero points": (
        ct_packed(4, 32, zero_points=True),
        ct_config(4, "int", "pack-quantized", "group", group_size=32, symmetric=False),
        torch.uint8,
    ),
    "W4A16 by channel": (
        ct_packed(4, None),
        ct_config(4, "int", "pack-quantized", "channel"),
        torch.uint8,
    ),
    "W4A16 in activation order": (
        ct_reordered,
        ct_config(4, "int", "pack-quantized", "group", group_size=32, actorder="group"),
        None,
    ),
    "FP8 by block": (fp8_blocks, FP8, torch.float8_e4m3fn),
    "AWQ": (awq, AWQ, torch.uint8),
    "GPTQ": (gptq(4), gptq_config(4), torch.uint8),
    "GPTQ v2": (gptq(4, offset=0), gptq_config(4, checkpoint_format="gptq_v2"), torch.uint8),
    "GPTQ desc_act": (gptq(4, order=True), gptq_config(4, desc_act=True), None),
    "GPTQ 8 bits": (gptq(8, even=True), gptq_config(8), torch.int8),
    "GPTQ 8 bits with zero points": (gptq(8), gptq_config(8, sym=False), None),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, build_model: Callable[..., Path]) -> Path:
    """Widths that the kernels' groups divide, once with a rest: 160 = 128 + 32."""
    return build_model(
        tmp_path_factory.mktemp("plain"),
        "qwen2",
        hidden_size=128,
        intermediate_size=160 * 2,
        head_dim=32,
        num_hidden_layers=2,
        initializer_range=0.1,
    )


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def write(directory: Path, plain: Path, layout: Layout, config: dict[str, Any]) -> Tensors:
    """A quantized checkpoint; the dense tensors that it stands for."""
    shutil.copytree(plain, directory)
    stored: Tensors = {}
    dense = load_file(plain / "model.safetensors")
    for name, tensor in list(dense.items()):
        if not is_linear(name):
            stored[name] = tensor
            continue
        tensors, dense[name] = layout(tensor)
        base = name.removesuffix(".weight")
        stored |= {f"{base}.{part}": value.contiguous() for part, value in tensors.items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return {name: tensor.contiguous() for name, tensor in dense.items()}


def logits(directory: Path, tokens: list[int], sizes: list[int]) -> tuple[ModelRunner, Any]:
    config = WorkerConfig(served_model="m", num_kv_blocks=8, device="cpu", dtype="float32")
    runner = ModelRunner(config, directory)
    sequence = Sequence("s", list(tokens), len(tokens), block_ids=[3, 1])
    request = EngineRequest(sequence, SamplingParams(), lambda event: None)
    rows, start = [], 0
    for size in sizes:
        with torch.inference_mode():
            batch = runner.pack([Work(Chunk(sequence, start, size), request)], int(size == 1))
            rows.append(runner.model.logits(runner.model.forward(batch, runner.kv_caches)))
        start += size
    return runner, torch.cat(rows).log_softmax(-1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_those_of_what_the_codes_stand_for(
    name: str, plain: Path, tmp_path: Path
) -> None:
    layout, config, kept = LAYOUTS[name]
    dense = write(tmp_path / "q", plain, layout, config)
    shutil.copytree(plain, tmp_path / "d")
    save_file(dense, tmp_path / "d" / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.randint(0, 512, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    sizes = [80, 1, 1, 18]  # more rows than the quantized kernel takes, then fewer

    runner, ours = logits(tmp_path / "q", tokens, sizes)
    _, expected = logits(tmp_path / "d", tokens, sizes)

    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)
    for layer in runner.model.weights.layers:
        for weight in (layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down):
            if kept is None:
                assert isinstance(weight, torch.Tensor)
            else:
                assert isinstance(weight, QuantizedWeight)
                assert weight.data.dtype == kept


def test_quantized_weights_are_small_in_memory(plain: Path, tmp_path: Path) -> None:
    layout, config, _ = LAYOUTS["W4A16"]
    write(tmp_path / "q", plain, layout, config)

    runner, _ = logits(tmp_path / "q", [1, 2, 3], [3])
    whole, _ = logits(plain, [1, 2, 3], [3])

    def linear_bytes(r: ModelRunner) -> int:
        tables = 2 * 512 * 128 * 4  # embedding and head stay as they are
        return r.model.weights.num_bytes() - tables

    assert linear_bytes(runner) < 0.2 * linear_bytes(whole)


def test_layers_that_a_checkpoint_leaves_dense_are_dense(plain: Path, tmp_path: Path) -> None:
    layout, config, _ = LAYOUTS["FP8 by channel"]
    dense = write(tmp_path / "q", plain, layout, config)
    stored = load_file(tmp_path / "q" / "model.safetensors")
    for part in ("self_attn.k_proj", "mlp.down_proj"):
        name = f"model.layers.0.{part}"
        stored[f"{name}.weight"] = dense[f"{name}.weight"]
        del stored[f"{name}.weight_scale"]
    save_file(stored, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(plain, tmp_path / "d")
    save_file(dense, tmp_path / "d" / "model.safetensors", metadata={"format": "pt"})

    runner, ours = logits(tmp_path / "q", list(range(9)), [9])
    _, expected = logits(tmp_path / "d", list(range(9)), [9])

    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)
    first, second = runner.model.weights.layers
    assert isinstance(first.mlp.down, torch.Tensor)
    assert isinstance(first.qkv, torch.Tensor)
    assert isinstance(second.qkv, QuantizedWeight)


def test_scales_of_a_quantized_kv_cache_and_zero_biases_do_not_disturb(
    plain: Path, tmp_path: Path
) -> None:
    layout, config, _ = LAYOUTS["FP8 by tensor"]
    write(tmp_path / "q", plain, layout, config)
    stored = load_file(tmp_path / "q" / "model.safetensors")
    stored["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    stored["model.layers.0.mlp.down_proj.bias"] = torch.zeros(128)
    save_file(stored, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})

    logits(tmp_path / "q", [1], [1])


def test_gptqs_own_file_is_read_where_config_json_says_nothing(plain: Path, tmp_path: Path) -> None:
    layout, config, _ = LAYOUTS["GPTQ"]
    write(tmp_path / "q", plain, layout, config)
    shutil.copy(plain / "config.json", tmp_path / "q")
    own = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    (tmp_path / "q" / "quantize_config.json").write_text(json.dumps(own))

    assert ModelSpec.load(tmp_path / "q").quantization == read_quantization(config, "")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"quant_method": "gguf"}, "'gguf'"),
        ({"quant_method": ["x"]}, "quant_method"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "gptq", "bits": 3}, "gptq of 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:x": {}}}, "gptq with dynamic"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 of fmt 'e5m2'"),
        (ct_config(4, "float", "nvfp4-pack-quantized", "tensor_group"), "4 bits, type 'float'"),
        (ct_config(2, "int", "pack-quantized", "group"), "of 2 bits"),
        (
            ct_config(8, "int", "x", "channel") | {"sparsity_config": {"format": "sparse-24"}},
            "sparsity 'sparse-24'",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "must name a group"),
    ],
)
def test_other_formats_are_one_sentence(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        read_quantization(change, "config.json")


@pytest.mark.parametrize("name", ["AWQ", "GPTQ", "W4A16", "W8A8", "FP8 by block"])
@pytest.mark.parametrize("part", [0, 1])
def test_a_tensor_of_another_shape_is_named(
    name: str, part: int, plain: Path, tmp_path: Path
) -> None:
    layout, config, _ = LAYOUTS[name]
    write(tmp_path / "q", plain, layout, config)
    stored = load_file(tmp_path / "q" / "model.safetensors")
    parts = sorted(
        key
        for key in stored
        if key.startswith("model.layers.0.mlp.down_proj.") and not key.endswith(("_shape", "g_idx"))
    )
    stored[parts[part]] = stored[parts[part]][:-3].contiguous()
    save_file(stored, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelError):
        logits(tmp_path / "q", [1], [1])


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.6)])
def test_the_demo_models_own_versions_load_and_stay_near(
    tmp_path: Path, bits: int, most: float
) -> None:
    models = Path(__file__).resolve().parents[2] / "examples" / "models"
    spec = importlib.util.spec_from_file_location("quantize", models / "quantize.py")
    assert spec is not None
    assert spec.loader is not None
    quantize = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quantize)
    quantize.write(models / "small", tmp_path / "q", bits)
    tokens = list(range(2, 66))

    _, ours = logits(tmp_path / "q", tokens, [64])
    _, whole = logits(models / "small", tokens, [64])

    divergence = (whole.exp() * (whole - ours)).sum(-1).mean()
    assert 0 <= divergence < most
