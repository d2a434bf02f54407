# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return"
"""SwiGLU on the fused gate and up projection: out = silu(gate) * up.

Shapes: gate_up `(..., 2 * d)` with the gate in the first half; out `(..., d)`.
Bytes moved: 2 d read and d written per row. The sigmoid and the product are in float32.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from .checks import FLOAT_DTYPES, check, check_dtype, check_last_contiguous, compute_dtype_of
from .dispatch import runs_on_triton, tl, triton
from .online_softmax import padded


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate_up[..., :d]) * gate_up[..., d:]. Raises KernelArgumentError."""
    check_dtype("gate_up", gate_up, FLOAT_DTYPES)
    check(
        gate_up.shape[-1] % 2 == 0,
        f"gate_up has {gate_up.shape[-1]} columns; the gate and up halves need an even number",
    )
    if runs_on_triton(gate_up):
        return _launch(gate_up)
    return swiglu_reference(gate_up)


def swiglu_reference(
    gate_up: torch.Tensor, *, compute_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The formula in torch; `compute_dtype` overrides the accumulation dtype (tests)."""
    compute = compute_dtype or compute_dtype_of(gate_up)
    gate, up = gate_up.to(compute).chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(gate_up.dtype)


# Columns per program and warps. Untuned.
_BLOCK = 1024
_NUM_WARPS = 4


@triton.jit
def _kernel(gate_up_ptr, out_ptr, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    gate = tl.load(gate_up_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + SIZE + column, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * SIZE + column, out.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(gate_up):
    size = gate_up.shape[-1] // 2
    rows = gate_up.reshape(-1, 2 * size)
    check_last_contiguous("gate_up", rows)
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype, device=gate_up.device)
    if rows.shape[0] and size:
        block = min(_BLOCK, padded(size))
        _kernel[(rows.shape[0], -(-size // block))](
            rows, out, rows.stride(0), SIZE=size, BLOCK=block, num_warps=_NUM_WARPS
        )
    return out
