# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return"
"""Linear layer for a few rows: y = x @ w.T + bias with w in bf16, fp16, int8, int4 or fp8.

Shapes: x `(m, k)` with m up to 64; w `(n, k)` or packed int4 `(n, k / 2)` (see quantize);
bias `(n,)`; y `(m, n)` in x's dtype.
Bytes moved: the weight once (n * k * bits / 8) plus its scales; at m <= 64 that is the bound, so
quantized weights are widened in registers. Products are accumulated in float32; integer codes are
exact in bf16 and fp16 and the scale is applied to the float32 sums (per row, or per group of int4).
"""

from __future__ import annotations

import torch
from torch.nn import functional

from .checks import (
    FLOAT_DTYPES,
    KernelArgumentError,
    check,
    check_dtype,
    check_fp8_support,
    check_last_contiguous,
    check_same_device,
    check_shape,
    compute_dtype_of,
)
from .dispatch import architecture, num_processors, runs_on_triton, tl, triton
from .online_softmax import dot_precision, padded, widen
from .quantize import QuantizedWeight, dequantize

MAX_ROWS = 64
# Most parts k is cut into, and outputs per program of their sum. Untuned.
_MAX_SPLITS = 16
_REDUCE_BLOCK = 256
WEIGHT_DTYPES = (*FLOAT_DTYPES, torch.int8, torch.uint8, torch.float8_e4m3fn)


