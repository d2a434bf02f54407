"""A linear layer's tensors in a published quantized layout, as the kernels' own format.

Layouts and where they come from, for a layer of ``n`` outputs and ``k`` inputs:

    compressed-tensors  weight int8 or float8_e4m3fn ``(n, k)``, weight_scale ``(n, 1)``, ``(1,)``,
                        ``(n, k / group)`` or by blocks; or weight_packed int32, codes plus an
                        offset of half their range, densely from the low bits up, with weight_shape;
                        weight_zero_point packed over outputs; weight_g_idx for reordered groups
    fp8                 weight float8_e4m3fn, weight_scale_inv by blocks (128 x 128) or weight_scale
    awq (gemm)          qweight int32 ``(k, n / 8)``, qzeros ``(k / group, n / 8)``, scales
                        ``(k / group, n)``; nibbles hold outputs 0 2 4 6 1 3 5 7
    gptq                qweight int32 ``(k * bits / 32, n)``, qzeros ``(k / group, n * bits / 32)``,
                        scales ``(k / group, n)``, g_idx ``(k,)``; the first format stores zero
                        points less one

vllm-project/compressed-tensors `compressors/`; casper-hansen/AutoAWQ `awq/modules/linear/gemm.py`;
ModelCloud/GPTQModel `nn_modules/qlinear`; transformers `integrations/finegrained_fp8.py`. What the
kernels have no form for (groups in another order, other group sizes, int8 with zero points) is
dequantized when it is loaded: right, and as large as the original.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from tandem_kernels.quantize import QuantizedWeight, dequantize
from tandem_kernels.skinny_gemm import MAX_ROWS, skinny_gemm
from tandem_worker.errors import ModelError
from tandem_worker.models.quantization import Quantization

Weight = torch.Tensor | QuantizedWeight
"""Of a linear layer, ``(out_features, in_features)``: dense or in one of the kernels' formats."""

