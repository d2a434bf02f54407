# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return"
"""Residual addition and RMSNorm in one pass.

    r = x + residual                         (r = x without a residual)
    y = r / sqrt(mean(r^2) + eps) * weight

Shapes: x, residual, y, r `(..., hidden)`; weight `(hidden,)`.
Bytes moved: 2 reads and 2 writes of x per call with a residual, 1 and 1 without, plus the weight.
The sum, the mean and the product are accumulated in float32; r is rounded to x's dtype once and
that rounded value is normalised, as the next layer will add to the same rounded residual.
"""

from __future__ import annotations

import torch

from .checks import (
    FLOAT_DTYPES,
    check_dtype,
    check_last_contiguous,
    check_same_device,
    check_shape,
    compute_dtype_of,
)
from .dispatch import runs_on_triton, tl, triton
from .online_softmax import padded


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(normed, x + residual)`; with `residual=None` the second is x itself.

    x `(..., hidden)` in fp16, bf16, fp32 or (CPU) fp64; residual of x's shape and dtype; weight
    `(hidden,)`. Nothing is changed in place. Raises KernelArgumentError.
    """
    check_dtype("x", x, FLOAT_DTYPES)
    check_shape("weight", weight, (x.shape[-1],), "(hidden,)")
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape), "the shape of x")
        check_dtype("residual", residual, (x.dtype,))
    check_same_device("x", x, residual=residual, weight=weight)
    if runs_on_triton(x):
        return _launch(x, residual, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)


def add_rms_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in torch; `compute_dtype` overrides the accumulation dtype (tests)."""
    compute = compute_dtype or compute_dtype_of(x)
    summed = x if residual is None else x + residual
    if summed.dtype == compute:
        return torch.rms_norm(summed, (summed.shape[-1],), weight.to(compute), eps), summed
    wide = summed.to(compute)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(compute)).to(x.dtype), summed


# One program per row. Warps by row length: enough that a thread holds at most 32 values. Untuned.
def _num_warps(block: int) -> int:
    return min(16, max(1, block // 512))


@triton.jit
def _kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, eps, stride_x, stride_residual,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < HIDDEN
    x = tl.load(x_ptr + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_residual + column, mask=mask, other=0.0)
        rounded = (x + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * HIDDEN + column, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / HIDDEN + eps)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    normed = x * scale * weight
    tl.store(out_ptr + row * HIDDEN + column, normed.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(x, residual, weight, eps):
    hidden = x.shape[-1]
    rows = x.reshape(-1, hidden)
    check_last_contiguous("x", rows)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = x
    residual_rows = None
    if residual is not None:
        residual_rows = residual.reshape(-1, hidden)
        check_last_contiguous("residual", residual_rows)
        summed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows.shape[0] and hidden:
        block = padded(hidden)
        _kernel[(rows.shape[0],)](
            rows, residual_rows, weight, out, summed, eps, rows.stride(0),
            0 if residual_rows is None else residual_rows.stride(0),
            HIDDEN=hidden, BLOCK=block, HAS_RESIDUAL=residual is not None,
            num_warps=_num_warps(block),
        )  # fmt: skip
    return out, summed
