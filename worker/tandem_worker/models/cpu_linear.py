"""A bfloat16 matrix on a CPU: read as it is by one row, laid out for a few, widened for many.

One row reads every weight for little arithmetic, and the plain layout reads fastest; a few rows do
better with oneDNN's own. A step of many rows is all arithmetic, and without AMX a core multiplies
float32 faster than bfloat16 (133 and 77 GFLOP/s at 512 rows, one core of a shared Xeon, torch 2.15,
`benchmarks/engine_cpu.py`): each matrix is widened into a scratch that stays warm, and the products
are also more exact. Both layouts together take what float32 weights would.
"""

from __future__ import annotations

import threading
from typing import TypeGuard

import torch
import torch.nn.functional as F

MANY_ROWS = 96
"""From so many rows on, widening a matrix costs less than its slower product."""

_scratch = threading.local()


def computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def prefers_float32(num_rows: int) -> bool:
    """Whether a step of so many rows is better computed in float32, weights widened."""
    return num_rows >= MANY_ROWS and not torch.cpu._is_amx_tile_supported()


def is_suited(weight: object) -> TypeGuard[torch.Tensor]:
    """Whether :class:`CpuMatrix` takes it: a dense bfloat16 matrix where oneDNN is."""
    return (
        isinstance(weight, torch.Tensor)
        and weight.dim() == 2
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and computes_bfloat16()
    )


class CpuMatrix:
    """A bfloat16 matrix ``(out_features, in_features)`` in two layouts."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._plain = weight
        self._laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, 16)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ weight.T + bias`` in the dtype of ``x``, bfloat16 or, widened, float32."""
        if x.dtype == torch.float32:
            wide = _take_scratch(self._plain.shape).copy_(self._plain)
            return F.linear(x, wide, None if bias is None else bias.float())
        if x.shape[0] == 1:
            return F.linear(x, self._plain, bias)
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._laid_out, bias, "none", [], ""
        )
        return out


def _take_scratch(shape: torch.Size) -> torch.Tensor:
    """This thread's float32 scratch: new memory each time would have to be mapped first."""
    scratch: torch.Tensor | None = getattr(_scratch, "values", None)
    if scratch is None or scratch.numel() < shape.numel():
        scratch = _scratch.values = torch.empty(shape.numel(), dtype=torch.float32)
    return scratch[: shape.numel()].view(shape)
