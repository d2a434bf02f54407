"""Weights from safetensors files (one or sharded) into the fused tensors that the model runs on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tandem_kernels.quantize import QuantizedWeight
from tandem_kernels.warm_up import QuantizedLinear
from tandem_worker.errors import ModelError
from tandem_worker.models.files import check_formats, locate, names_in, weight_files
from tandem_worker.models.mixture import Experts
from tandem_worker.models.quantized import Weight, read_linear, stack, weight_bytes
from tandem_worker.models.sharding import WHOLE, Shard, columns, rows
from tandem_worker.models.spec import ModelSpec

Layers = list[tuple[str, int, slice]]
"""Names of linear layers, their outputs, and which of them are this rank's."""

_REDUNDANT = (
    "rotary_emb.inv_freq",
    ".k_scale",  # of a quantized KV cache, which is kept in the model's dtype here
    ".v_scale",
    ".q_scale",
    ".output_scale",
)
_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass
class DenseMlp:
    """The MLP of a dense layer; ``gate_up`` stacks the rows of gate and up."""

    gate_up: Weight
    gate_up_bias: torch.Tensor | None
    down: Weight
    down_bias: torch.Tensor | None


@dataclass
class LayerWeights:
    """One decoder layer; matrices are ``(out_features, in_features)``, dense or quantized.

    ``qkv`` stacks the rows of q, k and v.
    """

    input_norm: torch.Tensor
    qkv: Weight
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Weight
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    mlp: DenseMlp | Experts


@dataclass
class ModelWeights:
    """All weights; ``lm_head`` is ``embed`` itself when they are tied."""

    embed: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    lm_head: Weight

    def num_bytes(self) -> int:
        """What they take in memory; tied ones once."""
        matrices: list[Weight] = [self.embed]
        if self.lm_head is not self.embed:
            matrices.append(self.lm_head)
        for layer in self.layers:
            mlp = layer.mlp
            matrices += [layer.qkv, layer.o, mlp.gate_up, mlp.down]
        return sum(weight_bytes(matrix) for matrix in matrices)

    def quantized_linears(self) -> tuple[QuantizedLinear, ...]:
        """Formats of the quantized layers, each once."""
        pairs: list[tuple[Weight, torch.Tensor | None]] = [(self.lm_head, None)]
        for layer in self.layers:
            pairs += [(layer.qkv, layer.qkv_bias), (layer.o, layer.o_bias)]
            if isinstance(layer.mlp, DenseMlp):
                mlp = layer.mlp
                pairs += [(mlp.gate_up, mlp.gate_up_bias), (mlp.down, mlp.down_bias)]
        found = (
            QuantizedLinear(
                out_features=weight.data.shape[0],
                in_features=weight.data.shape[1] * (2 if weight.data.dtype == torch.uint8 else 1),
                dtype=weight.data.dtype,
                group_size=weight.group_size,
                has_bias=bias is not None,
            )
            for weight, bias in pairs
            if isinstance(weight, QuantizedWeight)
        )
        return tuple(dict.fromkeys(found))


