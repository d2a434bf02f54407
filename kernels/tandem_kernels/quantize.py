"""Weight formats of skinny_gemm: how int8, int4 and fp8 weights are rounded and laid out.

All formats keep a weight of a linear layer as `(out_features, in_features)`, rows contiguous.

    int8   one scale per output row, or per group of `group_size` inputs: w = q * scale
    fp8    float8_e4m3fn, scaled in the same two ways
    int4   groups of `group_size` inputs share a scale and a zero point: w = (q - zero) * scale,
           q in 0..15. Byte j of a group holds input j in its low nibble and input
           j + group_size / 2 in its high nibble, so a kernel unpacks two contiguous halves
           instead of interleaving.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checks import KernelArgumentError, check_shape


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight in one of the formats above; pass its fields to skinny_gemm.

    data: int8 or float8_e4m3fn `(n, k)`, or uint8 `(n, k / 2)`; scales: float32 `(n,)`, or
    `(n, k / group_size)` with groups; zeros: float32 like scales, int4 only.
    """

    data: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    group_size: int | None = None


def quantize_int8(weight: torch.Tensor, group_size: int | None = None) -> QuantizedWeight:
    """Round `(n, k)` to int8 with one symmetric scale per row, or per group of inputs."""
    return _symmetric(weight, group_size, torch.int8, 127)


def quantize_fp8(weight: torch.Tensor, group_size: int | None = None) -> QuantizedWeight:
    """Round `(n, k)` to float8_e4m3fn, the largest value of a row or group at 448."""
    return _symmetric(weight, group_size, torch.float8_e4m3fn, 448)


def _symmetric(
    weight: torch.Tensor, group_size: int | None, dtype: torch.dtype, limit: int
) -> QuantizedWeight:
    _check(weight)
    n, k = weight.shape
    if group_size is not None:
        _check_groups(group_size, k)
    groups = weight.float().view(n, -1, group_size or max(k, 1))
    scales = groups.abs().amax(-1).clamp(min=1e-12) / limit
    codes = groups / scales[..., None]
    if dtype == torch.int8:
        codes = codes.round().clamp(-limit, limit)
    data = codes.to(dtype).view(n, k)
    return QuantizedWeight(data, scales if group_size else scales[:, 0], None, group_size)


def quantize_int4(weight: torch.Tensor, group_size: int = 128) -> QuantizedWeight:
    """Round `(n, k)` to packed int4 with a scale and an integer zero point per group."""
    _check(weight)
    n, k = weight.shape
    _check_groups(group_size, k)
    groups = weight.float().view(n, k // group_size, group_size)
    low = groups.amin(-1).clamp(max=0)
    high = groups.amax(-1).clamp(min=0)
    scales = (high - low).clamp(min=1e-12) / 15
    zeros = (-low / scales).round().clamp(0, 15)
    q = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15).to(torch.uint8)
    half = group_size // 2
    packed = q[..., :half] | (q[..., half:] << 4)
    return QuantizedWeight(packed.view(n, k // 2), scales, zeros, group_size)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The dense `(n, k)` weight a quantized one stands for."""
    if weight.data.dtype != torch.uint8:
        scales = weight.scales.to(dtype)
        if weight.group_size is not None:
            scales = scales.repeat_interleave(weight.group_size, dim=1)
        return weight.data.to(dtype) * scales.view(weight.data.shape[0], -1)
    if weight.zeros is None or weight.group_size is None:
        raise KernelArgumentError("an int4 weight needs zeros and group_size")
    n, half_k = weight.data.shape
    packed = weight.data.view(n, -1, weight.group_size // 2)
    q = torch.cat([packed & 15, packed >> 4], dim=-1).to(dtype)
    dense = (q - weight.zeros.to(dtype)[..., None]) * weight.scales.to(dtype)[..., None]
    return dense.view(n, half_k * 2)


def _check(weight: torch.Tensor) -> None:
    check_shape("weight", weight, (None, None), "(out_features, in_features)")


def _check_groups(group_size: int, k: int) -> None:
    if group_size not in (32, 64, 128) or k % group_size:
        raise KernelArgumentError(
            f"group_size={group_size} with in_features={k}; use 32, 64 or 128 dividing in_features"
        )
