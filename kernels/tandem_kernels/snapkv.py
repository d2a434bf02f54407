# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return"
"""SnapKV scoring: which prompt keys the last queries look at (Li et al. 2024, section 4).

    votes[s, h, j] = sum over window rows r and query heads of h of softmax_j(scale * q[r] . k[j])

The softmax runs over every key visible to row r; votes count for the keys before the window.
Pooling the votes over neighbours (pool_votes) keeps clusters of keys together.
Shapes: q `(num_seqs, window, num_heads, head_dim)`, the last `window` prompt rows; votes
`(num_seqs, num_kv_heads, max_blocks * 64)` float32, 0 in and after the window.
Bytes moved: the keys twice (log-sum-exp, then votes). Sums are in float32.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from .attention_inputs import check_attention
from .checks import BLOCK_SIZE, check, check_last_contiguous, check_shape, compute_dtype_of
from .dispatch import runs_on_triton, tl, triton
from .online_softmax import dot_precision, padded, score_scale, widen
from .prefill import _launch as launch_prefill
from .quest import _used_blocks


def snapkv_votes(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
) -> torch.Tensor:
    """Attention mass each prefix key gets from the window's queries; see the module."""
    check_shape("q", q, (None, None, None, None), "(num_seqs, window, num_heads, head_dim)")
    check_attention(q, k_cache, k_cache, block_tables, seq_lens, q.shape[0])
    if runs_on_triton(q):
        return _launch(q, k_cache, block_tables, seq_lens, scale)
    return snapkv_votes_reference(q, k_cache, block_tables, seq_lens, scale=scale)


def snapkv_votes_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The formula in torch over padded block tables."""
    compute = compute_dtype or compute_dtype_of(q, k_cache)
    num_seqs, window, _, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    _, blocks = _used_blocks(block_tables, seq_lens)
    keys = k_cache[blocks].to(compute).transpose(1, 2).flatten(2, 3)
    position = torch.arange(keys.shape[2])
    lens = seq_lens.long()[:, None]
    keys = keys.masked_fill((position >= lens)[:, None, :, None], 0)
    query = q.to(compute).view(num_seqs, window, num_kv_heads, -1, head_dim)
    scores = torch.einsum("swhgd,shtd->shgwt", query * scale, keys)
    row = lens - window + torch.arange(window)
    visible = position[None, None, :] <= row[:, :, None]
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    total = torch.logsumexp(scores, dim=-1, keepdim=True)
    weights = torch.exp(scores - torch.where(total == float("-inf"), 0, total))
    votes = weights.sum(dim=(2, 3)).masked_fill((position >= lens - window)[:, None], 0)
    return votes.to(torch.float64 if compute == torch.float64 else torch.float32)


def pool_votes(votes: torch.Tensor, kernel_size: int = 7) -> torch.Tensor:
    """Maximum over a centred neighbourhood of `kernel_size` (odd) keys; torch on every device."""
    check(
        kernel_size > 0 and kernel_size % 2 == 1,
        f"kernel_size={kernel_size} must be odd and positive",
    )
    return functional.max_pool1d(votes, kernel_size, stride=1, padding=kernel_size // 2)


# Warps of the vote. Untuned.
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["stride_table"])
def _votes_kernel(
    q_ptr, k_ptr, table_ptr, seq_lens_ptr, lse_ptr, out_ptr, scale,
    stride_qs, stride_qr, stride_qh, stride_kb, stride_kh, stride_kt, stride_table,
    WINDOW: tl.constexpr, NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Votes for the 64 keys of one block: the window's probabilities over rows and heads."""
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    tile = tl.program_id(2)
    length = tl.load(seq_lens_ptr + seq).to(tl.int32)
    position = tile * 64 + tl.arange(0, 64)
    counted = position < length - WINDOW
    block = tl.load(
        table_ptr + seq * stride_table + tile, mask=tile * 64 < length - WINDOW, other=0
    ).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    row_mask = (row < WINDOW) & (length - WINDOW + row >= 0)
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < HEAD_DIM
    k = tl.load(
        k_ptr
        + block * stride_kb
        + kv_head.to(tl.int64) * stride_kh
        + (tl.arange(0, 64) * stride_kt)[None, :]
        + dims[:, None],
        mask=dim_mask[:, None] & counted[None, :],
        other=0.0,
    )
    votes = tl.zeros((64,), tl.float32)
    for g in range(GROUP):
        head = kv_head * GROUP + g
        q = tl.load(
            q_ptr + seq * stride_qs + (row * stride_qr)[:, None] + head * stride_qh + dims[None, :],
            mask=row_mask[:, None] & dim_mask[None, :],
            other=0.0,
        )
        lse = tl.load(
            lse_ptr + (seq * WINDOW + row) * NUM_HEADS + head, mask=row_mask, other=float("inf")
        )
        scores = tl.dot(q, widen(k, q.dtype), input_precision=PRECISION) * scale
        votes += tl.sum(tl.exp2(scores - lse[:, None]), 0)
    votes = tl.where(counted, votes, 0.0)
    num_kv_heads: tl.constexpr = NUM_HEADS // GROUP
    out = out_ptr + (seq * num_kv_heads + kv_head) * tl.num_programs(2) * 64 + position
    tl.store(out, votes)


def _launch(q, k_cache, block_tables, seq_lens, scale):
    check_last_contiguous("q", q)
    num_seqs, window, num_heads, head_dim = q.shape
    num_kv_heads, max_blocks = k_cache.shape[1], block_tables.shape[1]
    shape = (num_seqs, num_kv_heads, max_blocks * BLOCK_SIZE)
    out = torch.empty(shape, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out
    # The prefill kernel yields each row's log-sum-exp; its values are the keys, and unused.
    lse = torch.empty((num_seqs * window, num_heads), dtype=torch.float32, device=q.device)
    starts = torch.arange(0, num_seqs * window + 1, window, dtype=torch.int32, device=q.device)
    rows = q.reshape(num_seqs * window, num_heads, head_dim)
    launch_prefill(
        rows, k_cache, k_cache, block_tables, starts, seq_lens, scale, None, None, None, None, lse
    )
    _votes_kernel[(num_seqs, num_kv_heads, max_blocks)](
        q, k_cache, block_tables, seq_lens, lse, out, score_scale(scale, None),
        *q.stride()[:3], *k_cache.stride()[:3], block_tables.stride(0),
        WINDOW=window, NUM_HEADS=num_heads, GROUP=num_heads // num_kv_heads, HEAD_DIM=head_dim,
        BLOCK_M=padded(window), BLOCK_D=padded(head_dim), PRECISION=dot_precision(q.dtype),
        num_warps=_NUM_WARPS,
    )  # fmt: skip
    return out
