# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Page scoring and attention over a page list (Quest, Tang et al. 2024, sections 3.2 and 3.3).

    score[s, h, page] = max over query heads of h of  sum_d max(q_d * key_min_d, q_d * key_max_d)

is an upper bound of q . k over the page's keys. The pages with the highest scores are attended
to, always with the last one; a page is a KV block of 64 tokens.
Shapes: q `(num_seqs, num_heads, head_dim)`; key_min and key_max `(num_blocks, num_kv_heads,
head_dim)` float32; scores `(num_seqs, num_kv_heads, max_blocks)` float32, -inf past the end;
page_list `(num_seqs, num_kv_heads, num_pages)` int32 of indices into the sequence's block table,
in any order, negative entries unused.
Bytes moved: scoring reads 2 * head_dim * 4 bytes per page and KV head, 1/16 of a bf16 page's keys
and values; attention reads num_pages pages instead of the context. Sums are in float32.
"""

from __future__ import annotations

import torch

from .checks import (
    BLOCK_SIZE,
    FLOAT_DTYPES,
    check,
    check_dtype,
    check_heads,
    check_same_device,
    check_shape,
    compute_dtype_of,
)
from .dispatch import runs_on_triton
from .paged_decode import INTEGER_DTYPES, check_attention, check_attention_options


def reset_page_bounds(
    key_min: torch.Tensor, key_max: torch.Tensor, block_ids: torch.Tensor
) -> None:
    """Empty the bounds of newly allocated blocks (+inf and -inf), as qk_norm_rope_write expects."""
    check_shape("key_max", key_max, tuple(key_min.shape), "the shape of key_min")
    key_min.index_fill_(0, block_ids.long(), float("inf"))
    key_max.index_fill_(0, block_ids.long(), float("-inf"))


def page_scores(
    q: torch.Tensor,
    key_min: torch.Tensor,
    key_max: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
) -> torch.Tensor:
    """Upper bounds of attention scores per page `(num_seqs, num_kv_heads, max_blocks)` float32."""
    check_shape("q", q, (None, None, None), "(num_seqs, num_heads, head_dim)")
    check_dtype("q", q, FLOAT_DTYPES)
    check_shape("key_min", key_min, (None, None, q.shape[2]), "(num_blocks, num_kv_heads, head_dim)")
    check_shape("key_max", key_max, tuple(key_min.shape), "the shape of key_min")
    check_dtype("key_min", key_min, (torch.float32, torch.float64))
    check_heads(q.shape[1], key_min.shape[1])
    check_shape("block_tables", block_tables, (q.shape[0], None), "(num_seqs, max_blocks)")
    check_dtype("block_tables", block_tables, INTEGER_DTYPES)
    check_shape("seq_lens", seq_lens, (q.shape[0],), "(num_seqs,)")
    check_same_device(
        "q", q, key_min=key_min, key_max=key_max, block_tables=block_tables, seq_lens=seq_lens
    )
    if runs_on_triton(q):
        return _launch_scores(q, key_min, key_max, block_tables, seq_lens)
    return page_scores_reference(q, key_min, key_max, block_tables, seq_lens)


def page_scores_reference(
    q: torch.Tensor,
    key_min: torch.Tensor,
    key_max: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The formula in torch over padded block tables."""
    compute = compute_dtype or compute_dtype_of(q, key_min)
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads = key_min.shape[1]
    used, blocks = _used_blocks(block_tables, seq_lens)
    low, high = (bound[blocks].to(compute).transpose(1, 2) for bound in (key_min, key_max))
    query = q.to(compute).view(num_seqs, num_kv_heads, -1, 1, head_dim)
    bounds = torch.maximum(query * low[:, :, None], query * high[:, :, None]).sum(-1).amax(2)
    bounds = bounds.masked_fill(~used[:, None, :], float("-inf"))
    return bounds.to(torch.float64 if compute == torch.float64 else torch.float32)


