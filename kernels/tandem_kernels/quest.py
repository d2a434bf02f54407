# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return"
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

from .attention_inputs import INTEGER_DTYPES, check_attention, check_attention_options
from .checks import (
    BLOCK_SIZE,
    FLOAT_DTYPES,
    check,
    check_dtype,
    check_heads,
    check_last_contiguous,
    check_same_device,
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
    wanted = (None, None, q.shape[2])
    check_shape("key_min", key_min, wanted, "(num_blocks, num_kv_heads, head_dim)")
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
    num_seqs, _, head_dim = q.shape
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


# Pages per scoring program, programs per processor of the attention's splits, warps and tiles in
# flight. Untuned.
_PAGES = 32
_PROGRAMS = 2
_NUM_WARPS = 4
# Tiles in flight: pages leave one tile on its way while one is worked on; gathered keys wait for
# their look-ups anyway.
_NUM_STAGES = {"sm_80": (2, 2), "sm_90": (3, 2), "sm_100": (3, 2)}


@triton.jit(do_not_specialize=["max_blocks", "stride_table"])
def _scores_kernel(
    q_ptr, key_min_ptr, key_max_ptr, table_ptr, seq_lens_ptr, out_ptr, max_blocks,
    stride_qs, stride_qh, stride_table,
    GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    page = tl.program_id(2) * PAGES + tl.arange(0, PAGES)
    used = page * 64 < tl.load(seq_lens_ptr + seq)
    block = tl.load(table_ptr + seq * stride_table + page, mask=used, other=0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < HEAD_DIM
    bounds = ((block * NUM_KV_HEADS + kv_head) * HEAD_DIM)[:, None] + dims[None, :]
    mask = used[:, None] & dim_mask[None, :]
    low = tl.load(key_min_ptr + bounds, mask=mask, other=0.0)
    high = tl.load(key_max_ptr + bounds, mask=mask, other=0.0)
    best = tl.full((PAGES,), float("-inf"), tl.float32)
    for g in range(GROUP):
        head = kv_head * GROUP + g
        q = tl.load(q_ptr + seq * stride_qs + head * stride_qh + dims, mask=dim_mask, other=0.0)
        q = q.to(tl.float32)[None, :]
        best = tl.maximum(best, tl.sum(tl.maximum(q * low, q * high), 1))
    best = tl.where(used, best, float("-inf"))
    out = out_ptr + (seq * NUM_KV_HEADS + kv_head) * max_blocks + page
    tl.store(out, best, mask=page < max_blocks)


@triton.jit
def _look_up(listed, table, tile, last, length):
    """(page, block id) of entry `tile` of a page list; page -1 where the entry is unused."""
    page = tl.load(listed + tile, mask=tile < last, other=-1)
    page = tl.where(page * 64 < length, page, -1)
    return page, tl.load(table + page, mask=page >= 0, other=0).to(tl.int64)


@triton.jit(
    do_not_specialize=[
        "list_size", "tiles_per_split", "stride_table", "stride_list_seq", "stride_list_head",
    ]
)  # fmt: skip
def _list_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, seq_lens_ptr, list_ptr, count_ptr,
    partial_out_ptr, partial_lse_ptr, list_size, tiles_per_split, scale, cap,
    stride_qs, stride_qh, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_table, stride_list_seq, stride_list_head,
    GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HAS_CAP: tl.constexpr, PAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of one (sequence, KV head): 64 listed keys at a time.

    PAGES: the list names pages, each tile is one; otherwise token positions, a tile is 64 of them
    gathered row by row, and count_ptr holds how many are listed.
    """
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    m = tl.arange(0, BLOCK_M)
    m_mask = m < GROUP
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < HEAD_DIM
    lanes = tl.arange(0, 64)
    q = tl.load(
        q_ptr + seq * stride_qs + ((kv_head * GROUP + m) * stride_qh)[:, None] + dims[None, :],
        mask=m_mask[:, None] & dim_mask[None, :],
        other=0.0,
    )
    listed = list_ptr + seq * stride_list_seq + kv_head * stride_list_head
    table = table_ptr + seq * stride_table
    if PAGES:
        length = tl.load(seq_lens_ptr + seq).to(tl.int32)
        num_tiles = list_size
    else:
        length = tl.load(count_ptr + seq * NUM_KV_HEADS + kv_head)
        num_tiles = (length + 63) // 64
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, num_tiles)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_vh
    # Page and block id are looked up one tile ahead, as in paged_decode.
    page = first * 0 - 1
    page_block = page.to(tl.int64)
    if PAGES:
        page, page_block = _look_up(listed, table, first, last, length)
    for tile in range(first, last):
        if PAGES:
            position = tl.where(page >= 0, page * 64 + lanes, length)
            visible = position < length
            block = page_block + lanes * 0
            offset = lanes
            page, page_block = _look_up(listed, table, tile + 1, last, length)
        else:
            visible = tile * 64 + lanes < length
            position = tl.load(listed + tile * 64 + lanes, mask=visible, other=0)
            block = tl.load(table + position // 64, mask=visible, other=0).to(tl.int64)
            offset = position % 64
        k = tl.load(
            k_ptr + (block * stride_kb + offset * stride_kt)[None, :] + dims[:, None],
            mask=dim_mask[:, None] & visible[None, :],
            other=0.0,
        )
        v = tl.load(
            v_ptr + (block * stride_vb + offset * stride_vt)[:, None] + dims[None, :],
            mask=visible[:, None] & dim_mask[None, :],
            other=0.0,
        )
        scores = tl.dot(q, widen(k, q.dtype), input_precision=PRECISION) * scale
        scores = cap_scores(scores, cap, HAS_CAP)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        highest, total, acc = accumulate(scores, widen(v, q.dtype), highest, total, acc, PRECISION)
    acc, lse = finish(highest, total, acc)
    row = ((seq * tl.num_programs(2) + split) * NUM_KV_HEADS + kv_head) * GROUP + m
    mask = m_mask[:, None] & dim_mask[None, :]
    tl.store(partial_out_ptr + row[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
    tl.store(partial_lse_ptr + row, lse, mask=m_mask)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, splits,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < HEAD_DIM
    out, lse = combine_splits(
        partial_out_ptr, partial_lse_ptr, seq * splits, splits, head, NUM_HEADS * HEAD_DIM,
        NUM_HEADS, dims, dim_mask, HEAD_DIM, SPLITS, BLOCK_D,
    )  # fmt: skip
    row = seq.to(tl.int64) * NUM_HEADS + head
    tl.store(out_ptr + row * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=dim_mask)
    tl.store(lse_ptr + row, lse * 0.6931471805599453)


def _launch_scores(q, key_min, key_max, block_tables, seq_lens):
    check_last_contiguous("q", q)
    for name, bound in (("key_min", key_min), ("key_max", key_max)):
        check(bound.is_contiguous(), f"{name} must be contiguous")
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads, max_blocks = key_min.shape[1], block_tables.shape[1]
    shape = (num_seqs, num_kv_heads, max_blocks)
    out = torch.empty(shape, dtype=torch.float32, device=q.device)
    if out.numel():
        _scores_kernel[(num_seqs, num_kv_heads, -(-max_blocks // _PAGES))](
            q, key_min, key_max, block_tables, seq_lens, out, max_blocks,
            *q.stride()[:2], block_tables.stride(0),
            GROUP=num_heads // num_kv_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
            BLOCK_D=padded(head_dim), PAGES=_PAGES, num_warps=_NUM_WARPS,
        )  # fmt: skip
    return out


def launch_listed(
    q, k_cache, v_cache, block_tables, seq_lens, listed, counts, scale, soft_cap, list_tiles
):
    """Attention over pages (counts None) or token positions; also used by squeezed."""
    check_last_contiguous("q", q)
    check_last_contiguous("list", listed)
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((num_seqs, num_heads), dtype=torch.float32, device=q.device)
    if num_seqs == 0:
        return out, lse
    wanted = max(1, num_processors(q) * _PROGRAMS // (num_seqs * num_kv_heads))
    per_split = max(1, -(-list_tiles // wanted))
    splits = max(1, -(-list_tiles // per_split))
    shape = (num_seqs, splits, num_heads)
    partial_out = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    group = num_heads // num_kv_heads
    stages = _NUM_STAGES.get(architecture(q), (2, 2))[counts is not None]
    _list_kernel[(num_seqs, num_kv_heads, splits)](
        q, k_cache, v_cache, block_tables, seq_lens, listed, counts, partial_out, partial_lse,
        list_tiles, per_split, score_scale(scale, soft_cap), cap_scale(soft_cap),
        *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], block_tables.stride(0),
        *listed.stride()[:2],
        GROUP=group, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_M=padded(group),
        BLOCK_D=padded(head_dim), HAS_CAP=soft_cap is not None, PAGES=counts is None,
        PRECISION=dot_precision(q.dtype), num_warps=_NUM_WARPS, num_stages=stages,
    )  # fmt: skip
    _merge_kernel[(num_seqs, num_heads)](
        out, lse, partial_out, partial_lse, splits, NUM_HEADS=num_heads, HEAD_DIM=head_dim,
        BLOCK_D=padded(head_dim), SPLITS=16, num_warps=4,
    )  # fmt: skip
    return out, lse


def _launch_attention(q, k_cache, v_cache, block_tables, seq_lens, page_list, scale, soft_cap):
    return launch_listed(
        q, k_cache, v_cache, block_tables, seq_lens, page_list, None, scale, soft_cap,
        page_list.shape[2],
    )  # fmt: skip
