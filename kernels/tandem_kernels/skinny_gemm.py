# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
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
    check_last_contiguous,
    check_same_device,
    check_shape,
    compute_dtype_of,
)
from .dispatch import runs_on_triton
from .quantize import QuantizedWeight, dequantize

MAX_ROWS = 64
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
    `(n,)`; uint8 is packed int4 and takes scales, zeros `(n, k / group_size)` and group_size.
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
        check_shape("scales", scales, (n,), "(n,)")
        check(zeros is None, "zeros is given; only int4 weights have zero points")
        return
    if zeros is None or group_size not in (32, 64, 128):
        raise KernelArgumentError(
            f"an int4 weight needs zeros and group_size 32, 64 or 128; got group_size={group_size}"
        )
    check(k % group_size == 0, f"x has {k} columns; not a multiple of group_size={group_size}")
    check_shape("scales", scales, (n, k // group_size), "(n, k / group_size)")
    check_shape("zeros", zeros, (n, k // group_size), "(n, k / group_size)")


def _launch(x, weight, bias, scales, zeros, group_size):
    return skinny_gemm_reference(
        x, weight, bias=bias, scales=scales, zeros=zeros, group_size=group_size
    )
