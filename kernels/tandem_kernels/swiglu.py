# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""SwiGLU on the fused gate and up projection: out = silu(gate) * up.

Shapes: gate_up `(..., 2 * d)` with the gate in the first half; out `(..., d)`.
Bytes moved: 2 d read and d written per row. The sigmoid and the product are in float32.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from .checks import FLOAT_DTYPES, check, check_dtype, compute_dtype_of
from .dispatch import runs_on_triton


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


def _launch(gate_up):
    return swiglu_reference(gate_up)
