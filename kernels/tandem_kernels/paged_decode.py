# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return"
"""Decode attention over a paged KV cache, a few query rows per sequence.

    o[s, r, h] = sum_j softmax_j(cap(scale * q[s, r, h] . k[s, j, h / group])) v[s, j, h / group]

over keys j <= p and j > p - sliding_window, where p = seq_lens[s] - num_query_rows + r is the row's
position; cap(x) = soft_cap * tanh(x / soft_cap). More than one query row verifies drafted tokens.
Shapes: q `(num_seqs, num_query_rows, num_heads, head_dim)`; caches `(num_blocks, num_kv_heads, 64,
head_dim)`; block_tables `(num_seqs, max_blocks)` int32; seq_lens `(num_seqs,)` int32, the context
including the query rows; out as q; log-sum-exp `(num_seqs, num_query_rows, num_heads)` float32.
Bytes moved: every key and value of the context once (2 * context * num_kv_heads * head_dim *
itemsize); q, out and the split partials are small beside them. Scores, the running maximum and
sum, and the output are accumulated in float32; a sequence of length 0 yields zeros and -inf.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch.nn import functional

from .attention_inputs import (
    check_attention,
    check_attention_options,
    gather_blocks,
    scale_strides,
)
from .checks import (
    BLOCK_SIZE,
    check,
    check_fp8_support,
    check_last_contiguous,
    check_shape,
    compute_dtype_of,
)
from .dispatch import architecture, num_processors, runs_on_triton, tl, triton
from .online_softmax import (
    accumulate,
    cap_scale,
    cap_scores,
    combine_splits,
    dot_precision,
    finish,
    padded,
    score_scale,
    widen,
)
from .split_plan import PLAN_CHUNK, items_before, tile_range, tiles_per_item

# Keys of a batch beyond this many elements are attended to sequence by sequence in the reference:
# 8 x 1000 tokens x 4 heads x 32 took 4.6 ms as one padded batch and 3.6 ms in turn, 8 x 100 tokens
# 0.3 and 0.8 ms (one core of a shared Xeon, float32, 2026-11).
_CACHED_ELEMENTS = 262_144


@overload
def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = ...,
    soft_cap: float | None = ...,
    return_lse: Literal[False] = ...,
    k_scale: torch.Tensor | None = ...,
    v_scale: torch.Tensor | None = ...,
) -> torch.Tensor: ...


@overload
def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = ...,
    soft_cap: float | None = ...,
    return_lse: Literal[True],
    k_scale: torch.Tensor | None = ...,
    v_scale: torch.Tensor | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return out, or (out, log-sum-exp) with `return_lse`; see the module for formula and shapes.

    k_scale and v_scale, float32, are `(num_kv_heads,)` of fp8 caches and `(num_blocks,
    num_kv_heads, 64)` of int8 ones. Entries of block_tables beyond a sequence's length are never
    read. Raises KernelArgumentError.
    """
    check_shape("q", q, (None, None, None, None), "(num_seqs, num_query_rows, num_heads, head_dim)")
    check_attention(q, k_cache, v_cache, block_tables, seq_lens, q.shape[0])
    check_attention_options(k_cache, sliding_window, soft_cap, k_scale, v_scale)
    if runs_on_triton(q):
        out, lse = _launch(
            q, k_cache, v_cache, block_tables, seq_lens, scale, sliding_window, soft_cap,
            k_scale, v_scale,
        )  # fmt: skip
    else:
        out, lse = paged_decode_attention_reference(
            q,
            k_cache,
            v_cache,
            block_tables,
            seq_lens,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            k_scale=k_scale,
            v_scale=v_scale,
            return_lse=return_lse,
        )
    return (out, lse) if return_lse else out


