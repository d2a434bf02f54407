# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return"
"""Attention of a ragged batch of prompt chunks over the paged KV cache.

The formula is that of paged_decode. Sequence s owns query rows query_start_loc[s] ..
query_start_loc[s + 1] - 1, the last of which sits at position seq_lens[s] - 1; earlier keys are
its cached prefix. The keys of the chunk itself are already in the cache.
Shapes: q and out `(num_tokens, num_heads, head_dim)`; query_start_loc `(num_seqs + 1,)` int32,
rising; seq_lens `(num_seqs,)` int32 (context including the chunk); block_tables `(num_seqs,
max_blocks)` int32; caches `(num_blocks, num_kv_heads, 64, head_dim)`, scales as in paged_decode.
Work: 4 * head_dim * num_heads flops per visible (query, key) pair; bytes are q, out, and the
context once per tile of query rows. Scores and output are accumulated in float32, probabilities
are rounded to q's dtype for the second product.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from .attention_inputs import (
    INTEGER_DTYPES,
    check_attention,
    check_attention_options,
    gather_blocks,
    scale_strides,
)
from .checks import (
    BLOCK_SIZE,
    check_dtype,
    check_fp8_support,
    check_last_contiguous,
    check_shape,
    compute_dtype_of,
)
from .dispatch import architecture, runs_on_triton, tl, triton
from .online_softmax import (
    accumulate,
    cap_scale,
    cap_scores,
    dot_precision,
    finish,
    padded,
    score_scale,
    widen,
)
from .split_plan import PLAN_CHUNK, find_tile

# Query rows per score matrix of the reference: bounds its memory to 256 * context * num_heads.
_ROWS = 256


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention output `(num_tokens, num_heads, head_dim)`; see the module.

    Rows at or beyond query_start_loc[-1] are padding of a captured graph: their output is left
    undefined. Raises KernelArgumentError.
    """
    check_shape("q", q, (None, None, None), "(num_tokens, num_heads, head_dim)")
    check_attention(q, k_cache, v_cache, block_tables, seq_lens, block_tables.shape[0])
    check_shape("query_start_loc", query_start_loc, (seq_lens.shape[0] + 1,), "(num_seqs + 1,)")
    check_dtype("query_start_loc", query_start_loc, INTEGER_DTYPES)
    check_attention_options(k_cache, sliding_window, soft_cap, k_scale, v_scale)
    if runs_on_triton(q):
        return _launch(
            q, k_cache, v_cache, block_tables, query_start_loc, seq_lens, scale, sliding_window,
            soft_cap, k_scale, v_scale,
        )  # fmt: skip
    return prefill_attention_reference(
        q,
        k_cache,
        v_cache,
        block_tables,
        query_start_loc,
        seq_lens,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def prefill_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The formula sequence by sequence; torch's fused attention where it covers the case.

    `compute_dtype` overrides the accumulation dtype and forces the unfused form (tests).
    """
    compute = compute_dtype or compute_dtype_of(q, k_cache)
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_cache.shape[1]
    group = num_heads // num_kv_heads
    out = torch.zeros_like(q)
    starts = query_start_loc.tolist()
    for sequence, length in enumerate(seq_lens.tolist()):
        start, end = starts[sequence], starts[sequence + 1]
        if start == end:
            continue
        count = (length + BLOCK_SIZE - 1) // BLOCK_SIZE
        blocks = block_tables[sequence, :count].long()
        keys, values = (
            gather_blocks(cache, blocks, compute, factor)
            .transpose(0, 1)
            .reshape(num_kv_heads, count * BLOCK_SIZE, head_dim)[:, :length]
            for cache, factor in ((k_cache, k_scale), (v_cache, v_scale))
        )
        query = q[start:end].to(compute).view(end - start, num_kv_heads, group, head_dim)
        query = query.permute(1, 2, 0, 3)
        fused = soft_cap is None and compute_dtype is None
        attend = _attend_fused if fused else _attend
        result = attend(query, keys[:, None], values[:, None], scale, sliding_window, soft_cap)
        out[start:end] = result.permute(2, 0, 1, 3).reshape(end - start, num_heads, head_dim)
    return out


def _mask(rows: int, length: int, first: int, window: int | None) -> torch.Tensor:
    """Visible keys `(rows, length)` for rows at positions first, first + 1, ..."""
    row = torch.arange(first, first + rows)[:, None]
    key = torch.arange(length)[None, :]
    visible = key <= row
    return visible if window is None else visible & (key > row - window)


def _attend_fused(query, keys, values, scale, window, soft_cap):
    del soft_cap
    rows, length = query.shape[2], keys.shape[2]
    shape = (keys.shape[0], query.shape[1], *keys.shape[2:])
    causal = rows == length and window is None
    mask = None if causal or (rows == 1 and window is None) else _mask(
        rows, length, length - rows, window
    )  # fmt: skip
    return functional.scaled_dot_product_attention(
        query,
        keys.expand(shape),
        values.expand(shape),
        attn_mask=mask,
        is_causal=causal and rows > 1,
        scale=scale,
    )


def _attend(query, keys, values, scale, window, soft_cap):
    rows, length = query.shape[2], keys.shape[2]
    parts = []
    for first in range(0, rows, _ROWS):
        part = query[:, :, first : first + _ROWS]
        scores = torch.matmul(part * scale, keys.transpose(-1, -2))
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        visible = _mask(part.shape[2], length, length - rows + first, window)
        scores = scores.masked_fill(~visible, float("-inf"))
        parts.append(torch.matmul(torch.softmax(scores, dim=-1), values))
    return torch.cat(parts, dim=2)


# Per architecture: query rows per program, warps, tiles of 64 keys in flight. All untuned: chosen
# by shared memory (head_dim 128, 16 bit: 32 KiB per stage) and by two warp groups of 64 rows.
TUNING: dict[str, dict[str, int]] = {
    # 128 rows on 8 warps spill 67 times on sm_80 (Triton 3.9), 64 rows on 8 warps do not.
    "sm_80": {"block_m": 64, "num_warps": 8, "num_stages": 2},  # untuned
    "sm_90": {"block_m": 128, "num_warps": 8, "num_stages": 3},  # untuned
    "sm_100": {"block_m": 128, "num_warps": 8, "num_stages": 3},  # untuned
    "gfx942": {"block_m": 128, "num_warps": 4, "num_stages": 2},  # untuned
    "interpreter": {"block_m": 32, "num_warps": 4, "num_stages": 1},  # several tiles at test size
}
DEFAULT_TUNING = {"block_m": 64, "num_warps": 4, "num_stages": 2}  # untuned


@triton.jit
def _attend_tiles(
    q, highest, total, acc, k_ptr, v_ptr, table, first_tile, last_tile, row_position, length,
    scale, cap, k_offset, v_offset, stride_kb, stride_vb, dim_mask,
    k_scale_ptr, v_scale_ptr, stride_ksb, stride_vsb,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, TOKEN_SCALES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One phase of the loop over key tiles; only the masked phases compare positions."""
    keys = tl.arange(0, 64)
    # Block ids are loaded one iteration ahead, as in paged_decode.
    block = tl.load(table + first_tile, mask=first_tile < last_tile, other=0).to(tl.int64)
    for tile in range(first_tile, last_tile):
        next_block = tl.load(table + tile + 1, mask=tile + 1 < last_tile, other=0).to(tl.int64)
        k = tl.load(k_ptr + block * stride_kb + k_offset, mask=dim_mask[:, None], other=0.0)
        scores = tl.dot(q, widen(k, q.dtype), input_precision=PRECISION) * scale
        position = tile * 64 + keys
        if TOKEN_SCALES:
            in_context = position < length
            k_factors = tl.load(k_scale_ptr + block * stride_ksb + keys, mask=in_context, other=0.0)
            scores *= k_factors[None, :]
        scores = cap_scores(scores, cap, HAS_CAP)
        if MASKED:
            visible = position[None, :] <= row_position[:, None]
            if WINDOW > 0:
                visible = visible & (position[None, :] > row_position[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
            v = tl.load(
                v_ptr + block * stride_vb + v_offset,
                mask=(position < length)[:, None] & dim_mask[None, :],
                other=0.0,
            )
        else:
            v = tl.load(v_ptr + block * stride_vb + v_offset, mask=dim_mask[None, :], other=0.0)
        if TOKEN_SCALES:
            v_factors = tl.load(v_scale_ptr + block * stride_vsb + keys, mask=in_context, other=0.0)
            v = v.to(tl.float32) * v_factors[:, None]
        highest, total, acc = accumulate(scores, widen(v, q.dtype), highest, total, acc, PRECISION)
        block = next_block
    return highest, total, acc


@triton.jit(do_not_specialize=["num_seqs", "stride_table"])
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, start_loc_ptr, seq_lens_ptr, k_scale_ptr, v_scale_ptr,
    out_ptr, lse_ptr, num_seqs, scale, cap,
    stride_qt, stride_qh, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ksb, stride_ksh, stride_vsb, stride_vsh, stride_table,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_K_SCALE: tl.constexpr, HAS_V_SCALE: tl.constexpr, HAS_LSE: tl.constexpr,
    TOKEN_SCALES: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    # Later tiles see more keys: start them first, so that the last wave is short.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    seq, seq_first = find_tile(start_loc_ptr, num_seqs, tile, BLOCK_M, CHUNK)
    if seq >= num_seqs:
        return
    start = tl.load(start_loc_ptr + seq).to(tl.int32)
    num_rows = tl.load(start_loc_ptr + seq + 1).to(tl.int32) - start
    length = tl.load(seq_lens_ptr + seq).to(tl.int32)
    m = (tile - seq_first) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_mask = m < num_rows
    prefix = length - num_rows
    lowest = prefix + (tile - seq_first) * BLOCK_M
    top = prefix + tl.minimum((tile - seq_first + 1) * BLOCK_M, num_rows) - 1

    kv_head = head // GROUP
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < HEAD_DIM
    keys = tl.arange(0, 64)
    q_row = (start + m).to(tl.int64)
    store_mask = m_mask[:, None] & dim_mask[None, :]
    q = tl.load(
        q_ptr + q_row[:, None] * stride_qt + head * stride_qh + dims[None, :],
        mask=store_mask,
        other=0.0,
    )
    if HAS_K_SCALE:
        scale *= tl.load(k_scale_ptr + kv_head)
    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_vh
    if TOKEN_SCALES:
        k_scale_ptr += kv_head.to(tl.int64) * stride_ksh
        v_scale_ptr += kv_head.to(tl.int64) * stride_vsh
    k_offset = keys[None, :] * stride_kt + dims[:, None]
    v_offset = keys[:, None] * stride_vt + dims[None, :]
    table = table_ptr + seq.to(tl.int64) * stride_table
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_position = prefix + m

    # Tiles [first, full_first) and [full_last, last) need a mask; those between are seen whole by
    # every row of the program.
    last = top // 64 + 1
    full_last = (lowest + 1) // 64
    first = length * 0
    full_first = first
    if WINDOW > 0:
        first = tl.maximum(lowest - WINDOW + 1, 0) // 64
        full_first = tl.maximum(top - WINDOW + 64, 0) // 64
        full_first = tl.minimum(tl.maximum(full_first, first), last)
        full_last = tl.maximum(full_last, full_first)
        highest, total, acc = _attend_tiles(
            q, highest, total, acc, k_ptr, v_ptr, table, first, full_first, row_position, length,
            scale, cap, k_offset, v_offset, stride_kb, stride_vb, dim_mask,
            k_scale_ptr, v_scale_ptr, stride_ksb, stride_vsb,
            True, WINDOW, HAS_CAP, TOKEN_SCALES, PRECISION,
        )  # fmt: skip
    highest, total, acc = _attend_tiles(
        q, highest, total, acc, k_ptr, v_ptr, table, full_first, full_last, row_position, length,
        scale, cap, k_offset, v_offset, stride_kb, stride_vb, dim_mask,
        k_scale_ptr, v_scale_ptr, stride_ksb, stride_vsb,
        False, WINDOW, HAS_CAP, TOKEN_SCALES, PRECISION,
    )  # fmt: skip
    highest, total, acc = _attend_tiles(
        q, highest, total, acc, k_ptr, v_ptr, table, full_last, last, row_position, length,
        scale, cap, k_offset, v_offset, stride_kb, stride_vb, dim_mask,
        k_scale_ptr, v_scale_ptr, stride_ksb, stride_vsb,
        True, WINDOW, HAS_CAP, TOKEN_SCALES, PRECISION,
    )  # fmt: skip

    if HAS_V_SCALE:
        acc *= tl.load(v_scale_ptr + kv_head)
    acc, lse = finish(highest, total, acc)
    out = out_ptr + ((q_row * NUM_HEADS + head) * HEAD_DIM)[:, None] + dims[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=store_mask)
    if HAS_LSE:
        tl.store(lse_ptr + q_row * NUM_HEADS + head, lse, mask=m_mask)


def _launch(
    q, k_cache, v_cache, block_tables, query_start_loc, seq_lens, scale, sliding_window, soft_cap,
    k_scale, v_scale, lse=None,
):  # fmt: skip
    """Run the kernel; `lse (num_tokens, num_heads)` float32, when given, gets base-2 values."""
    check_last_contiguous("q", q)
    check_fp8_support(q, k_cache)
    num_tokens, num_heads, head_dim = q.shape
    num_seqs = seq_lens.shape[0]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0 or num_seqs == 0:
        return out
    tuning = dict(TUNING.get(architecture(q), DEFAULT_TUNING))
    if q.dtype == torch.float32 and q.is_cuda:  # twice the shared memory per tile
        tuning |= {"block_m": 64, "num_stages": 1}
    block_m = tuning["block_m"]
    _prefill_kernel[(num_heads, -(-num_tokens // block_m) + num_seqs)](
        q, k_cache, v_cache, block_tables, query_start_loc, seq_lens, k_scale, v_scale,
        out, lse, num_seqs, score_scale(scale, soft_cap), cap_scale(soft_cap),
        *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        *scale_strides(k_scale), *scale_strides(v_scale), block_tables.stride(0),
        NUM_HEADS=num_heads, GROUP=num_heads // k_cache.shape[1], HEAD_DIM=head_dim,
        BLOCK_M=block_m, BLOCK_D=padded(head_dim), WINDOW=sliding_window or 0,
        HAS_CAP=soft_cap is not None,
        HAS_K_SCALE=k_scale is not None and k_scale.dim() == 1,
        HAS_V_SCALE=v_scale is not None and v_scale.dim() == 1, HAS_LSE=lse is not None,
        TOKEN_SCALES=k_cache.dtype == torch.int8,
        PRECISION=dot_precision(q.dtype), CHUNK=PLAN_CHUNK,
        num_warps=tuning["num_warps"], num_stages=tuning["num_stages"],
    )  # fmt: skip
    return out
