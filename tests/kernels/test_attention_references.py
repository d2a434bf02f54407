"""The attention references against the formula written as plainly as it can be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_kernels import (
    KernelArgumentError,
    cluster_keys,
    key_list_attention,
    page_list_attention,
    page_scores,
    paged_decode_attention,
    pool_votes,
    prefill_attention,
    qk_norm_rope_write,
    reset_page_bounds,
    rope_table,
    select_keys,
    select_pages,
    snapkv_votes,
)


def paged(lens, kv_heads, head_dim, dtype=torch.float64, seed=0):
    """Caches with `lens` tokens in shuffled blocks; unused slots and blocks are NaN."""
    generator = torch.Generator().manual_seed(seed)
    counts = [(length + 63) // 64 for length in lens]
    num_blocks = sum(counts) + 1
    order = torch.randperm(num_blocks - 1, generator=generator).tolist()
    tables = torch.full((len(lens), max([1, *counts])), num_blocks - 1, dtype=torch.int32)
    shape = (num_blocks, kv_heads, 64, head_dim)
    caches = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]
    for s, (length, count) in enumerate(zip(lens, counts, strict=True)):
        for index in range(count):
            tables[s, index] = block = order.pop()
            rows = min(64, length - 64 * index)
            for cache in caches:
                values = torch.randn(
                    kv_heads, rows, head_dim, generator=generator, dtype=torch.float64
                )
                cache[block, :, :rows] = values.to(dtype)
    return *caches, tables, torch.tensor(lens, dtype=torch.int32)


def keys_of(cache, tables, s, length):
    """`(num_kv_heads, length, head_dim)` of sequence s."""
    blocks = tables[s, : (length + 63) // 64].long()
    return cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length]


def naive(q, keys, values, positions, scale, window=None, cap=None):
    """q `(rows, heads, dim)` at `positions`, one (row, head) at a time: (out, lse)."""
    rows, heads, _ = q.shape
    out, lse = torch.zeros_like(q), torch.full((rows, heads), -math.inf, dtype=q.dtype)
    group = heads // keys.shape[0]
    for r in range(rows):
        low = 0 if window is None else max(0, positions[r] - window + 1)
        high = positions[r] + 1
        if high <= low:
            continue
        for h in range(heads):
            scores = scale * keys[h // group, low:high] @ q[r, h]
            if cap is not None:
                scores = cap * torch.tanh(scores / cap)
            lse[r, h] = torch.logsumexp(scores, 0)
            out[r, h] = torch.softmax(scores, 0) @ values[h // group, low:high]
    return out, lse


lengths = st.sampled_from([0, 1, 2, 17, 63, 64, 65, 130])
heads = st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 1)])


@settings(max_examples=25, deadline=None)
@given(
    lens=st.lists(lengths, max_size=4),
    heads=heads,
    rows=st.integers(1, 3),
    window=st.sampled_from([None, 1, 5, 64, 100]),
    cap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 100),
)
def test_decode_is_softmax_over_the_visible_keys(lens, heads, rows, window, cap, seed):
    k_cache, v_cache, tables, seq_lens = paged(lens, heads[1], 8, seed=seed)
    q = torch.randn(len(lens), rows, heads[0], 8, dtype=torch.float64)
    arguments = (q, k_cache, v_cache, tables, seq_lens)
    options = {"scale": 0.3, "sliding_window": window, "soft_cap": cap}

    out, lse = paged_decode_attention(*arguments, return_lse=True, **options)
    alone = paged_decode_attention(*arguments, **options)

    torch.testing.assert_close(alone, out)
    for s, length in enumerate(lens):
        keys, values = (keys_of(cache, tables, s, length) for cache in (k_cache, v_cache))
        positions = [length - rows + r for r in range(rows)]
        expected = naive(q[s], keys, values, positions, 0.3, window, cap)
        torch.testing.assert_close((out[s], lse[s]), expected)


@settings(max_examples=25, deadline=None)
@given(
    chunks=st.lists(st.tuples(st.sampled_from([0, 1, 63, 64, 70]), lengths), max_size=3),
    heads=heads,
    window=st.sampled_from([None, 1, 5, 64, 100]),
    cap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 100),
)
def test_prefill_is_causal_softmax_after_the_cached_prefix(chunks, heads, window, cap, seed):
    lens = [prefix + rows for prefix, rows in chunks]
    k_cache, v_cache, tables, seq_lens = paged(lens, heads[1], 8, seed=seed)
    starts = torch.tensor([0, *(rows for _, rows in chunks)]).cumsum(0).to(torch.int32)
    q = torch.randn(int(starts[-1]), heads[0], 8, dtype=torch.float64)

    out = prefill_attention(
        q, k_cache, v_cache, tables, starts, seq_lens, scale=0.3, sliding_window=window,
        soft_cap=cap,
    )  # fmt: skip

    for s, (prefix, rows) in enumerate(chunks):
        keys, values = (keys_of(cache, tables, s, prefix + rows) for cache in (k_cache, v_cache))
        mine = slice(int(starts[s]), int(starts[s + 1]))
        positions = list(range(prefix, prefix + rows))
        expected, _ = naive(q[mine], keys, values, positions, 0.3, window, cap)
        torch.testing.assert_close(out[mine], expected)


def test_a_large_batch_goes_sequence_by_sequence_with_the_same_result():
    lens = [700, 1, 0, 650, 64]
    k_cache, v_cache, tables, seq_lens = paged(lens, 4, 64, torch.float32)
    q = torch.randn(5, 2, 8, 64)

    out = paged_decode_attention(q, k_cache, v_cache, tables, seq_lens, scale=0.1)
    exact = paged_decode_attention(
        *(t.double() for t in (q, k_cache, v_cache)), tables, seq_lens, scale=0.1
    )

    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)


def test_fp8_caches_are_scaled_per_head():
    k_cache, v_cache, tables, seq_lens = paged([100, 3], 2, 16, torch.float32)
    scales = torch.tensor([0.5, 2.0])
    stored = [(c / scales[:, None, None]).to(torch.float8_e4m3fn) for c in (k_cache, v_cache)]
    restored = [(c.float() * scales[:, None, None]).double() for c in stored]
    q = torch.randn(2, 1, 4, 16)

    out = paged_decode_attention(
        q, *stored, tables, seq_lens, scale=0.2, k_scale=scales, v_scale=scales
    )

    exact = paged_decode_attention(q.double(), *restored, tables, seq_lens, scale=0.2)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)


def test_page_scores_bound_every_product_with_the_pages_keys():
    lens = [130, 64, 1, 0]
    k_cache, _, tables, seq_lens = paged(lens, 2, 8)
    q = torch.randn(4, 4, 8, dtype=torch.float64)
    filled = k_cache.nan_to_num(nan=0.0)
    low = torch.where(k_cache.isnan(), math.inf, filled).amin(2)
    high = torch.where(k_cache.isnan(), -math.inf, filled).amax(2)
    finite = [b.nan_to_num(posinf=0.0, neginf=0.0) for b in (low, high)]

    scores = page_scores(q, *finite, tables, seq_lens)

    for s, length in enumerate(lens):
        keys = keys_of(k_cache, tables, s, length)
        products = torch.einsum("hgd,htd->hgt", q[s].view(2, 2, 8), keys).amax(1)
        for page in range(scores.shape[2]):
            inside = products[:, 64 * page : 64 * (page + 1)]
            if inside.shape[1] == 0:
                assert bool((scores[s, :, page] == -math.inf).all())
            else:
                assert bool((scores[s, :, page] >= inside.amax(1) - 1e-12).all())


def test_selected_pages_hold_the_last_page_and_the_best():
    scores = torch.tensor([[[5.0, 9.0, 1.0, 7.0, -math.inf]]])

    pages = select_pages(scores, torch.tensor([200]), 3)

    assert set(pages[0, 0].tolist()) == {1, 3, 0}
    assert select_pages(scores, torch.tensor([0]), 2).tolist() == [[[-1, -1]]]


def test_attention_over_all_pages_or_all_keys_is_decode_attention():
    lens = [130, 64, 1, 0]
    cache = paged(lens, 2, 8)
    q = torch.randn(4, 4, 8, dtype=torch.float64)
    used = torch.arange(3) * 64 < cache[3][:, None, None]
    pages = select_pages(torch.zeros(4, 2, 3).masked_fill(~used, -math.inf), cache[3], 3)
    listed = torch.arange(130, dtype=torch.int32).expand(4, 2, 130).contiguous()
    counts = cache[3][:, None].expand(4, 2).contiguous()

    dense, lse = paged_decode_attention(q[:, None], *cache, scale=0.3, return_lse=True)
    by_page = page_list_attention(q, *cache, pages, scale=0.3, return_lse=True)
    by_key = key_list_attention(q, *cache, listed, counts, scale=0.3, return_lse=True)

    torch.testing.assert_close(by_page, (dense[:, 0], lse[:, 0]))
    torch.testing.assert_close(by_key, (dense[:, 0], lse[:, 0]))


def test_selected_keys_are_the_heavy_clusters_and_everything_after_the_context():
    weights = torch.tensor([[[0.1, 0.001, 0.05]]])
    cluster_of_key = torch.tensor([[0, 1, 2, 1, 0, 2]], dtype=torch.int32)

    listed, counts = select_keys(
        weights, cluster_of_key, torch.tensor([8]), max_keys=10, threshold=0.05
    )
    short, short_counts = select_keys(
        weights, cluster_of_key, torch.tensor([8]), max_keys=3, threshold=0.05
    )

    assert listed[0, 0, : int(counts)].tolist() == [0, 2, 4, 5, 6, 7]
    assert short[0, 0, : int(short_counts)].tolist() == [5, 6, 7]


def test_clusters_cover_every_key_once():
    keys = torch.randn(2, 50, 8)

    centroids, sizes, cluster_of_key = cluster_keys(keys, 7)

    assert centroids.shape == (2, 7, 8)
    assert sizes.sum(1).tolist() == [50, 50]
    for head in range(2):
        counted = torch.bincount(cluster_of_key[head].long(), minlength=7)
        assert counted.tolist() == sizes[head].tolist()


def test_snapkv_votes_are_the_windows_attention_mass():
    lens = [100, 20]
    k_cache, _, tables, seq_lens = paged(lens, 2, 8)
    q = torch.randn(2, 10, 4, 8, dtype=torch.float64)

    votes = snapkv_votes(q, k_cache, tables, seq_lens, scale=0.3)

    for s, length in enumerate(lens):
        keys = keys_of(k_cache, tables, s, length)
        expected = torch.zeros(2, length - 10, dtype=torch.float64)
        for r in range(10):
            for h in range(4):
                seen = keys[h // 2, : length - 10 + r + 1]
                weight = torch.softmax(0.3 * seen @ q[s, r, h], 0)
                expected[h // 2] += weight[: length - 10]
        torch.testing.assert_close(votes[s, :, : length - 10], expected)
        assert not votes[s, :, length - 10 :].any()


def test_pooling_keeps_the_neighbours_of_a_popular_key():
    votes = torch.zeros(1, 1, 10)
    votes[0, 0, 4] = 3.0

    assert pool_votes(votes, 3)[0, 0].tolist() == [0, 0, 0, 3, 3, 3, 0, 0, 0, 0]


def test_the_cache_write_collects_page_bounds_over_several_calls():
    k_cache, v_cache = (torch.zeros(3, 2, 64, 8) for _ in range(2))
    low, high = torch.empty(3, 2, 8), torch.empty(3, 2, 8)
    reset_page_bounds(low, high, torch.arange(3))
    table = rope_table(8, 200)
    for first, count in ((0, 70), (70, 1), (71, 10)):
        positions = torch.arange(first, first + count)
        qkv = torch.randn(count, 6, 8)
        qk_norm_rope_write(
            qkv[:, :2], qkv[:, 2:4], qkv[:, 4:], positions=positions, cos_sin_cache=table,
            slot_mapping=positions + 64, k_cache=k_cache, v_cache=v_cache,
            key_min=low, key_max=high,
        )  # fmt: skip

    assert torch.equal(low[1], k_cache[1].amin(1))
    assert torch.equal(high[2], k_cache[2, :, :17].amax(1))
    assert bool((low[0] == math.inf).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 1, 3, 8)}, "num_heads=3 is not a multiple of num_kv_heads=2"),
        ({"q": torch.zeros(2, 4, 8)}, "q has shape"),
        ({"seq_lens": torch.zeros(3, dtype=torch.int32)}, "seq_lens has shape"),
        ({"seq_lens": torch.zeros(2)}, "seq_lens has dtype float32; use one of int32, int64"),
        ({"k_cache": torch.zeros(3, 2, 32, 8)}, "k_cache has shape"),
        ({"sliding_window": 0}, "sliding_window=0 must be positive"),
        ({"soft_cap": -1.0}, "soft_cap=-1.0 must be positive"),
        ({"k_scale": torch.ones(2)}, "scales belong to fp8 and"),
    ],
)
def test_wrong_arguments_are_named_with_value_and_rule(change, message):
    call = {
        "q": torch.zeros(2, 1, 4, 8),
        "k_cache": torch.zeros(3, 2, 64, 8),
        "v_cache": torch.zeros(3, 2, 64, 8),
        "block_tables": torch.zeros(2, 1, dtype=torch.int32),
        "seq_lens": torch.ones(2, dtype=torch.int32),
        "scale": 1.0,
        **change,
    }

    with pytest.raises(KernelArgumentError, match=message.replace("(", r"\(")):
        paged_decode_attention(**call)
