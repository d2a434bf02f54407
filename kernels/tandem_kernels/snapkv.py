# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
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

from .checks import BLOCK_SIZE, check, check_shape, compute_dtype_of
from .dispatch import runs_on_triton
from .paged_decode import check_attention
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
    num_seqs, window, num_heads, head_dim = q.shape
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


def _launch(q, k_cache, block_tables, seq_lens, scale):
    return snapkv_votes_reference(q, k_cache, block_tables, seq_lens, scale=scale)
