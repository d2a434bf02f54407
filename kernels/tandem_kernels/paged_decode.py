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
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula over the flat list of blocks in use, so a ragged batch costs no padding.

    This is the CPU engine's decode path: one gather of the blocks, two batched matrix products
    and a segmented softmax. `compute_dtype` overrides the accumulation dtype (tests).
    """
    num_seqs, num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    group = num_heads // num_kv_heads
    compute = compute_dtype or compute_dtype_of(q, k_cache)
    lens = seq_lens.long()
    first = torch.zeros_like(lens)
    if sliding_window is not None:
        first = (lens - num_rows - sliding_window + 1).clamp(min=0) // BLOCK_SIZE
    counts = ((lens + BLOCK_SIZE - 1) // BLOCK_SIZE - first).clamp(min=0)
    seq = torch.repeat_interleave(torch.arange(num_seqs), counts)
    index = torch.arange(seq.numel()) - (counts.cumsum(0) - counts - first)[seq]
    blocks = block_tables[seq, index].long()

    query = q.reshape(num_seqs, num_rows, num_kv_heads, group, head_dim).to(compute)
    query = query.transpose(1, 2).reshape(num_seqs, num_kv_heads, num_rows * group, head_dim)
    keys = gather_blocks(k_cache, blocks, compute, k_scale)
    values = gather_blocks(v_cache, blocks, compute, v_scale)
    scores = torch.matmul((query * scale)[seq], keys.transpose(-1, -2))
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)

    key_position = index[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)
    beyond = key_position >= lens[seq][:, None]
    values = values.masked_fill_(beyond[:, None, :, None], 0)  # stale slots may hold NaN
    row_position = lens[seq][:, None] - num_rows + torch.arange(num_rows)
    hidden = key_position[:, None, :] > row_position[:, :, None]
    if sliding_window is not None:
        hidden |= key_position[:, None, :] <= row_position[:, :, None] - sliding_window
    hidden = hidden.repeat_interleave(group, dim=1)[:, None]
    scores = scores.masked_fill_(hidden, float("-inf"))

    shape = (num_seqs, num_kv_heads, num_rows * group)
    highest = torch.full(shape, float("-inf"), dtype=compute)
    highest.scatter_reduce_(0, seq[:, None, None].expand(-1, *shape[1:]), scores.amax(-1), "amax")
    base = torch.where(highest == float("-inf"), 0, highest)
    weights = torch.exp(scores - base[seq].unsqueeze(-1))
    total = torch.zeros(shape, dtype=compute).index_add_(0, seq, weights.sum(-1))
    out = torch.zeros((*shape, head_dim), dtype=compute)
    out.index_add_(0, seq, torch.matmul(weights, values))
    out = torch.where(total.unsqueeze(-1) > 0, out / total.unsqueeze(-1), 0)
    lse = base + torch.log(total)

    out = out.view(num_seqs, num_kv_heads, num_rows, group, head_dim).transpose(1, 2)
    lse = lse.view(num_seqs, num_kv_heads, num_rows, group).transpose(1, 2)
    return out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:3]).to(_lse_dtype(compute))


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
