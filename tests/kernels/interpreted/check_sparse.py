"""Quest, Squeezed Attention and SnapKV against float64."""

import harness
import pytest
import torch

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
SHAPES = [(4, 2, 64), (2, 1, 80), (14, 2, 32)]


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def check_page_scores(heads, kv_heads, head_dim, dtype):
    _, _, tables, seq_lens = harness.paged_cache(LENS, kv_heads, head_dim, dtype)
    num_blocks = int(tables.max()) + 1
    low = harness.randn(num_blocks, kv_heads, head_dim)
    high = low + harness.randn(num_blocks, kv_heads, head_dim, seed=1).abs()
    q = harness.randn(len(LENS), heads, head_dim, dtype=dtype)

    scores = page_scores(q, low, high, tables, seq_lens)

    arguments = (q, low, high, tables, seq_lens)
    exact = page_scores_reference(*map(harness.wide, arguments))
    torchs = page_scores_reference(*(t.cpu() for t in arguments))
    harness.assert_as_exact_as_torch(scores, exact, torchs, floor=1e-6 * head_dim)


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def check_page_list_attention(heads, kv_heads, head_dim, dtype):
    cache = harness.paged_cache(LENS, kv_heads, head_dim, dtype)
    q = harness.randn(len(LENS), heads, head_dim, dtype=dtype)
    ranks = harness.randn(len(LENS), kv_heads, cache[2].shape[1])
    used = torch.arange(ranks.shape[2], device=ranks.device) * 64 < cache[3][:, None, None]
    pages = select_pages(ranks.masked_fill(~used, float("-inf")), cache[3], 3)
    arguments = (q, *cache, pages)
    options = {"scale": head_dim**-0.5, "soft_cap": 3.0 if heads == 4 else None}

    out, lse = page_list_attention(*arguments, return_lse=True, **options)

    exact = page_list_attention_reference(*map(harness.wide, arguments), **options)
    torchs = page_list_attention_reference(
        *(t.cpu() for t in arguments), compute_dtype=dtype, **options
    )
    harness.assert_as_exact_as_torch(out, exact[0], torchs[0])
    harness.assert_as_exact_as_torch(lse, exact[1], torchs[1], floor=4e-6, what="lse")


def check_all_pages_listed_is_decode_attention():
    cache = harness.paged_cache(LENS, 2, 64, torch.float32)
    q = harness.randn(len(LENS), 4, 64)
    scores = torch.zeros(len(LENS), 2, cache[2].shape[1], device=harness.DEVICE)
    used = torch.arange(scores.shape[2], device=scores.device) * 64 < cache[3][:, None, None]
    pages = select_pages(scores.masked_fill(~used, float("-inf")), cache[3], scores.shape[2])

    sparse = page_list_attention(q, *cache, pages, scale=0.1)

    dense = paged_decode_attention(q[:, None], *cache, scale=0.1)[:, 0]
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def check_centroid_weights(heads, kv_heads, head_dim, dtype):
    centroids = harness.randn(kv_heads, 100, head_dim, dtype=dtype)
    sizes = torch.randint(0, 30, (kv_heads, 100), dtype=torch.int32, device=harness.DEVICE)
    q = harness.randn(3, heads, head_dim, dtype=dtype)

    weights = centroid_weights(q, centroids, sizes, scale=head_dim**-0.5)

    exact = centroid_weights_reference(
        harness.wide(q), harness.wide(centroids), sizes.cpu(), scale=head_dim**-0.5
    )
    torchs = centroid_weights_reference(
        q.cpu(), centroids.cpu(), sizes.cpu(), scale=head_dim**-0.5, compute_dtype=dtype
    )
    harness.assert_as_exact_as_torch(weights, exact, torchs, floor=1e-6 * exact.max().item())


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
def check_squeezed_attention_over_a_fixed_context(dtype):
    context, lens = 150, (200, 150, 171)
    cache = harness.paged_cache(lens, 2, 64, dtype)
    keys = harness.randn(2, context, 64)
    centroids, sizes, cluster_of_key = cluster_keys(keys, 10)
    q = harness.randn(3, 4, 64, dtype=dtype)
    weights = centroid_weights(q, centroids.to(dtype), sizes, scale=0.125)
    chosen = select_keys(weights, cluster_of_key, cache[3], 128, threshold=1 / context)
    arguments = (q, *cache[:3], *chosen)

    out, lse = key_list_attention(q, *cache, *chosen, scale=0.125, return_lse=True)

    exact = key_list_attention_reference(*map(harness.wide, arguments), scale=0.125)
    torchs = key_list_attention_reference(
        *(t.cpu() for t in arguments), scale=0.125, compute_dtype=dtype
    )
    harness.assert_as_exact_as_torch(out, exact[0], torchs[0])
    harness.assert_as_exact_as_torch(lse, exact[1], torchs[1], floor=4e-6, what="lse")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [
        (4, 2, 64, torch.float32),
        (2, 1, 80, torch.float16),
        (14, 2, 32, torch.bfloat16),
    ],
)
def check_snapkv_votes(heads, kv_heads, head_dim, dtype):
    lens = (130, 33, 20) if heads == 14 else (300, 33, 64, 20)
    k_cache, _, tables, seq_lens = harness.paged_cache(lens, kv_heads, head_dim, dtype)
    q = harness.randn(len(lens), 20, heads, head_dim, dtype=dtype)
    arguments = (q, k_cache, tables, seq_lens)

    votes = snapkv_votes(*arguments, scale=head_dim**-0.5)

    exact = snapkv_votes_reference(*map(harness.wide, arguments), scale=head_dim**-0.5)
    torchs = snapkv_votes_reference(
        *(t.cpu() for t in arguments), scale=head_dim**-0.5, compute_dtype=dtype
    )
    harness.assert_as_exact_as_torch(votes, exact, torchs, floor=1e-5)
