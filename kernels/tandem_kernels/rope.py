"""Rotary position tables: default, linear, llama3 and yarn scaling of the frequencies.

A table is `(max_positions, rotary_dim)` in float32: cosines of the `rotary_dim / 2` frequencies,
then their sines, each multiplied by yarn's attention factor. `scaling` is the dictionary a
Hugging Face config.json holds under `rope_scaling` (or `rope_parameters`), so every name below is
theirs. Sources: Su et al. 2021 (RoFormer); Peng et al. 2023 (YaRN, section 3.4); the formulas as in
huggingface/transformers `src/transformers/modeling_rope_utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .checks import KernelArgumentError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def rope_frequencies(
    head_dim: int,
    theta: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    *,
    max_position_embeddings: int | None = None,
) -> tuple[torch.Tensor, float]:
    """Return `(inverse frequencies (head_dim / 2,) float64, attention factor)`.

    `max_position_embeddings` is yarn's original context length where `scaling` does not hold
    `original_max_position_embeddings`. Raises KernelArgumentError for an unknown type or a
    missing key.
    """
    if head_dim <= 0 or head_dim % 2:
        raise KernelArgumentError(f"head_dim={head_dim} is not a positive even number")
    scaling = dict(scaling or {})
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    theta = float(scaling.get("rope_theta", theta))
    inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if kind == "default":
        return inverse, 1.0
    if kind not in ROPE_TYPES:
        raise KernelArgumentError(f"rope_type={kind!r} is unknown; use one of {ROPE_TYPES}")
    factor = _number(scaling, "factor", kind)
    if kind == "linear":
        return inverse / factor, 1.0
    if kind == "llama3":
        return _llama3(inverse, factor, scaling), 1.0
    return _yarn(inverse, factor, scaling, head_dim, theta, max_position_embeddings)


def rope_table(
    head_dim: int,
    max_positions: int,
    theta: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    *,
    max_position_embeddings: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Build the table `(max_positions, head_dim)`: cosines in the first half, sines in the second.

    Angles are computed in float64: position times frequency in float32 is wrong by 1e-2 radians
    at position 131072.
    """
    inverse, attention_factor = rope_frequencies(
        head_dim, theta, scaling, max_position_embeddings=max_position_embeddings
    )
    angles = torch.arange(max_positions, dtype=torch.float64)[:, None] * inverse[None, :]
    table = torch.cat([angles.cos(), angles.sin()], dim=-1) * attention_factor
    return table.to(dtype=dtype, device=device)


def _number(scaling: Mapping[str, Any], key: str, kind: str) -> float:
    value = scaling.get(key)
    if value is None:
        raise KernelArgumentError(f"rope scaling of type {kind!r} lacks {key!r}")
    return float(value)


def _llama3(inverse: torch.Tensor, factor: float, scaling: Mapping[str, Any]) -> torch.Tensor:
    low = _number(scaling, "low_freq_factor", "llama3")
    high = _number(scaling, "high_freq_factor", "llama3")
    original = _number(scaling, "original_max_position_embeddings", "llama3")
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    scaled = torch.where(wavelength > original / low, inverse / factor, inverse)
    medium = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(medium, blended, scaled)


def _yarn(
    inverse: torch.Tensor,
    factor: float,
    scaling: Mapping[str, Any],
    head_dim: int,
    theta: float,
    max_position_embeddings: int | None,
) -> tuple[torch.Tensor, float]:
    original = scaling.get("original_max_position_embeddings") or max_position_embeddings
    if original is None:
        raise KernelArgumentError(
            "rope scaling of type 'yarn' lacks 'original_max_position_embeddings'"
        )

    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        weight, weight_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if weight and weight_all:
            attention_factor = mscale(factor, float(weight)) / mscale(factor, float(weight_all))
        else:
            attention_factor = mscale(factor)

    def dimension_of(rotations: float) -> float:
        wavelengths = float(original) / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(theta))

    low = dimension_of(float(scaling.get("beta_fast") or 32))
    high = dimension_of(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return inverse / factor * ramp + inverse * (1 - ramp), float(attention_factor)
