# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return"
"""The inner step of every attention kernel: scores, running maximum and sum, weighted values.

Scores are kept in base 2 (exp2 is one instruction): `scale` arrives multiplied by log2(e) unless
a soft cap needs the natural scale first. `highest` starts at -inf, `total` and `acc` at 0; all are
float32. The probabilities are rounded to the values' dtype for the second product, as the
tensor core needs.
"""

from __future__ import annotations

import math

import torch

from .dispatch import tl, triton

LOG2_E = 1.4426950408889634


def score_scale(scale: float, soft_cap: float | None) -> float:
    """The factor the kernels multiply q . k with."""
    return scale * LOG2_E if soft_cap is None else scale / soft_cap


def cap_scale(soft_cap: float | None) -> float:
    """The factor after tanh, 0 without a cap (which removes the tanh from the kernel)."""
    return 0.0 if soft_cap is None else soft_cap * LOG2_E


def dot_precision(dtype: torch.dtype) -> str:
    """float32 operands are multiplied in float32, not in TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def padded(size: int, least: int = 16) -> int:
    """Next power of two, at least what the tensor core takes."""
    return max(least, 1 << max(0, math.ceil(math.log2(max(size, 1)))))


@triton.jit
def widen(values, kind: tl.constexpr):
    """fp8 and int8 values in the dtype of the other operand; others as they are.

    By way of float32: on sm_90 the direct fp8 to bf16 conversion is a quarter-rate instruction per
    value, which alone would take longer than HBM needs to deliver the values.
    """
    if values.dtype.primitive_bitwidth == 8:
        values = values.to(tl.float32)
    return values.to(kind)


@triton.jit
def cap_scores(scores, cap, HAS_CAP: tl.constexpr):
    """Apply cap * tanh(x) = cap - 2 cap / (exp(2 x) + 1); scores then are in base 2.

    The shorter form of tanh keeps two fewer tiles alive: with abs and where, the prefill kernel
    with window and cap spilled on sm_90.
    """
    if HAS_CAP:
        scores = cap - 2 * cap / (tl.exp2(2.8853900817779268 * scores) + 1)
    return scores


@triton.jit
def accumulate(
    scores, values, highest, total, acc,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold a tile of base-2 scores `(rows, keys)` and values `(keys, dims)` into the state."""
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    # A row that has seen no key yet keeps -inf; subtracting it would give NaN.
    base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(highest - base)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
    return new_highest, total, acc


@triton.jit
def finish(highest, total, acc):
    """(normalised output, base-2 log-sum-exp); a row that saw no key gives zeros and -inf."""
    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    base = tl.where(seen, highest, 0.0)
    return acc / divisor[:, None], tl.where(seen, base + tl.log2(divisor), float("-inf"))


@triton.jit
def combine_splits(
    partial_out_ptr, partial_lse_ptr, first, count, row, stride_item, stride_item_lse,
    dims, dim_mask, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of one row: returns (out (BLOCK_D,), base-2 log-sum-exp).

    Item i holds its row at `i * stride_item + row * HEAD_DIM`; partial log-sum-exps are base 2.
    """
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, count, SPLITS):
        split = start + tl.arange(0, SPLITS)
        item = (first + split).to(tl.int64)
        valid = split < count
        lse = tl.load(
            partial_lse_ptr + item * stride_item_lse + row, mask=valid, other=float("-inf")
        )
        part = tl.load(
            partial_out_ptr + item[:, None] * stride_item + row * HEAD_DIM + dims[None, :],
            mask=valid[:, None] & dim_mask[None, :],
            other=0.0,
        )
        new_highest = tl.maximum(highest, tl.max(lse, 0))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weight = tl.exp2(lse - base)
        decay = tl.exp2(highest - base)
        total = total * decay + tl.sum(weight, 0)
        acc = acc * decay + tl.sum(part * weight[:, None], 0)
        highest = new_highest
    divisor = tl.where(total > 0, total, 1.0)
    base = tl.where(total > 0, highest, 0.0)
    return acc / divisor, tl.where(total > 0, base + tl.log2(divisor), float("-inf"))
