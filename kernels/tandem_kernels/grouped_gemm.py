# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return"
"""One matrix product per group of rows, all groups in one launch: y[i] = x[rows[i]] @ w[g(i)].T.

The experts of a mixture are the groups. Shapes: x `(num_rows, k)`; w `(num_groups, n, k)`;
group_starts `(num_groups + 1,)` int32, rising: group g has the outputs group_starts[g] ..
group_starts[g + 1] - 1; rows `(m,)` names each output's row of x (absent: its own); y `(m, n)`.
Bytes moved: the weights of each group that has rows once per 16 to 64 of its rows, x once per tile
of outputs. Products are accumulated in float32.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from .attention_inputs import INTEGER_DTYPES
from .checks import (
    FLOAT_DTYPES,
    check,
    check_dtype,
    check_last_contiguous,
    check_same_device,
    check_shape,
)
from .dispatch import architecture, runs_on_triton, tl, triton
from .online_softmax import dot_precision, padded
from .split_plan import PLAN_CHUNK, find_tile

ROWS_PER_TILE = (16, 32, 64)
"""Rows of one group that a program takes; which, decides the mean size of a group."""


def grouped_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    group_starts: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return y `(m, n)`; outputs at or beyond group_starts[-1] are left undefined.

    Raises KernelArgumentError.
    """
    check_shape("x", x, (None, None), "(num_rows, k)")
    check_dtype("x", x, FLOAT_DTYPES)
    check_last_contiguous("x", x)
    check_shape("weight", weight, (None, None, x.shape[1]), "(num_groups, n, k)")
    check_dtype("weight", weight, (x.dtype,))
    check_last_contiguous("weight", weight)
    wanted = (weight.shape[0] + 1,)
    check_shape("group_starts", group_starts, wanted, "(num_groups + 1,)")
    check_dtype("group_starts", group_starts, INTEGER_DTYPES)
    if rows is not None:
        check_shape("rows", rows, (None,), "(m,)")
        check_dtype("rows", rows, INTEGER_DTYPES)
    check_same_device("x", x, weight=weight, group_starts=group_starts, rows=rows)
    if runs_on_triton(x):
        return _launch(x, weight, group_starts, rows)
    return grouped_gemm_reference(x, weight, group_starts, rows=rows)


def grouped_gemm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    group_starts: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Group by group; `compute_dtype` overrides the dtype of the products (tests)."""
    compute = compute_dtype or x.dtype
    m = x.shape[0] if rows is None else rows.shape[0]
    out = torch.zeros((m, weight.shape[1]), dtype=x.dtype, device=x.device)
    starts = group_starts.tolist()
    for group, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        if start == end:
            continue
        mine = x[start:end] if rows is None else x[rows[start:end].long()]
        out[start:end] = functional.linear(mine.to(compute), weight[group].to(compute)).to(x.dtype)
    return out


# Per architecture: outputs and inputs per tile, warps, tiles in flight. All untuned: 64 x 64 16-bit
# weights are 8 KiB per stage.
TUNING: dict[str, dict[str, int]] = {
    "sm_80": {"block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 3},
    "sm_90": {"block_n": 128, "block_k": 64, "num_warps": 4, "num_stages": 4},
    "sm_100": {"block_n": 128, "block_k": 64, "num_warps": 4, "num_stages": 4},
    "gfx942": {"block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 2},
}
DEFAULT_TUNING = {"block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 2}


@triton.jit(do_not_specialize=["num_groups"])
def _kernel(
    x_ptr, weight_ptr, starts_ptr, rows_ptr, out_ptr,
    num_groups, n, k, stride_x, stride_wg, stride_wn,
    HAS_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    tile_n = tl.program_id(0)
    tile = tl.program_id(1)
    group, group_first = find_tile(starts_ptr, num_groups, tile, BLOCK_M, CHUNK)
    if group >= num_groups:
        return
    end = tl.load(starts_ptr + group + 1).to(tl.int32)
    start = tl.load(starts_ptr + group).to(tl.int32) + (tile - group_first) * BLOCK_M
    at = start + tl.arange(0, BLOCK_M)
    at_mask = at < end
    row = at
    if HAS_ROWS:
        row = tl.load(rows_ptr + at, mask=at_mask, other=0)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = column < n
    inner = tl.arange(0, BLOCK_K)
    x_row = x_ptr + (row.to(tl.int64) * stride_x)[:, None]
    weight_row = weight_ptr + group.to(tl.int64) * stride_wg + (column * stride_wn)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, k, BLOCK_K):
        place = first + inner
        place_mask = place < k
        x = tl.load(x_row + place[None, :], mask=at_mask[:, None] & place_mask[None, :], other=0.0)
        weight = tl.load(
            weight_row + place[:, None],
            mask=place_mask[:, None] & column_mask[None, :],
            other=0.0,
        )
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    tl.store(
        out_ptr + (at.to(tl.int64) * n)[:, None] + column[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=at_mask[:, None] & column_mask[None, :],
    )


def _launch(x, weight, group_starts, rows):
    num_groups, n, k = weight.shape
    check(
        weight.stride(1) * n < 2**31,
        f"weight has {n} rows of stride {weight.stride(1)}; a group must lie within 2^31 elements",
    )
    m = x.shape[0] if rows is None else rows.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m == 0 or n == 0 or num_groups == 0:
        return out
    tuning = TUNING.get(architecture(x), DEFAULT_TUNING)
    block_n, block_k, num_stages = tuning["block_n"], tuning["block_k"], tuning["num_stages"]
    if x.dtype == torch.float32:  # twice the shared memory per tile; 64 x 128 spill on sm_90
        block_n, block_k, num_stages = min(block_n, 64), block_k // 2, min(num_stages, 3)
    block_m = rows_per_tile(m, num_groups)
    # No group has more tiles than its rows fill, and one begun.
    tiles = -(-m // block_m) + min(num_groups, m)
    _kernel[(-(-n // block_n), tiles)](
        x, weight, group_starts, rows, out,
        num_groups, n, k, x.stride(0), weight.stride(0), weight.stride(1),
        HAS_ROWS=rows is not None, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        PRECISION=dot_precision(x.dtype), CHUNK=PLAN_CHUNK,
        num_warps=tuning["num_warps"], num_stages=num_stages,
    )  # fmt: skip
    return out


def rows_per_tile(m: int, num_groups: int) -> int:
    """Twice the mean group, so that most groups are one tile; the host knows no group's size."""
    return min(ROWS_PER_TILE[-1], padded(2 * m // num_groups, ROWS_PER_TILE[0]))