def select_pages(scores: torch.Tensor, seq_lens: torch.Tensor, num_pages: int) -> torch.Tensor:
    """The best `num_pages` pages per KV head as a page_list, the sequence's last page among them.

    Torch on every device (topk is a library call and capturable); unused entries are -1.
    """
    check(num_pages > 0, f"num_pages={num_pages} must be positive")
    last = ((seq_lens.long() + BLOCK_SIZE - 1) // BLOCK_SIZE - 1).clamp(min=0)
    index = last[:, None, None].expand(-1, scores.shape[1], 1)
    boosted = scores.scatter(2, index, float("inf"))
    values, pages = torch.topk(boosted, min(num_pages, scores.shape[2]), dim=-1)
    usable = (values > float("-inf")) & (seq_lens > 0)[:, None, None]
    return torch.where(usable, pages, -1).to(torch.int32)


def page_list_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    page_list: torch.Tensor,
    *,
    scale: float,
    soft_cap: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query row per sequence over its listed pages `(num_seqs, heads, head_dim)`.

    With `return_lse` also the log-sum-exp `(num_seqs, num_heads)`. Raises KernelArgumentError.
    """
    check_shape("q", q, (None, None, None), "(num_seqs, num_heads, head_dim)")
    check_attention(q, k_cache, v_cache, block_tables, seq_lens, q.shape[0])
    check_attention_options(k_cache, None, soft_cap, None, None)
    wanted = (q.shape[0], k_cache.shape[1], None)
    check_shape("page_list", page_list, wanted, "(num_seqs, num_kv_heads, num_pages)")
    check_dtype("page_list", page_list, (torch.int32,))
    check_same_device("q", q, page_list=page_list)
    arguments = (q, k_cache, v_cache, block_tables, seq_lens, page_list)
    if runs_on_triton(q):
        out, lse = _launch_attention(*arguments, scale, soft_cap)
    else:
        out, lse = page_list_attention_reference(*arguments, scale=scale, soft_cap=soft_cap)
    return (out, lse) if return_lse else out


def page_list_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    page_list: torch.Tensor,
    *,
    scale: float,
    soft_cap: float | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather each KV head's pages, mask what lies past the end, and attend."""
    compute = compute_dtype or compute_dtype_of(q, k_cache)
    num_kv_heads = k_cache.shape[1]
    pages = page_list.long()
    position = pages[..., None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)
    visible = (pages[..., None] >= 0) & (position < seq_lens.long()[:, None, None, None])
    blocks = block_tables.long().gather(1, pages.clamp(min=0).flatten(1)).view(pages.shape)
    blocks = torch.where(visible.any(-1), blocks, 0)
    head = torch.arange(num_kv_heads)[None, :, None]
    keys = k_cache[blocks, head].to(compute).flatten(2, 3)
    values = v_cache[blocks, head].to(compute).flatten(2, 3)
    return attend_listed(q, keys, values, visible.flatten(2), scale, soft_cap, compute)


def attend_listed(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    soft_cap: float | None,
    compute: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention over gathered keys `(num_seqs, num_kv_heads, n, head_dim)` with a mask."""
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    query = q.to(compute).view(num_seqs, num_kv_heads, -1, head_dim)
    keys = keys.masked_fill(~visible[..., None], 0)
    values = values.masked_fill(~visible[..., None], 0)
    scores = torch.matmul(query * scale, keys.transpose(-1, -2))
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~visible[:, :, None, :], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    base = torch.where(lse == float("-inf"), 0, lse)
    out = torch.matmul(torch.exp(scores - base[..., None]), values)
    lse_dtype = torch.float64 if compute == torch.float64 else torch.float32
    return out.view(q.shape).to(q.dtype), lse.view(num_seqs, num_heads).to(lse_dtype)


def _used_blocks(
    block_tables: torch.Tensor, seq_lens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which table entries hold tokens, and the table with the rest replaced by block 0."""
    count = (seq_lens.long() + BLOCK_SIZE - 1) // BLOCK_SIZE
    used = torch.arange(block_tables.shape[1]) < count[:, None]
    return used, torch.where(used, block_tables, 0).long()


def _launch_scores(q, key_min, key_max, block_tables, seq_lens):
    return page_scores_reference(q, key_min, key_max, block_tables, seq_lens)


def _launch_attention(q, k_cache, v_cache, block_tables, seq_lens, page_list, scale, soft_cap):
    return page_list_attention_reference(
        q, k_cache, v_cache, block_tables, seq_lens, page_list, scale=scale, soft_cap=soft_cap
    )