def paged_decode_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    return_lse: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The formula over padded block tables; this is also the CPU engine's decode path.

    Without log-sum-exp and cap it is torch's fused attention. A batch too large for the core's
    cache goes sequence by sequence, which also spares a ragged batch its padding.
    `compute_dtype` overrides the accumulation dtype and forces the unfused form (tests).
    """
    num_seqs, num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    compute = compute_dtype or compute_dtype_of(q, k_cache)
    fused = not return_lse and soft_cap is None and compute_dtype is None
    lens = seq_lens.long()
    length = max(int(lens.max()), 0) if num_seqs else 0
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "k_scale": k_scale,
               "v_scale": v_scale, "return_lse": False}  # fmt: skip
    if length == 0:
        empty = torch.full(q.shape[:3], float("-inf"), dtype=_lse_dtype(compute))
        return torch.zeros_like(q), empty
    if fused and num_seqs > 1 and num_seqs * length * num_kv_heads * head_dim > _CACHED_ELEMENTS:
        parts = [
            paged_decode_attention_reference(
                q[s : s + 1], k_cache, v_cache, block_tables[s : s + 1], lens[s : s + 1], **options
            )[0]
            for s in range(num_seqs)
        ]
        return torch.cat(parts), None

    count = (length + BLOCK_SIZE - 1) // BLOCK_SIZE
    position = torch.arange(length)
    ragged = int(lens.min()) < length
    blocks = block_tables[:, :count].long()
    if ragged:
        used = torch.arange(count) * BLOCK_SIZE < lens[:, None]
        blocks = torch.where(used, blocks, 0)
    keys, values = (
        gather_blocks(cache, blocks.flatten(), compute, factor)
        .view(num_seqs, count, num_kv_heads, BLOCK_SIZE, head_dim)
        .transpose(1, 2)
        .reshape(num_seqs, num_kv_heads, count * BLOCK_SIZE, head_dim)[:, :, :length]
        for cache, factor in ((k_cache, k_scale), (v_cache, v_scale))
    )
    visible = None
    if ragged or num_rows > 1 or sliding_window is not None:
        row = lens[:, None] - num_rows + torch.arange(num_rows)
        visible = position <= row[..., None]
        if sliding_window is not None:
            visible &= position > row[..., None] - sliding_window
        visible = visible.repeat_interleave(num_heads // num_kv_heads, dim=1)[:, None]
    if ragged:
        beyond = (position >= lens[:, None])[:, None, :, None]
        values = values.masked_fill(beyond, 0)  # unused slots may hold NaN
        keys = keys.masked_fill(beyond, 0)

    query = q.view(num_seqs, num_rows, num_kv_heads, -1, head_dim).to(compute)
    query = query.transpose(1, 2).reshape(num_seqs, num_kv_heads, -1, head_dim)
    if fused:
        out, lse = _attend_fused(query, keys, values, visible, scale), None
    else:
        out, lse = _attend(query, keys, values, visible, scale, soft_cap)
        lse = lse.view(num_seqs, num_kv_heads, num_rows, -1).transpose(1, 2)
        lse = lse.reshape(q.shape[:3]).to(_lse_dtype(compute))
    out = out.view(num_seqs, num_kv_heads, num_rows, -1, head_dim).transpose(1, 2)
    return out.reshape(q.shape).to(q.dtype), lse


def _attend_fused(query, keys, values, visible, scale):
    out = functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=visible, scale=scale
    )
    return out if visible is None else out.masked_fill(~visible.any(-1, keepdim=True), 0)


def _attend(query, keys, values, visible, scale, soft_cap):
    scores = torch.matmul(query * scale, keys.transpose(-1, -2))
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    highest = scores.amax(-1, keepdim=True)
    highest = torch.where(highest == float("-inf"), 0, highest)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    out = torch.matmul(weights, values)
    out = torch.where(total > 0, out / total, 0)
    return out, (highest + torch.log(total)).squeeze(-1)


def _lse_dtype(compute: torch.dtype) -> torch.dtype:
    return torch.float64 if compute == torch.float64 else torch.float32


# Per architecture: programs per processor the splits aim at, warps, loads in flight (tiles of
# 64 keys). All untuned: chosen so that two programs with all tiles in flight fit one processor's
# shared memory (head_dim 128, 16 bit: 32 KiB per stage); to be replaced by measurements.
TUNING: dict[str, dict[str, int]] = {
    "sm_80": {"programs": 2, "num_warps": 4, "num_stages": 2},  # untuned
    "sm_90": {"programs": 2, "num_warps": 4, "num_stages": 3},  # untuned
    "sm_100": {"programs": 2, "num_warps": 4, "num_stages": 3},  # untuned
    "gfx942": {"programs": 2, "num_warps": 4, "num_stages": 2},  # untuned
}
DEFAULT_TUNING = {"programs": 2, "num_warps": 4, "num_stages": 2}  # untuned


@triton.jit(do_not_specialize=["num_seqs", "target_items", "stride_table"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, seq_lens_ptr, k_scale_ptr, v_scale_ptr,
    out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr,
    num_seqs, target_items, scale, cap,
    stride_qs, stride_qr, stride_qh, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ksb, stride_ksh, stride_vsb, stride_vsh, stride_table,
    NUM_ROWS: tl.constexpr, GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_K_SCALE: tl.constexpr,
    HAS_V_SCALE: tl.constexpr, TOKEN_SCALES: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    per_item = tiles_per_item(seq_lens_ptr, num_seqs, target_items, NUM_ROWS, WINDOW, CHUNK)
    seq, seq_first, _ = items_before(
        seq_lens_ptr, num_seqs, per_item, item, 0, NUM_ROWS, WINDOW, CHUNK
    )
    if seq >= num_seqs:
        return
    length = tl.load(seq_lens_ptr + seq).to(tl.int32)
    first_tile, last_tile = tile_range(length, NUM_ROWS, WINDOW)
    alone = last_tile - first_tile <= per_item
    first_tile += (item - seq_first) * per_item
    last_tile = tl.minimum(first_tile + per_item, last_tile)

    # Row m of the tile is query row m // GROUP, head m % GROUP of this KV head.
    m = tl.arange(0, BLOCK_M)
    m_mask = m < NUM_ROWS * GROUP
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < HEAD_DIM
    keys = tl.arange(0, 64)
    q_offset = (
        seq.to(tl.int64) * stride_qs
        + (m // GROUP) * stride_qr
        + (kv_head * GROUP + m % GROUP) * stride_qh
    )
    q = tl.load(
        q_ptr + q_offset[:, None] + dims[None, :],
        mask=m_mask[:, None] & dim_mask[None, :],
        other=0.0,
    )
    row_position = length - NUM_ROWS + m // GROUP
    if HAS_K_SCALE:
        scale *= tl.load(k_scale_ptr + kv_head)

    k_offset = kv_head * stride_kh + keys[None, :] * stride_kt + dims[:, None]
    v_offset = kv_head * stride_vh + keys[:, None] * stride_vt + dims[None, :]
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    table = table_ptr + seq.to(tl.int64) * stride_table
    # The next tile's block id is loaded one iteration ahead: a look-up between two dependent
    # loads would halve the depth of Triton's load pipeline.
    block = tl.load(table + first_tile).to(tl.int64)
    for tile in range(first_tile, last_tile):
        next_block = tl.load(table + tile + 1, mask=tile + 1 < last_tile, other=0).to(tl.int64)
        position = tile * 64 + keys
        k = tl.load(k_ptr + block * stride_kb + k_offset, mask=dim_mask[:, None], other=0.0)
        # Values past the end may be NaN, and 0 * NaN is NaN: load zeros in their place.
        v = tl.load(
            v_ptr + block * stride_vb + v_offset,
            mask=(position < length)[:, None] & dim_mask[None, :],
            other=0.0,
        )
        scores = tl.dot(q, widen(k, q.dtype), input_precision=PRECISION) * scale
        if TOKEN_SCALES:
            in_context = position < length
            k_at = block * stride_ksb + kv_head * stride_ksh + keys
            v_at = block * stride_vsb + kv_head * stride_vsh + keys
            scores *= tl.load(k_scale_ptr + k_at, mask=in_context, other=0.0)[None, :]
            v_factors = tl.load(v_scale_ptr + v_at, mask=in_context, other=0.0)
            v = v.to(tl.float32) * v_factors[:, None]
        scores = cap_scores(scores, cap, HAS_CAP)
        visible = position[None, :] <= row_position[:, None]
        if WINDOW > 0:
            visible = visible & (position[None, :] > row_position[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        v = widen(v, q.dtype)
        highest, total, acc = accumulate(scores, v, highest, total, acc, PRECISION)
        block = next_block

    if HAS_V_SCALE:
        acc *= tl.load(v_scale_ptr + kv_head)
    acc, lse = finish(highest, total, acc)
    store_mask = m_mask[:, None] & dim_mask[None, :]
    if alone:
        out_row = (seq * NUM_ROWS + m // GROUP).to(tl.int64) * (NUM_KV_HEADS * GROUP)
        out_row += kv_head * GROUP + m % GROUP
        tl.store(
            out_ptr + out_row[:, None] * HEAD_DIM + dims[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=store_mask,
        )
        tl.store(lse_ptr + out_row, lse * 0.6931471805599453, mask=m_mask)
    else:
        row = (item.to(tl.int64) * NUM_KV_HEADS + kv_head) * (NUM_ROWS * GROUP) + m
        tl.store(partial_out_ptr + row[:, None] * HEAD_DIM + dims[None, :], acc, mask=store_mask)
        tl.store(partial_lse_ptr + row, lse, mask=m_mask)


@triton.jit(do_not_specialize=["num_seqs", "target_items"])
def _combine_kernel(
    seq_lens_ptr, out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, num_seqs, target_items,
    NUM_ROWS: tl.constexpr, GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0)
    head_row = tl.program_id(1)  # query row * num_heads + head
    per_item = tiles_per_item(seq_lens_ptr, num_seqs, target_items, NUM_ROWS, WINDOW, CHUNK)
    length = tl.load(seq_lens_ptr + seq).to(tl.int32)
    first_tile, last_tile = tile_range(length, NUM_ROWS, WINDOW)
    count = (last_tile - first_tile + per_item - 1) // per_item
    if count == 1:
        return  # the one item wrote the result itself
    _, _, first = items_before(seq_lens_ptr, num_seqs, per_item, 0, seq, NUM_ROWS, WINDOW, CHUNK)
    head = head_row % (NUM_KV_HEADS * GROUP)
    query_row = head_row // (NUM_KV_HEADS * GROUP)
    row = (head // GROUP) * (NUM_ROWS * GROUP) + query_row * GROUP + head % GROUP
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < HEAD_DIM
    rows_per_item: tl.constexpr = NUM_KV_HEADS * NUM_ROWS * GROUP
    out, lse = combine_splits(
        partial_out_ptr, partial_lse_ptr, first, count, row, rows_per_item * HEAD_DIM,
        rows_per_item, dims, dim_mask, HEAD_DIM, SPLITS, BLOCK_D,
    )  # fmt: skip
    out_row = seq.to(tl.int64) * rows_per_item + head_row
    tl.store(out_ptr + out_row * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=dim_mask)
    tl.store(lse_ptr + out_row, lse * 0.6931471805599453)


def _launch(
    q, k_cache, v_cache, block_tables, seq_lens, scale, sliding_window, soft_cap, k_scale, v_scale
):
    check_last_contiguous("q", q)
    num_seqs, num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    rows = num_rows * (num_heads // num_kv_heads)
    check(
        rows <= 128,
        f"q packs {rows} rows per KV head (query rows * heads per KV head); at most 128 fit, "
        "verify fewer drafted tokens at a time",
    )
    check_fp8_support(q, k_cache)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        # Offsets within a block are 32-bit: 64-bit ones spilled on sm_100 (fp8, Triton 3.9).
        check(
            cache.stride(1) * num_kv_heads < 2**31,
            f"{name} has stride {cache.stride(1)} between KV heads; a block's heads must lie "
            "within 2^31 elements",
        )
    tuning = TUNING.get(architecture(q), DEFAULT_TUNING)
    target = max(1, num_processors(q) * tuning["programs"] // num_kv_heads)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if num_seqs == 0 or num_rows == 0:
        return out, lse
    items = target + num_seqs
    shape = (items, num_kv_heads, rows)
    partial_out = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    variant = decode_variant(q, k_cache, sliding_window, soft_cap, k_scale, v_scale)
    _decode_kernel[(num_kv_heads, items)](
        q, k_cache, v_cache, block_tables, seq_lens, k_scale, v_scale,
        out, lse, partial_out, partial_lse,
        num_seqs, target, score_scale(scale, soft_cap), cap_scale(soft_cap),
        q.stride(0), q.stride(1), q.stride(2), *k_cache.stride()[:3], *v_cache.stride()[:3],
        *scale_strides(k_scale), *scale_strides(v_scale), block_tables.stride(0),
        **variant, num_warps=tuning["num_warps"], num_stages=tuning["num_stages"],
    )  # fmt: skip
    combined = ("NUM_ROWS", "GROUP", "NUM_KV_HEADS", "HEAD_DIM", "BLOCK_D", "WINDOW", "CHUNK")
    _combine_kernel[(num_seqs, num_rows * num_heads)](
        seq_lens, out, lse, partial_out, partial_lse, num_seqs, target,
        **{name: variant[name] for name in combined}, SPLITS=16, num_warps=4,
    )  # fmt: skip
    return out, lse


def decode_variant(q, k_cache, sliding_window, soft_cap, k_scale, v_scale):
    """The kernel's compile-time arguments for these tensors."""
    num_rows, num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_cache.shape[1]
    group = num_heads // num_kv_heads
    return {
        "NUM_ROWS": num_rows,
        "GROUP": group,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_M": padded(num_rows * group),
        "BLOCK_D": padded(head_dim),
        "WINDOW": sliding_window or 0,
        "HAS_CAP": soft_cap is not None,
        "HAS_K_SCALE": k_scale is not None and k_scale.dim() == 1,
        "HAS_V_SCALE": v_scale is not None and v_scale.dim() == 1,
        "TOKEN_SCALES": k_cache.dtype == torch.int8,
        "PRECISION": dot_precision(q.dtype),
        "CHUNK": PLAN_CHUNK,
    }
