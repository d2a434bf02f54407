"""What a Hugging Face ``config.json`` says about a dense decoder, in one flat record.

Llama, Mistral, Qwen2/2.5 and Qwen3 differ in a handful of switches (biases, norms on queries and
keys, sliding windows); everything else is shared. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tandem_worker.errors import ModelError
from tandem_worker.models.files import CONFIG, locate, read_json

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelSpec:
    """Shapes and switches of one dense decoder.

    Attributes:
        family: One of :data:`FAMILIES`.
        rope_scaling: As Hugging Face writes it (``rope_type``, ``factor``, ...); empty for default.
        sliding_windows: Per layer: tokens a query sees including itself, or None for all.
        eos_token_ids: Tokens that end an answer.
        dtype: The checkpoint's own dtype name.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position: int
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    eos_token_ids: frozenset[int] = frozenset()
    dtype: str = "float32"

    @property
    def num_parameters(self) -> int:
        """Weights in the model, tied ones counted once."""
        h, d = self.hidden_size, self.head_dim
        attention = h * d * (2 * self.num_heads + 2 * self.num_kv_heads)
        layer = attention + 3 * h * self.intermediate_size + 2 * h
        embeddings = self.vocab_size * h * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * layer + h

    @classmethod
    def load(cls, directory: Path) -> ModelSpec:
        """Read ``config.json`` and ``generation_config.json``.

        Raises:
            ModelError: a file is missing, not JSON, or describes a model this worker cannot run.
        """
        path = locate(directory, CONFIG)
        if path is None:
            raise ModelError(f"{directory / CONFIG} cannot be read: there is no such file")
        spec = cls.from_config(read_json(path), source=str(path))
        generation = locate(directory, "generation_config.json")
        if generation is not None:
            eos = _token_ids(read_json(generation), str(generation))
            spec = replace(spec, eos_token_ids=spec.eos_token_ids | eos)
        return spec

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, source: str = "config.json") -> ModelSpec:
        """Translate the keys of a Hugging Face config (transformers 4 and 5 spellings).

        Raises:
            ModelError: an unknown family or activation, or a missing or impossible number.
        """
        family = str(config.get("model_type", ""))
        if family not in FAMILIES:
            raise ModelError(
                f"{source}: model_type={family!r} is not supported; use one of {list(FAMILIES)}"
            )
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ModelError(f"{source}: hidden_act={activation!r} is not supported; only silu is")

        def number(key: str, default: int | None = None) -> int:
            value = config.get(key)
            if value is None:
                value = default
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"{source}: {key}={value!r} must be a positive integer")
            return value

        def real(key: str, value: Any) -> float:
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ModelError(f"{source}: {key}={value!r} must be a positive number")
            return float(value)

        hidden_size = number("hidden_size")
        num_heads = number("num_attention_heads")
        num_kv_heads = number("num_key_value_heads", num_heads)
        head_dim = number("head_dim", max(1, hidden_size // num_heads))
        num_layers = number("num_hidden_layers")
        if num_heads % num_kv_heads:
            raise ModelError(
                f"{source}: num_attention_heads={num_heads} is not a multiple of "
                f"num_key_value_heads={num_kv_heads}"
            )
        if head_dim % 2:
            raise ModelError(f"{source}: head_dim={head_dim} must be even for rotary embeddings")
        if config.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ModelError(
                f"{source}: partial_rotary_factor={config['partial_rotary_factor']!r} is not "
                "supported; only whole heads are rotated"
            )
        key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        given = config.get(key) or {}
        if not isinstance(given, dict):
            raise ModelError(f"{source}: {key}={given!r} must be an object")
        rope = dict(given)
        theta = real("rope_theta", rope.pop("rope_theta", None) or config.get("rope_theta", 1e4))
        if rope.get("rope_type", rope.get("type", "default")) == "default":
            rope = {}
        attention_bias = bool(config.get("attention_bias", False))
        return cls(
            family=family,
            vocab_size=number("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=number("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=real("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            max_position=number("max_position_embeddings", 2048),
            rope_scaling=rope,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=family in ("llama", "qwen3") and attention_bias,
            mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            sliding_windows=_sliding_windows(config, family, num_layers, source),
            eos_token_ids=_token_ids(config, source),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        )


def _token_ids(config: Mapping[str, Any], source: str) -> frozenset[int]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and item >= 0 for item in ids):
        raise ModelError(f"{source}: eos_token_id={value!r} must be a token id or a list of them")
    return frozenset(ids)


def _sliding_windows(
    config: Mapping[str, Any], family: str, num_layers: int, source: str
) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if family.startswith("qwen") and not config.get("use_sliding_window", False):
        window = None
    if family == "llama" or window is None:
        return (None,) * num_layers
    if not isinstance(window, int) or window < 1:
        raise ModelError(f"{source}: sliding_window={window!r} must be a positive integer")
    kinds = config.get("layer_types")
    if kinds:
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise ModelError(
                f"{source}: layer_types must name the kind of each of the {num_layers} layers"
            )
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if family == "mistral":
        return (window,) * num_layers
    first = config.get("max_window_layers", num_layers)
    return tuple(window if layer >= first else None for layer in range(num_layers))
