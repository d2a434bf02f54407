"""Quest, Squeezed Attention and SnapKV against float64."""

import pytest
import torch

import harness
from tandem_kernels import (
    centroid_weights,
    cluster_keys,
    key_list_attention,
    page_list_attention,
    page_scores,
    paged_decode_attention,
    select_keys,
    select_pages,
    snapkv_votes,
)
from tandem_kernels.quest import page_list_attention_reference, page_scores_reference
from tandem_kernels.snapkv import snapkv_votes_reference
from tandem_kernels.squeezed import centroid_weights_reference, key_list_attention_reference

LENS = (1, 300, 0, 64, 65)


def paged(case):
    """Queries, one row per sequence, and the caches of a case."""
    cache = harness.paged_cache(case.lens, case.kv_heads, case.head_dim, case.dtype)
    q = harness.randn(len(case.lens), case.heads, case.head_dim, dtype=case.dtype)
    return q, cache


def listed_pages(cache, kv_heads, count):
    """Up to `count` pages per sequence and KV head, chosen by random ranks."""
    ranks = harness.randn(len(cache[3]), kv_heads, cache[2].shape[1])
    used = torch.arange(ranks.shape[2], device=ranks.device) * 64 < cache[3][:, None, None]
    return select_pages(ranks.masked_fill(~used, float("-inf")), cache[3], count)


@harness.AWKWARD
def check_page_scores(case):
    q, (_, _, tables, seq_lens) = paged(case)
    head_dim, num_blocks = case.head_dim, int(tables.max()) + 1
    low = harness.randn(num_blocks, case.kv_heads, head_dim)
    high = low + harness.randn(num_blocks, case.kv_heads, head_dim, seed=1).abs()
    low[-1], high[-1] = float("nan"), float("nan")  # the block no sequence uses

    scores = page_scores(q, low, high, tables, seq_lens)

    arguments = (q, low, high, tables, seq_lens)
    exact = page_scores_reference(*map(harness.wide, arguments))
    torchs = page_scores_reference(*(t.cpu() for t in arguments))
    harness.assert_as_exact_as_torch(scores, exact, torchs, floor=1e-6 * head_dim)


@harness.AWKWARD
def check_page_list_attention(case):
    q, cache = paged(case)
    arguments = (q, *cache, listed_pages(cache, case.kv_heads, 3))
    options = {"scale": case.head_dim**-0.5, "soft_cap": 3.0 if case.heads == 4 else None}

    out, lse = page_list_attention(*arguments, return_lse=True, **options)

    exact = page_list_attention_reference(*map(harness.wide, arguments), **options)
    torchs = page_list_attention_reference(
        *(t.cpu() for t in arguments), compute_dtype=case.dtype, **options
    )
    harness.assert_as_exact_as_torch(out, exact[0], torchs[0])
    harness.assert_as_exact_as_torch(lse, exact[1], torchs[1], floor=4e-6, what="lse")


def check_all_pages_listed_is_decode_attention():
    cache = harness.paged_cache(LENS, 2, 64, torch.float32)
    q = harness.randn(len(LENS), 4, 64)
    pages = listed_pages(cache, 2, cache[2].shape[1])

    sparse = page_list_attention(q, *cache, pages, scale=0.1)

    dense = paged_decode_attention(q[:, None], *cache, scale=0.1)[:, 0]
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)


@harness.AWKWARD
def check_centroid_weights(case):
    clusters = 1 + max(case.lens) // 3
    centroids = harness.randn(case.kv_heads, clusters, case.head_dim, dtype=case.dtype)
    sizes = torch.arange(case.kv_heads * clusters, dtype=torch.int32).view(case.kv_heads, -1) % 30
    sizes = sizes.to(harness.DEVICE)
    q = harness.randn(3, case.heads, case.head_dim, dtype=case.dtype)
    scale = case.head_dim**-0.5

    weights = centroid_weights(q, centroids, sizes, scale=scale)

    exact = centroid_weights_reference(
        harness.wide(q), harness.wide(centroids), sizes.cpu(), scale=scale
    )
    torchs = centroid_weights_reference(
        q.cpu(), centroids.cpu(), sizes.cpu(), scale=scale, compute_dtype=case.dtype
    )
    harness.assert_as_exact_as_torch(weights, exact, torchs, floor=1e-6 * exact.max().item())


@harness.AWKWARD
def check_key_list_attention(case):
    q, cache = paged(case)
    # Every third position up to 90 of them, and every one of a short context.
    step = torch.where(cache[3] > 90, 3, 1)
    counts = torch.minimum((cache[3] + step - 1) // step, torch.tensor(90)).to(torch.int32)
    keys = (torch.arange(90, device=q.device) * step[:, None]).to(torch.int32)
    keys = keys[:, None].expand(-1, case.kv_heads, -1)
    counts = counts[:, None].expand(-1, case.kv_heads).contiguous()

    compare_listed_keys(q, cache, keys, counts, case.head_dim**-0.5)


def compare_listed_keys(q, cache, keys, counts, scale):
    out, lse = key_list_attention(q, *cache, keys, counts, scale=scale, return_lse=True)

    arguments = (q, *cache[:3], keys, counts)
    exact = key_list_attention_reference(*map(harness.wide, arguments), scale=scale)
    torchs = key_list_attention_reference(
        *(t.cpu() for t in arguments), scale=scale, compute_dtype=q.dtype
    )
    harness.assert_as_exact_as_torch(out, exact[0], torchs[0])
    harness.assert_as_exact_as_torch(lse, exact[1], torchs[1], floor=4e-6, what="lse")


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
def check_squeezed_attention_over_a_fixed_context(dtype):
    context, lens = 150, (200, 150, 171)
    cache = harness.paged_cache(lens, 2, 64, dtype)
    keys = harness.randn(2, context, 64)
    centroids, sizes, cluster_of_key = cluster_keys(keys, 10)
    q = harness.randn(3, 4, 64, dtype=dtype)
    weights = centroid_weights(q, centroids.to(dtype), sizes, scale=0.125)
    chosen = select_keys(weights, cluster_of_key, cache[3], 128, threshold=1 / context)

    compare_listed_keys(q, cache, *chosen, 0.125)


@harness.AWKWARD
def check_snapkv_votes(case):
    """A window of 17 rows, so that contexts of 0 and 1 are shorter than it."""
    case = case.lighter()
    _, (k_cache, _, tables, seq_lens) = paged(case)
    q = harness.randn(len(case.lens), 17, case.heads, case.head_dim, dtype=case.dtype)
    arguments = (q, k_cache, tables, seq_lens)
    scale = case.head_dim**-0.5

    votes = snapkv_votes(*arguments, scale=scale)

    exact = snapkv_votes_reference(*map(harness.wide, arguments), scale=scale)
    torchs = snapkv_votes_reference(
        *(t.cpu() for t in arguments), scale=scale, compute_dtype=case.dtype
    )
    harness.assert_as_exact_as_torch(votes, exact, torchs, floor=1e-5)
