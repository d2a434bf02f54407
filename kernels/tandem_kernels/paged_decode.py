# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
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

import torch
from torch.nn import functional

from .checks import (
    BLOCK_SIZE,
    FLOAT_DTYPES,
    FP8_DTYPES,
    check,
    check_dtype,
    check_heads,
    check_paged_cache,
    check_same_device,
    check_shape,
    compute_dtype_of,
)
from .dispatch import runs_on_triton

INTEGER_DTYPES = (torch.int32, torch.int64)

# Keys of a batch beyond this many elements are attended to sequence by sequence in the reference:
# 8 x 1000 tokens x 4 heads x 32 took 4.6 ms as one padded batch and 3.6 ms in turn, 8 x 100 tokens
# 0.3 and 0.8 ms (one core of a shared Xeon, float32, 2026-11).
_CACHED_ELEMENTS = 262_144


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

    k_scale and v_scale `(num_kv_heads,)` float32 belong to fp8 caches. Entries of block_tables
    beyond a sequence's length are never read. Raises KernelArgumentError.
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
    options = {"scale": scale, "sliding_window": sliding_window, "k_scale": k_scale,
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


def gather_blocks(
    cache: torch.Tensor, blocks: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None
) -> torch.Tensor:
    """Copy blocks out of a cache as `(len(blocks), num_kv_heads, 64, head_dim)` in `dtype`."""
    if cache.dtype in FP8_DTYPES:
        gathered = cache.view(torch.uint8).index_select(0, blocks).view(cache.dtype).to(dtype)
    else:
        gathered = cache.index_select(0, blocks).to(dtype)
    return gathered if scale is None else gathered * scale.to(dtype)[:, None, None]


def check_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    num_seqs: int,
) -> None:
    """Checks every attention over the paged cache shares; q is `(..., num_heads, head_dim)`."""
    check_dtype("q", q, FLOAT_DTYPES)
    _, num_kv_heads = check_paged_cache(k_cache, v_cache, q.shape[-1])
    check_heads(q.shape[-2], num_kv_heads)
    check_shape("block_tables", block_tables, (num_seqs, None), "(num_seqs, max_blocks)")
    check_dtype("block_tables", block_tables, INTEGER_DTYPES)
    check_shape("seq_lens", seq_lens, (num_seqs,), "(num_seqs,)")
    check_dtype("seq_lens", seq_lens, INTEGER_DTYPES)
    check_same_device(
        "q", q, k_cache=k_cache, v_cache=v_cache, block_tables=block_tables, seq_lens=seq_lens
    )


def check_attention_options(
    k_cache: torch.Tensor,
    sliding_window: int | None,
    soft_cap: float | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Checks of window, cap and fp8 scales."""
    check(
        sliding_window is None or sliding_window > 0,
        f"sliding_window={sliding_window} must be positive; use None for full attention",
    )
    check(
        soft_cap is None or soft_cap > 0,
        f"soft_cap={soft_cap} must be positive; use None for none",
    )
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            check_shape(name, scale, (k_cache.shape[1],), "(num_kv_heads,)")
            check(
                k_cache.dtype in FP8_DTYPES,
                f"{name} is given but the cache is {k_cache.dtype}; scales belong to fp8 caches",
            )


def _lse_dtype(compute: torch.dtype) -> torch.dtype:
    return torch.float64 if compute == torch.float64 else torch.float32


def _launch(
    q, k_cache, v_cache, block_tables, seq_lens, scale, sliding_window, soft_cap, k_scale, v_scale
):
    return paged_decode_attention_reference(
        q, k_cache, v_cache, block_tables, seq_lens, scale=scale, sliding_window=sliding_window,
        soft_cap=soft_cap, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