def skinny_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    group_size: int | None = None,
) -> torch.Tensor:
    """Return `x @ weight.T + bias` `(m, n)`; the weight's dtype names its format.

    A float weight must have x's dtype and takes no scales. int8 and float8_e4m3fn take scales
    `(n,)`, or `(n, k / group_size)` with group_size; uint8 is packed int4 and takes scales and
    zeros `(n, k / group_size)` and group_size.
    More than 64 rows raise: that is torch.nn.functional.linear's ground. Raises
    KernelArgumentError.
    """
    check_shape("x", x, (None, None), "(m, k)")
    check_dtype("x", x, FLOAT_DTYPES)
    check_dtype("weight", weight, WEIGHT_DTYPES)
    check_last_contiguous("x", x)
    check_last_contiguous("weight", weight)
    m, k = x.shape
    check(m <= MAX_ROWS, f"x has {m} rows; skinny_gemm takes up to {MAX_ROWS}, use linear beyond")
    n = weight.shape[0]
    packed = weight.dtype == torch.uint8
    check_shape("weight", weight, (n, k // 2 if packed else k), "(n, k), packed int4 (n, k / 2)")
    if bias is not None:
        check_shape("bias", bias, (n,), "(n,)")
    check_same_device("x", x, weight=weight, bias=bias, scales=scales, zeros=zeros)
    if weight.dtype in FLOAT_DTYPES:
        check_dtype("weight", weight, (x.dtype,))
        check(scales is None, "scales is given but the weight is not quantized; pass None")
    else:
        _check_quantized(scales, zeros, group_size, n, k, packed)
    if runs_on_triton(x):
        return _launch(x, weight, bias, scales, zeros, group_size)
    return skinny_gemm_reference(
        x, weight, bias=bias, scales=scales, zeros=zeros, group_size=group_size
    )


def skinny_gemm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    group_size: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Dequantize, then a dense linear; `compute_dtype` overrides its dtype (tests)."""
    if scales is None:
        if compute_dtype is None or compute_dtype == x.dtype:
            return functional.linear(x, weight, bias)
        dense = weight.to(compute_dtype)
    else:
        compute_dtype = compute_dtype or compute_dtype_of(x)
        dense = dequantize(QuantizedWeight(weight, scales, zeros, group_size), compute_dtype)
    wide_bias = None if bias is None else bias.to(compute_dtype)
    return functional.linear(x.to(compute_dtype), dense, wide_bias).to(x.dtype)


def _check_quantized(
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    group_size: int | None,
    n: int,
    k: int,
    packed: bool,
) -> None:
    if scales is None:
        raise KernelArgumentError("scales is None; a quantized weight needs its scales")
    check_dtype("scales", scales, (torch.float32, torch.float64))
    if not packed:
        check(zeros is None, "zeros is given; only int4 weights have zero points")
        if group_size is None:
            check_shape("scales", scales, (n,), "(n,)")
            return
    if group_size not in (32, 64, 128):
        raise KernelArgumentError(f"group_size={group_size} is not 32, 64 or 128")
    check(k % group_size == 0, f"x has {k} columns; not a multiple of group_size={group_size}")
    check_shape("scales", scales, (n, k // group_size), "(n, k / group_size)")
    if packed:
        if zeros is None:
            raise KernelArgumentError("zeros is None; an int4 weight needs its zero points")
        check_shape("zeros", zeros, (n, k // group_size), "(n, k / group_size)")


# Per architecture: output features and inputs per tile, warps, tiles in flight, programs per
# processor the split over k aims at. All untuned: 64 x 128 16-bit weights are 16 KiB per stage.
TUNING: dict[str, dict[str, int]] = {
    "sm_80": {"block_n": 64, "block_k": 128, "num_warps": 4, "num_stages": 3, "programs": 2},
    "sm_90": {"block_n": 64, "block_k": 128, "num_warps": 4, "num_stages": 4, "programs": 2},
    "sm_100": {"block_n": 64, "block_k": 128, "num_warps": 4, "num_stages": 4, "programs": 2},
    "gfx942": {"block_n": 64, "block_k": 128, "num_warps": 4, "num_stages": 2, "programs": 2},
}
DEFAULT_TUNING = {"block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 2, "programs": 2}


@triton.jit(do_not_specialize=["m", "tiles_per_split"])
def _kernel(
    x_ptr, weight_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr, partial_ptr,
    m, n, k, tiles_per_split, stride_x, stride_weight, stride_scales,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y.T = w @ x.T: the weight's rows fill the tensor core's long side, x's rows the short one.

    KIND: 0 weight in x's dtype, 1 one scale per row (int8, fp8), 2 int4 in groups of BLOCK_K,
    3 int8 or fp8 in groups of BLOCK_K.
    """
    tile_n = tl.program_id(0)
    split = tl.program_id(1)
    row = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < n
    token = tl.arange(0, BLOCK_M)
    token_mask = token < m
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, (k + BLOCK_K - 1) // BLOCK_K)
    weight_row = weight_ptr + (row.to(tl.int64) * stride_weight)[:, None]
    x_column = x_ptr + (token.to(tl.int64) * stride_x)[None, :]
    # Group scales are loaded one tile ahead: Triton pipelines only what enters the product.
    next_scale = tl.zeros((BLOCK_N,), tl.float32)
    if KIND >= 2:
        scale_row = scales_ptr + row.to(tl.int64) * stride_scales
        next_scale = tl.load(scale_row + first, mask=row < tl.where(first < last, n, 0), other=0.0)
        next_scale = next_scale.to(tl.float32)
    for tile in range(first, last):
        scale = next_scale
        if KIND >= 2:
            next_scale = tl.load(
                scale_row + tile + 1, mask=row < tl.where(tile + 1 < last, n, 0), other=0.0
            ).to(tl.float32)
        if KIND == 2:
            half: tl.constexpr = BLOCK_K // 2
            inner = tl.arange(0, half)
            packed = tl.load(
                weight_row + (tile * half + inner)[None, :], mask=row_mask[:, None], other=0
            )
            at = row * stride_scales + tile
            zero = tl.load(zeros_ptr + at, mask=row_mask, other=0.0).to(tl.float32)
            column = tile * BLOCK_K + inner
            x_low = tl.load(x_column + column[:, None], mask=token_mask[None, :], other=0.0)
            x_high = tl.load(
                x_column + (column + half)[:, None], mask=token_mask[None, :], other=0.0
            )
            # Codes minus an integer zero point are exact in 16 bits; the scale waits for the sum.
            low = ((packed & 15).to(tl.float32) - zero[:, None]).to(x_low.dtype)
            high = ((packed >> 4).to(tl.float32) - zero[:, None]).to(x_low.dtype)
            part = tl.dot(low, x_low, input_precision=PRECISION)
            part = tl.dot(high, x_high, part, input_precision=PRECISION)
            acc += part * scale[:, None]
        else:
            column = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            column_mask = column < k
            weight = tl.load(
                weight_row + column[None, :],
                mask=row_mask[:, None] & column_mask[None, :],
                other=0.0,
            )
            x = tl.load(
                x_column + column[:, None],
                mask=column_mask[:, None] & token_mask[None, :],
                other=0.0,
            )
            weight = widen(weight, x.dtype)
            if KIND == 3:
                part = tl.dot(weight, x, input_precision=PRECISION)
                acc += part * scale[:, None]
            else:
                acc = tl.dot(weight, x, acc, input_precision=PRECISION)
    if KIND == 1:
        acc *= tl.load(scales_ptr + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    mask = token_mask[None, :] & row_mask[:, None]
    offset = (token * n)[None, :] + row[:, None]
    if SPLITS == 1:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(partial_ptr + split.to(tl.int64) * m * n + offset, acc, mask=mask)


@triton.jit(do_not_specialize=["m", "splits"])
def _reduce_kernel(
    partial_ptr, bias_ptr, out_ptr, m, n, splits,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the splits in order, so that a result does not depend on timing."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        at = (split * m + row).to(tl.int64) * n
        acc += tl.load(partial_ptr + at + column, mask=mask, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * n + column, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(x, weight, bias, scales, zeros, group_size):
    m, k = x.shape
    n = weight.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m == 0 or n == 0:
        return out
    check_fp8_support(x, weight)
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        check(tensor is None or tensor.is_contiguous(), f"{name} must be contiguous")
    tuning = TUNING.get(architecture(x), DEFAULT_TUNING)
    if scales is None:
        kind = 0
    elif weight.dtype == torch.uint8:
        kind = 2
    else:
        kind = 1 if group_size is None else 3
    block_k = group_size if kind >= 2 else tuning["block_k"]
    if x.dtype == torch.float32 and kind < 2:  # twice the shared memory per tile
        block_k = min(block_k, 64)
    tiles = max(1, -(-k // block_k))
    columns = -(-n // tuning["block_n"])
    wanted = max(1, num_processors(x) * tuning["programs"] // columns)
    per_split = -(-tiles // min(wanted, tiles, _MAX_SPLITS))
    splits = -(-tiles // per_split)
    num_stages = tuning["num_stages"]
    if kind == 0 and m > 32 and num_stages > 3:  # x's tiles are as large: keep two programs
        num_stages = 3
    partial = torch.empty((splits, m, n), dtype=torch.float32, device=x.device)
    _kernel[(columns, splits)](
        x, weight, scales, zeros, bias, out, partial, m, n, k, per_split,
        x.stride(0), weight.stride(0), 0 if scales is None else scales.stride(0),
        KIND=kind, BLOCK_M=padded(m), BLOCK_N=tuning["block_n"], BLOCK_K=block_k,
        HAS_BIAS=bias is not None, SPLITS=1 if splits == 1 else 2,
        PRECISION=dot_precision(x.dtype),
        num_warps=tuning["num_warps"], num_stages=num_stages,
    )  # fmt: skip
    if splits > 1:
        _reduce_kernel[(m, -(-n // _REDUCE_BLOCK))](
            partial, bias, out, m, n, splits, HAS_BIAS=bias is not None, BLOCK=_REDUCE_BLOCK,
            num_warps=2,
        )  # fmt: skip
    return out
