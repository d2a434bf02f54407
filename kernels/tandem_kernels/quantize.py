"""Weight formats of skinny_gemm: how int8, int4 and fp8 weights are rounded and laid out.

All formats keep a weight of a linear layer as `(out_features, in_features)`, rows contiguous.

    int8   one scale per output row: w = q * scale
    fp8    float8_e4m3fn, one scale per output row: w = q * scale
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
    `(n, k / group_size)` for int4; zeros: float32 like scales, int4 only.
    """

    data: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    group_size: int | None = None


def quantize_int8(weight: torch.Tensor) -> QuantizedWeight:
    """Round `(n, k)` to int8 with one symmetric scale per row."""
    _check(weight)
    wide = weight.float()
    scales = wide.abs().amax(-1).clamp(min=1e-12) / 127
    data = (wide / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
    return QuantizedWeight(data, scales)


def quantize_fp8(weight: torch.Tensor) -> QuantizedWeight:
    """Round `(n, k)` to float8_e4m3fn with one scale per row (largest value at 448)."""
    _check(weight)
    wide = weight.float()
    scales = wide.abs().amax(-1).clamp(min=1e-12) / 448
    return QuantizedWeight((wide / scales[:, None]).to(torch.float8_e4m3fn), scales)


def quantize_int4(weight: torch.Tensor, group_size: int = 128) -> QuantizedWeight:
    """Round `(n, k)` to packed int4 with a scale and an integer zero point per group."""
    _check(weight)
    n, k = weight.shape
    if group_size not in (32, 64, 128) or k % group_size:
        raise KernelArgumentError(
            f"group_size={group_size} with in_features={k}; use 32, 64 or 128 dividing in_features"
        )
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
        return weight.data.to(dtype) * weight.scales.to(dtype)[:, None]
    if weight.zeros is None or weight.group_size is None:
        raise KernelArgumentError("an int4 weight needs zeros and group_size")
    n, half_k = weight.data.shape
    packed = weight.data.view(n, -1, weight.group_size // 2)
    q = torch.cat([packed & 15, packed >> 4], dim=-1).to(dtype)
    dense = (q - weight.zeros.to(dtype)[..., None]) * weight.scales.to(dtype)[..., None]
    return dense.view(n, half_k * 2)


def _check(weight: torch.Tensor) -> None:
    check_shape("weight", weight, (None, None), "(out_features, in_features)")