GROUP_SIZES = (128, 64, 32)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Nibble that holds output 0, 1, ... of eight."""
_INT8 = (torch.int8,)
_FP8 = (torch.float8_e4m3fn,)


class Tensors(Protocol):
    """A checkpoint's tensors by name."""

    def __contains__(self, name: str) -> bool:
        """Whether there is one."""
        ...

    def take(self, name: str) -> torch.Tensor:
        """The tensor, of whatever shape and type."""
        ...


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias``: few rows through the quantized kernel, many dequantized once."""
    if isinstance(weight, torch.Tensor):
        return F.linear(x, weight, bias)
    if x.shape[0] <= MAX_ROWS:
        return skinny_gemm(
            x,
            weight.data,
            bias=bias,
            scales=weight.scales,
            zeros=weight.zeros,
            group_size=weight.group_size,
        )
    return F.linear(x, dequantize(weight).to(x.dtype), bias)


def stack(parts: list[Weight], dtype: torch.dtype) -> Weight:
    """One layer of several whose outputs follow each other; dense unless all are of one format."""
    first = parts[0]
    if isinstance(first, QuantizedWeight):
        alike = [
            p
            for p in parts
            if isinstance(p, QuantizedWeight)
            and (p.data.dtype, p.group_size) == (first.data.dtype, first.group_size)
        ]
        if len(alike) == len(parts):
            zeros = [p.zeros for p in alike if p.zeros is not None]
            return QuantizedWeight(
                _cat([p.data for p in alike]),
                torch.cat([p.scales for p in alike]),
                torch.cat(zeros) if zeros else None,
                first.group_size,
            )
    return torch.cat([p if isinstance(p, torch.Tensor) else dequantize(p).to(dtype) for p in parts])


def _cat(parts: list[torch.Tensor]) -> torch.Tensor:
    if parts[0].dtype in _FP8:  # torch cannot concatenate it on every device
        return torch.cat([p.view(torch.uint8) for p in parts]).view(parts[0].dtype)
    return torch.cat(parts)


def weight_bytes(weight: Weight) -> int:
    """Bytes that it takes in memory."""
    if isinstance(weight, torch.Tensor):
        return weight.numel() * weight.element_size()
    tensors = [weight.data, weight.scales, *([] if weight.zeros is None else [weight.zeros])]
    return sum(t.numel() * t.element_size() for t in tensors)


def read_linear(
    tensors: Tensors, name: str, n: int, k: int, how: Quantization, dtype: torch.dtype
) -> Weight | None:
    """The layer of that name if it is quantized; None if it is dense.

    Raises:
        ModelError: a tensor is missing or has a shape that does not belong to the layer.
    """
    try:
        return _read(tensors, name, n, k, how, dtype)
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ModelError(
            f"the quantized tensors of {name} do not fit a layer of {n} outputs and {k} inputs: "
            f"{error}"
        ) from error


def _read(
    tensors: Tensors, name: str, n: int, k: int, how: Quantization, dtype: torch.dtype
) -> Weight | None:
    if f"{name}.weight_packed" in tensors:
        return _packed(tensors, name, n, k, dtype)
    if f"{name}.qweight" in tensors:
        if how.method == "awq":
            return _awq(tensors, name, n, k, dtype)
        return _gptq(tensors, name, n, k, how.gptq_zero_offset, dtype)
    scale = next(
        (s for s in (f"{name}.weight_scale_inv", f"{name}.weight_scale") if s in tensors), None
    )
    return None if scale is None else _plain(tensors, name, scale, n, k, dtype)


def _plain(
    tensors: Tensors, name: str, scale_name: str, n: int, k: int, dtype: torch.dtype
) -> Weight:
    """int8 or fp8 codes as they are, scaled by row, group, block or as a whole."""
    data = tensors.take(f"{name}.weight")
    if data.dtype not in (*_INT8, *_FP8):
        raise ModelError(f"{name}.weight holds {data.dtype} beside {scale_name}; int8 or fp8 does")
    _check(f"{name}.weight", data, (n, k))
    scale = tensors.take(scale_name).float()
    if scale.numel() == 1:
        scale = scale.reshape(1, 1)
    elif scale.dim() == 1:
        scale = scale[:, None]
    if scale.dim() != 2:
        raise ModelError(f"{scale_name} has shape {tuple(scale.shape)}; one or two axes do")
    rows, columns = scale.shape
    scale = scale.repeat_interleave(_block(scale_name, n, rows), dim=0)[:n]
    _ignore(tensors, name, ("input_scale", "input_zero_point", "activation_scale"))
    if f"{name}.weight_zero_point" in tensors and data.dtype == torch.int8:
        zero = tensors.take(f"{name}.weight_zero_point").float().reshape(rows, columns)
        if zero.any():
            wide = zero.repeat_interleave(_block(name, n, rows), dim=0)[:n]
            per_column = _block(name, k, columns)
            codes = data.float() - wide.repeat_interleave(per_column, dim=1)[:, :k]
            return (codes * scale.repeat_interleave(per_column, dim=1)[:, :k]).to(dtype)
    if columns == 1:
        return QuantizedWeight(data.contiguous(), scale[:, 0].contiguous())
    return _grouped(data, scale, None, _block(scale_name, k, columns), dtype)


def _packed(tensors: Tensors, name: str, n: int, k: int, dtype: torch.dtype) -> Weight:
    """compressed-tensors' pack-quantized: unsigned codes, several in an int32."""
    packed = tensors.take(f"{name}.weight_packed")
    bits = next((b for b in (4, 8) if tuple(packed.shape) == (n, -(-k * b // 32))), None)
    if bits is None or packed.dtype != torch.int32:
        raise ModelError(
            f"{name}.weight_packed is {tuple(packed.shape)} {packed.dtype}; for ({n}, {k}) in 4 or "
            "8 bits it is int32 with 8 or 4 codes in each"
        )
    _ignore(tensors, name, ("weight_shape", "input_scale", "input_zero_point"))
    codes = _unpack(packed, bits)[:, :k]
    scale = tensors.take(f"{name}.weight_scale").float()
    scale = scale.reshape(1, 1).expand(n, 1) if scale.numel() == 1 else scale.reshape(n, -1)
    half = 1 << (bits - 1)
    zeros = torch.full_like(scale, half)
    if f"{name}.weight_zero_point" in tensors:
        packed_zeros = tensors.take(f"{name}.weight_zero_point")
        _check(f"{name}.weight_zero_point", packed_zeros, (-(-n * bits // 32), scale.shape[1]))
        zeros = _unpack(packed_zeros.T.contiguous(), bits).T[:n].float()
    order = None
    if f"{name}.weight_g_idx" in tensors:
        order = tensors.take(f"{name}.weight_g_idx").long()
    return _codes(codes, scale, zeros, bits, order, dtype)


def _awq(tensors: Tensors, name: str, n: int, k: int, dtype: torch.dtype) -> Weight:
    packed = tensors.take(f"{name}.qweight")
    _check(f"{name}.qweight", packed, (k, n // 8))
    scale = tensors.take(f"{name}.scales").float()
    packed_zeros = tensors.take(f"{name}.qzeros")
    _check(f"{name}.qzeros", packed_zeros, (scale.shape[0], n // 8))
    order = torch.tensor(_AWQ_ORDER)

    def unpacked(values: torch.Tensor) -> torch.Tensor:
        nibbles = _unpack(values, 4).view(values.shape[0], -1, 8)
        return nibbles[:, :, order].reshape(values.shape[0], n)

    zeros = unpacked(packed_zeros).T.float().contiguous()
    return _codes(unpacked(packed).T, scale.T.contiguous(), zeros, 4, None, dtype)


def _gptq(
    tensors: Tensors, name: str, n: int, k: int, zero_offset: int, dtype: torch.dtype
) -> Weight:
    packed = tensors.take(f"{name}.qweight")
    bits = next((b for b in (4, 8) if tuple(packed.shape) == (k * b // 32, n)), None)
    if bits is None:
        raise ModelError(
            f"{name}.qweight has shape {tuple(packed.shape)}; for ({n}, {k}) it is {(k // 8, n)} "
            f"in 4 bits and {(k // 4, n)} in 8"
        )
    scale = tensors.take(f"{name}.scales").float()
    packed_zeros = tensors.take(f"{name}.qzeros")
    _check(f"{name}.qzeros", packed_zeros, (scale.shape[0], n * bits // 32))
    zeros = (_unpack(packed_zeros, bits) + zero_offset) & ((1 << bits) - 1)
    order = tensors.take(f"{name}.g_idx").long() if f"{name}.g_idx" in tensors else None
    codes = _unpack(packed.T.contiguous(), bits)
    return _codes(codes, scale.T.contiguous(), zeros.T.float().contiguous(), bits, order, dtype)


def _codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    group_of: torch.Tensor | None,
    dtype: torch.dtype,
) -> Weight:
    """Unsigned codes ``(n, k)`` with scales and zero points ``(n, groups)``."""
    n, k = codes.shape
    groups = scale.shape[1]
    if scale.shape != zeros.shape or scale.shape[0] != n or k % groups:
        raise ModelError(
            f"scales {tuple(scale.shape)} and zero points {tuple(zeros.shape)} do not belong to a "
            f"weight of shape ({n}, {k})"
        )
    size = k // groups
    if group_of is not None:
        if group_of.shape != (k,) or int(group_of.min()) < 0 or int(group_of.max()) >= groups:
            raise ModelError(f"g_idx must name a group below {groups} for each of {k} inputs")
        if not torch.equal(group_of, torch.arange(k) // size):
            return ((codes.float() - zeros[:, group_of]) * scale[:, group_of]).to(dtype)
    if bits == 8:
        if not bool((zeros == 128).all()):
            wide = zeros.repeat_interleave(size, dim=1)
            return ((codes.float() - wide) * scale.repeat_interleave(size, dim=1)).to(dtype)
        data = (codes - 128).to(torch.int8).contiguous()
        if groups == 1:
            return QuantizedWeight(data, scale[:, 0].contiguous())
        return _grouped(data, scale, None, size, dtype)
    return _grouped(codes.to(torch.uint8), scale, zeros, size, dtype)


def _grouped(
    data: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None,
    size: int,
    dtype: torch.dtype,
) -> Weight:
    """The kernels' form for groups of their sizes; larger groups are several with one scale."""
    data = data.contiguous()
    k = data.shape[1]
    kernel_size = next((g for g in GROUP_SIZES if size % g == 0 and k % g == 0), None)
    if kernel_size is None:
        wide = scale.repeat_interleave(size, dim=1)[:, :k]
        codes = data.float()
        if zeros is not None:
            codes = codes - zeros.repeat_interleave(size, dim=1)[:, :k]
        return (codes * wide).to(dtype)
    times = size // kernel_size
    groups = k // kernel_size
    scale = scale.repeat_interleave(times, dim=1)[:, :groups].contiguous()
    if zeros is None:
        return QuantizedWeight(data, scale, None, kernel_size)
    zeros = zeros.repeat_interleave(times, dim=1)[:, :groups].contiguous()
    parts = data.view(data.shape[0], groups, kernel_size)
    half = kernel_size // 2
    packed = parts[..., :half] | (parts[..., half:] << 4)
    return QuantizedWeight(packed.reshape(data.shape[0], k // 2), scale, zeros, kernel_size)


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words of ``32 / bits`` unsigned codes each, low bits first, along the last axis."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (packed.to(torch.int32)[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.reshape(*packed.shape[:-1], -1)


def _block(name: str, size: int, parts: int) -> int:
    """How long the parts are that an axis is cut into; the last one may be shorter."""
    for length in (128, size // parts, 64, 32, 256, 512):
        if length and -(-size // length) == parts:
            return length
    raise ModelError(f"{name} has {parts} parts along an axis of {size}; blocks of 128 are read")


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ModelError(f"{name} has shape {tuple(tensor.shape)}; the layer needs {shape}")


def _ignore(tensors: Tensors, name: str, parts: tuple[str, ...]) -> None:
    """Read, so that they are not unknown, what is about activations alone."""
    for part in parts:
        if f"{name}.{part}" in tensors:
            tensors.take(f"{name}.{part}")
