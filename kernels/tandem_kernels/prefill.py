# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Attention of a ragged batch of prompt chunks over the paged KV cache.

The formula is that of paged_decode. Sequence s owns query rows query_start_loc[s] ..
query_start_loc[s + 1] - 1, the last of which sits at position seq_lens[s] - 1; earlier keys are
its cached prefix. The keys of the chunk itself are already in the cache.
Shapes: q and out `(num_tokens, num_heads, head_dim)`; query_start_loc `(num_seqs + 1,)` int32,
rising; seq_lens `(num_seqs,)` int32 (context including the chunk); block_tables `(num_seqs,
max_blocks)` int32; caches `(num_blocks, num_kv_heads, 64, head_dim)`.
Work: 4 * head_dim * num_heads flops per visible (query, key) pair; bytes are q, out, and the
context once per tile of query rows. Scores and output are accumulated in float32, probabilities
are rounded to q's dtype for the second product.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from .checks import BLOCK_SIZE, check_dtype, check_shape, compute_dtype_of
from .dispatch import runs_on_triton
from .paged_decode import INTEGER_DTYPES, check_attention, check_attention_options, gather_blocks

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
    mask = None if causal or rows == 1 and window is None else _mask(
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


def _launch(
    q, k_cache, v_cache, block_tables, query_start_loc, seq_lens, scale, sliding_window, soft_cap,
    k_scale, v_scale,
):  # fmt: skip
    return prefill_attention_reference(
        q, k_cache, v_cache, block_tables, query_start_loc, seq_lens, scale=scale,
        sliding_window=sliding_window, soft_cap=soft_cap, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
