"""What a Hugging Face ``config.json`` says about a dense decoder, in one flat record.

Llama, Mistral, Qwen2/2.5 and Qwen3 differ in a handful of switches (biases, norms on queries and
keys, sliding windows); everything else is shared. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from tandem_worker.errors import ModelError
from tandem_worker.models.files import CONFIG, locate, read_json
from tandem_worker.models.quantization import Quantization, read_quantization

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
_MIXTURES = ("mixtral", "qwen3_moe")
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_EXPERTS = 1024
MAX_WIDTH = 2**20
"""Hidden and intermediate sizes and head_dim; no model comes near."""
MAX_VOCABULARY = 2**23
MAX_CONTEXT = 2**26

_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ModelSpec:
    """Shapes and switches of one dense decoder.

    Attributes:
        family: One of :data:`FAMILIES`.
        max_position: Context that the model was made for, tokens; the scaled one where
            ``rope_scaling`` stretches it.
        rope_scaling: As Hugging Face writes it (``rope_type``, ``factor``, ...); empty for default.
        sliding_windows: Per layer: tokens a query sees including itself, or None for all.
        eos_token_ids: Tokens that end an answer.
        dtype: The checkpoint's own dtype name.
        trained_position: Context before any scaling, tokens.
        sampling_defaults: What generation_config.json asks for where a request says nothing:
            temperature, top_p, top_k, min_p, repetition_penalty, max_tokens.
        num_experts: Experts of each mixture; 0 in a dense model.
        experts_per_token: Of them, those that a token goes to.
        expert_size: Width of one expert's MLP.
        normalise_experts: Whether the weights of a token's experts sum to one.
        mixture_layers: Per layer: whether its MLP is a mixture; empty in a dense model.
        quantization: How the linear layers are stored, or None for plain weights.
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
    trained_position: int = 0
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)
    quantization: Quantization | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    normalise_experts: bool = True
    mixture_layers: tuple[bool, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Weights in the model, tied ones counted once."""
        h, d = self.hidden_size, self.head_dim
        attention = h * d * (2 * self.num_heads + 2 * self.num_kv_heads)
        layers = self.num_layers * (attention + 2 * h)
        num_mixtures = sum(self.mixture_layers)
        layers += (self.num_layers - num_mixtures) * 3 * h * self.intermediate_size
        layers += num_mixtures * self.num_experts * h * (3 * self.expert_size + 1)
        embeddings = self.vocab_size * h * (1 if self.tie_word_embeddings else 2)
        return embeddings + layers + h

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
            values = read_json(generation)
            spec = replace(
                spec,
                eos_token_ids=spec.eos_token_ids | _token_ids(values, str(generation)),
                sampling_defaults=sampling_defaults(values, str(generation)),
            )
        gptq = locate(directory, "quantize_config.json")
        if gptq is not None and spec.quantization is None:  # GPTQ's own file, before transformers'
            found = read_quantization({"quant_method": "gptq", **read_json(gptq)}, str(gptq))
            spec = replace(spec, quantization=found)
        return spec

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, source: str = "config.json") -> ModelSpec:
        """Translate the keys of a Hugging Face config (transformers 4 and 5 spellings).

        Raises:
            ModelError: an unknown family or activation, or a missing or impossible number.
        """
        family = str(config.get("model_type", ""))
        experts = next((key for key in _EXPERT_KEYS if config.get(key)), None)
        if experts is not None and family not in _MIXTURES:
            raise ModelError(
                f"{source}: model_type={family!r} with {experts}={_show(config[experts])} is a "
                f"mixture of experts of a kind that this worker does not run; it runs "
                f"{list(_MIXTURES)} and dense models"
            )
        quantized = config.get("quantization_config") or config.get("compression_config")
        quantization = read_quantization(quantized, source) if quantized else None
        if family not in FAMILIES:
            raise ModelError(
                f"{source}: model_type={family!r} is not supported; use one of {list(FAMILIES)}"
            )
        kinds = config.get("architectures")
        if isinstance(kinds, list) and kinds and not any("ForCausalLM" in str(k) for k in kinds):
            raise ModelError(
                f"{source}: architectures={kinds!r} is no language model with a head over words; "
                "only ...ForCausalLM is served"
            )
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ModelError(f"{source}: hidden_act={activation!r} is not supported; only silu is")

        def number(key: str, most: int, default: int | None = None) -> int:
            value = config.get(key)
            if value is None:
                value = default
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"{source}: {key}={_show(value)} must be a positive integer")
            if value > most:
                raise ModelError(f"{source}: {key}={_show(value)} is above {most}, the most here")
            return value

        def real(key: str, value: Any) -> float:
            if not _is_number(value) or not 0 < value < 1e30:
                raise ModelError(f"{source}: {key}={_show(value)} must be a positive number")
            return float(value)

        hidden_size = number("hidden_size", MAX_WIDTH)
        num_heads = number("num_attention_heads", MAX_HEADS)
        num_kv_heads = number("num_key_value_heads", MAX_HEADS, num_heads)
        head_dim = number("head_dim", 2**14, max(1, hidden_size // num_heads))
        num_layers = number("num_hidden_layers", MAX_LAYERS)
        if num_heads % num_kv_heads:
            raise ModelError(
                f"{source}: num_attention_heads={num_heads} is not a multiple of "
                f"num_key_value_heads={num_kv_heads}"
            )
        if head_dim % 2:
            raise ModelError(f"{source}: head_dim={head_dim} must be even for rotary embeddings")
        rope, theta = rope_settings(config, source)
        trained = number("max_position_embeddings", MAX_CONTEXT, 2048)
        attention_bias = bool(config.get("attention_bias", False))
        mixture: dict[str, Any] = {}
        if family in _MIXTURES:
            if quantization is not None:
                raise ModelError(
                    f"{source}: a quantized mixture of experts ({quantization.method}) is not "
                    "served; use the model's original weights"
                )
            name = "num_experts" if config.get("num_experts") else "num_local_experts"
            width = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
            mixture = {
                "num_experts": number(name, MAX_EXPERTS),
                "experts_per_token": number("num_experts_per_tok", MAX_EXPERTS),
                "expert_size": number(width, MAX_WIDTH),
                "normalise_experts": family == "mixtral" or bool(config.get("norm_topk_prob")),
                "mixture_layers": _mixture_layers(config, family, num_layers, source),
            }
            if mixture["experts_per_token"] > mixture["num_experts"]:
                raise ModelError(
                    f"{source}: num_experts_per_tok={mixture['experts_per_token']} is above "
                    f"{name}={mixture['num_experts']}"
                )
        return cls(
            family=family,
            vocab_size=number("vocab_size", MAX_VOCABULARY),
            hidden_size=hidden_size,
            intermediate_size=number("intermediate_size", MAX_WIDTH),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=real("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            rope_theta=real("rope_theta", theta),
            max_position=min(_scaled_context(trained, rope), MAX_CONTEXT),
            trained_position=int(rope.get("original_max_position_embeddings") or trained),
            rope_scaling=rope,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=family in ("llama", "qwen3", "qwen3_moe") and attention_bias,
            mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=family in ("qwen3", "qwen3_moe"),
            sliding_windows=_sliding_windows(config, family, num_layers, source),
            eos_token_ids=_token_ids(config, source),
            quantization=quantization,
            **mixture,
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        )


def rope_settings(config: Mapping[str, Any], source: str) -> tuple[dict[str, Any], Any]:
    """The rotary settings in one spelling: scaling (empty for default) and theta.

    Read: ``rope_parameters`` (transformers 5), flat or by kind of layer where all kinds agree;
    ``rope_scaling`` with ``rope_type`` or ``type``; ``rope_theta`` within or beside them.

    Raises:
        ModelError: a kind of scaling that is not known, or one without its numbers.
    """
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    given = config.get(key) or {}
    if not isinstance(given, dict):
        raise ModelError(f"{source}: {key}={_show(given)} must be an object")
    if given and all(isinstance(value, dict) for value in given.values()):
        first, *others = given.values()
        if any(other != first for other in others):
            raise ModelError(
                f"{source}: {key} differs between kinds of layers ({', '.join(given)}), which is "
                "not supported; all layers must rotate alike"
            )
        given = first
    rope = dict(given)
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 1e4
    partial = rope.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise ModelError(
            f"{source}: partial_rotary_factor={_show(partial)} is not supported; only whole heads "
            "are rotated"
        )
    kind = rope.pop("type", None)
    kind = str(rope.setdefault("rope_type", kind or "default"))
    if kind == "default":
        return {}, theta
    if kind not in ROPE_TYPES:
        raise ModelError(
            f"{source}: {key}: rope_type={_show(kind)} is unknown; use one of {list(ROPE_TYPES)}"
        )
    for name in ROPE_TYPES[kind]:
        value = rope.get(name)
        if not _is_number(value) or not 0 < value < 1e12:
            raise ModelError(
                f"{source}: {key}: {name}={_show(value)} must be a positive number, which "
                f"rope_type={kind!r} needs"
            )
    return rope, theta


ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor",),
}
"""What kinds of rotary scaling there are, and the numbers that each cannot do without."""


def _scaled_context(trained: int, rope: Mapping[str, Any]) -> int:
    """Tokens after scaling; as peers count: yarn from the original, linear from what is given.

    A yarn config may hold the original context in max_position_embeddings or the scaled one.
    """
    kind = rope.get("rope_type")
    if kind == "linear":
        return int(trained * rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or trained
        return max(trained, int(original * rope["factor"]))
    return trained


def sampling_defaults(generation: Mapping[str, Any], source: str) -> dict[str, float]:
    """The sampling settings of generation_config.json, under the names that requests use.

    Raises:
        ModelError: one of them is no number in its range.
    """
    found: dict[str, float] = {}
    for name in _SAMPLING_KEYS:
        value = generation.get(name)
        if value is None:
            continue
        low, high = {"repetition_penalty": (0.01, 100), "top_k": (-1, 2**31)}.get(name, (0, 100))
        if not _is_number(value) or not low <= value <= high:
            raise ModelError(
                f"{source}: {name}={_show(value)} must be a number of at least {low} and at most "
                f"{high}; correct it or leave it out"
            )
        found[name] = value
    longest = generation.get("max_new_tokens")
    if longest is not None:
        if not isinstance(longest, int) or isinstance(longest, bool) or longest < 1:
            raise ModelError(f"{source}: max_new_tokens={_show(longest)} must be at least 1")
        found["max_tokens"] = longest
    return found


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _show(value: Any) -> str:
    """A value of a user's file as part of a sentence; huge ones are cut."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a number of thousands of digits"
    return text if len(text) <= 100 else text[:100] + "..."


def _token_ids(config: Mapping[str, Any], source: str) -> frozenset[int]:
    """End tokens; null and -1 mean that there is none."""
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise ModelError(
            f"{source}: eos_token_id={_show(value)} must be a token id or a list of them"
        )
    return frozenset(item for item in ids if item >= 0)


def _mixture_layers(
    config: Mapping[str, Any], family: str, num_layers: int, source: str
) -> tuple[bool, ...]:
    """Per layer whether it holds experts; Qwen3 may keep some layers dense."""
    if family == "mixtral":
        return (True,) * num_layers
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
    if not isinstance(dense, list) or not isinstance(step, int) or step < 1:
        raise ModelError(f"{source}: mlp_only_layers and decoder_sparse_step must name layers")
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers))


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
        for kind in kinds:
            if kind not in ("sliding_attention", "full_attention"):
                raise ModelError(f"{source}: layer_types holds {_show(kind)}, which is not known")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if family in ("mistral", "mixtral"):
        return (window,) * num_layers
    first = config.get("max_window_layers", num_layers)
    return tuple(window if layer >= first else None for layer in range(num_layers))