class _Checkpoint:
    """The tensors of a model directory by name, read when asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        files = weight_files(directory)
        self._handles = {}
        self._file_of: dict[str, str] = {}
        for file in files:
            path = locate(directory, file)
            if path is None:
                check_formats(names_in(directory), str(directory))
                raise ModelError(f"{directory / file} is missing; the index names it")
            try:
                handle = safe_open(str(path), framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{directory / file} cannot be opened: {error}") from error
            self._handles[file] = handle
            for name in handle.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118
                self._file_of[name] = file
        # A decoder saved alone, as models for embeddings are, has names without the first part.
        self._bare = "model." if "embed_tokens.weight" in self._file_of else ""
        self._file_of = {self._bare + name: file for name, file in self._file_of.items()}
        self._unread = set(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        file = self._file_of.get(name)
        if file is None:
            raise ModelError(f"{self.directory}: tensor {name} is missing")
        part = self._handles[file].get_slice(name.removeprefix(self._bare))  # type: ignore[no-untyped-call]
        found = tuple(part.get_shape())
        if found != shape:
            raise ModelError(
                f"{self.directory / file}: tensor {name} has shape {found}, "
                f"config.json implies {shape}"
            )
        if part.get_dtype() not in _FLOATS:
            raise ModelError(
                f"{self.directory / file}: tensor {name} holds {part.get_dtype()}, which is no "
                f"plain weight; expected one of {list(_FLOATS)}"
            )
        tensor: torch.Tensor = self._handles[file].get_tensor(name.removeprefix(self._bare))  # type: ignore[no-untyped-call]
        self._unread.discard(name)
        return tensor

    def take(self, name: str) -> torch.Tensor:
        """A tensor of whatever shape and type; the caller checks it."""
        file = self._file_of.get(name)
        if file is None:
            raise ModelError(f"{self.directory}: tensor {name} is missing")
        tensor: torch.Tensor = self._handles[file].get_tensor(name.removeprefix(self._bare))  # type: ignore[no-untyped-call]
        self._unread.discard(name)
        return tensor

    def unread(self) -> Iterator[str]:
        """Tensors nobody asked for, without those known to be redundant."""
        for name in sorted(self._unread):
            if name.endswith(_REDUNDANT):
                continue
            if name.endswith("_proj.bias") and not self.take(name).any():
                continue  # quantizers give every layer one
            yield name


def load_weights(
    spec: ModelSpec,
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard = WHOLE,
) -> ModelWeights:
    """Read a model directory, or one rank's part of it.

    Biases that are added after a sum over ranks, and the head, are rank 0's alone.

    Raises:
        ModelError: a tensor is missing, unexpected or misshapen.
    """
    checkpoint = _Checkpoint(directory)
    h, inner, d = spec.hidden_size, spec.intermediate_size, spec.head_dim
    q_rows, kv_rows = spec.num_heads * d, spec.num_kv_heads * d
    kv_heads = shard.kv_heads(spec.num_kv_heads)
    kv_part = slice(kv_heads.start * d, kv_heads.stop * d)

    def read(name: str, *shape: int) -> torch.Tensor:
        return checkpoint.read(name, shape).to(device=device, dtype=dtype).contiguous()

    def matrix(name: str, n: int, k: int) -> Weight:
        if spec.quantization is not None:
            found = read_linear(checkpoint, name, n, k, spec.quantization, dtype)
            if found is not None:
                return _moved(found, device)
        return read(f"{name}.weight", n, k)

    def own_rows(layers: Layers) -> Weight:
        return stack([rows(matrix(name, n, h), part) for name, n, part in layers], dtype)

    def own_columns(name: str, k: int) -> Weight:
        whole = matrix(name, h, k)
        return whole if shard.size == 1 else columns(whole, shard.part(k), dtype)

    def bias(layers: Layers) -> torch.Tensor:
        return torch.cat([read(f"{name}.bias", n)[part] for name, n, part in layers])

    def last_bias(name: str) -> torch.Tensor | None:
        whole = read(f"{name}.bias", h)
        return whole if shard.rank == 0 else None

    def dense(mlp: str) -> DenseMlp:
        gate_up = [(f"{mlp}.{p}_proj", inner, shard.part(inner)) for p in ("gate", "up")]
        return DenseMlp(
            gate_up=own_rows(gate_up),
            gate_up_bias=bias(gate_up) if spec.mlp_bias else None,
            down=own_columns(f"{mlp}.down_proj", inner),
            down_bias=last_bias(f"{mlp}.down_proj") if spec.mlp_bias else None,
        )

    def experts(index: int) -> Experts:
        at, (gate, up, down) = f"model.layers.{index}.mlp", ("gate_proj", "up_proj", "down_proj")
        if spec.family == "mixtral":
            at, (gate, up, down) = f"model.layers.{index}.block_sparse_moe", ("w1", "w3", "w2")
        width, part = spec.expert_size, shard.part(spec.expert_size)

        def one(expert: int, name: str, *shape: int) -> torch.Tensor:
            return read(f"{at}.experts.{expert}.{name}.weight", *shape)

        def both(expert: int) -> torch.Tensor:
            return torch.cat([one(expert, name, width, h)[part] for name in (gate, up)])

        numbers = range(spec.num_experts)
        return Experts(
            router=checkpoint.read(f"{at}.gate.weight", (spec.num_experts, h)).float().to(device),
            gate_up=torch.stack([both(expert) for expert in numbers]),
            down=torch.stack([one(expert, down, h, width)[:, part] for expert in numbers]),
            per_token=spec.experts_per_token,
            normalise=spec.normalise_experts,
        )

    def layer(index: int) -> LayerWeights:
        at = f"model.layers.{index}.self_attn"
        qkv = [
            (f"{at}.q_proj", q_rows, shard.part(q_rows)),
            (f"{at}.k_proj", kv_rows, kv_part),
            (f"{at}.v_proj", kv_rows, kv_part),
        ]
        return LayerWeights(
            input_norm=read(f"model.layers.{index}.input_layernorm.weight", h),
            qkv=own_rows(qkv),
            qkv_bias=bias(qkv) if spec.qkv_bias else None,
            q_norm=read(f"{at}.q_norm.weight", d) if spec.qk_norm else None,
            k_norm=read(f"{at}.k_norm.weight", d) if spec.qk_norm else None,
            o=own_columns(f"{at}.o_proj", q_rows),
            o_bias=last_bias(f"{at}.o_proj") if spec.o_bias else None,
            post_norm=read(f"model.layers.{index}.post_attention_layernorm.weight", h),
            mlp=experts(index)
            if any(spec.mixture_layers[index : index + 1])
            else dense(f"model.layers.{index}.mlp"),
        )

    embed = read("model.embed_tokens.weight", spec.vocab_size, h)
    layers = [layer(index) for index in range(spec.num_layers)]
    norm = read("model.norm.weight", h)
    lm_head: Weight = embed
    if spec.tie_word_embeddings:
        if "lm_head.weight" in checkpoint:
            checkpoint.read("lm_head.weight", (spec.vocab_size, h))
    elif shard.rank == 0:
        lm_head = matrix("lm_head", spec.vocab_size, h)
    unknown = list(checkpoint.unread()) if shard.rank == 0 else []
    if unknown:
        raise ModelError(
            f"{directory}: {len(unknown)} tensors have no place in a {spec.family} model as "
            f"config.json describes it, first {unknown[0]}; check config.json"
        )
    return ModelWeights(embed=embed, layers=layers, norm=norm, lm_head=lm_head)


def _moved(weight: Weight, device: torch.device) -> Weight:
    if isinstance(weight, torch.Tensor):
        return weight.to(device)
    zeros = None if weight.zeros is None else weight.zeros.to(device)
    return replace(
        weight, data=weight.data.to(device), scales=weight.scales.to(device), zeros=zeros
    )
