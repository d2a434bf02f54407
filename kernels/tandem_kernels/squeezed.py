# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return"
"""Centroid look-up and sparse attention over a fixed context (Squeezed Attention, Hooper et al.
2024, sections 3.1 and 3.2).

Offline, the keys of a fixed context are clustered per KV head. For each query

    weight[c] = exp(scale * q . centroid[c]) / sum_j size[j] * exp(scale * q . centroid[j])

estimates the attention weight of one key of cluster c; clusters at or above a threshold, for any
query head of the KV head, have their keys attended to exactly, together with every token after the
fixed context.
Shapes: q `(num_seqs, num_heads, head_dim)`; centroids `(num_kv_heads, num_clusters, head_dim)`;
cluster_sizes `(num_kv_heads, num_clusters)` int32, 0 for an unused cluster; cluster_of_key
`(num_kv_heads, context)` int32; key_list `(num_seqs, num_kv_heads, max_keys)` int32 of token
positions with key_counts `(num_seqs, num_kv_heads)` int32.
Bytes moved: the centroids, one int32 per context key, and the selected keys and values. Sums are
in float32.
"""

from __future__ import annotations

import torch

from .attention_inputs import check_attention, check_attention_options
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
from .dispatch import runs_on_triton, tl, triton
from .online_softmax import dot_precision, padded, score_scale
from .quest import attend_listed, launch_listed


def cluster_keys(
    keys: torch.Tensor, num_clusters: int, *, num_iterations: int = 10, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Spherical k-means per KV head: (centroids, cluster_sizes, cluster_of_key). Offline, in torch.

    keys `(num_kv_heads, context, head_dim)`. Keys are assigned by cosine similarity; a centroid is
    the mean of its keys, unnormalised, so that its product with q estimates theirs.
    """
    num_kv_heads, context, head_dim = keys.shape
    check(
        0 < num_clusters <= context,
        f"num_clusters={num_clusters} must be between 1 and the context of {context} keys",
    )
    wide = keys.float()
    unit = torch.nn.functional.normalize(wide, dim=-1)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(context, generator=generator)[:num_clusters].to(keys.device)
    means = wide[:, start]
    for _ in range(num_iterations):
        cosine = torch.matmul(unit, torch.nn.functional.normalize(means, dim=-1).transpose(1, 2))
        assigned = cosine.argmax(-1)
        sums = torch.zeros_like(means).scatter_add_(
            1, assigned[..., None].expand(-1, -1, head_dim), wide
        )
        sizes = torch.zeros(num_kv_heads, num_clusters, device=keys.device).scatter_add_(
            1, assigned, torch.ones_like(assigned, dtype=torch.float32)
        )
        means = torch.where(sizes[..., None] > 0, sums / sizes[..., None].clamp(min=1), means)
    return means.to(keys.dtype), sizes.to(torch.int32), assigned.to(torch.int32)


def centroid_weights(
    q: torch.Tensor, centroids: torch.Tensor, cluster_sizes: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Largest estimated weight of a cluster's keys over the KV head's query heads.

    Returns `(num_seqs, num_kv_heads, num_clusters)` float32, 0 for unused clusters.
    """
    check_shape("q", q, (None, None, None), "(num_seqs, num_heads, head_dim)")
    check_dtype("q", q, FLOAT_DTYPES)
    wanted = (None, None, q.shape[2])
    check_shape("centroids", centroids, wanted, "(num_kv_heads, num_clusters, head_dim)")
    check_dtype("centroids", centroids, FLOAT_DTYPES)
    check_heads(q.shape[1], centroids.shape[0])
    shape = tuple(centroids.shape[:2])
    check_shape("cluster_sizes", cluster_sizes, shape, "(num_kv_heads, num_clusters)")
    check_dtype("cluster_sizes", cluster_sizes, (torch.int32,))
    check_same_device("q", q, centroids=centroids, cluster_sizes=cluster_sizes)
    if runs_on_triton(q):
        return _launch_weights(q, centroids, cluster_sizes, scale)
    return centroid_weights_reference(q, centroids, cluster_sizes, scale=scale)


def centroid_weights_reference(
    q: torch.Tensor,
    centroids: torch.Tensor,
    cluster_sizes: torch.Tensor,
    *,
    scale: float,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The formula in torch."""
    compute = compute_dtype or compute_dtype_of(q, centroids)
    num_seqs, _, head_dim = q.shape
    query = q.to(compute).view(num_seqs, centroids.shape[0], -1, head_dim)
    scores = torch.matmul(query * scale, centroids.to(compute).transpose(1, 2))
    sizes = cluster_sizes.to(compute)[None, :, None]
    total = torch.logsumexp(scores + sizes.log(), dim=-1, keepdim=True)
    weights = torch.where(sizes > 0, torch.exp(scores - total), 0).amax(2)
    return weights.to(torch.float64 if compute == torch.float64 else torch.float32)


def select_keys(
    weights: torch.Tensor,
    cluster_of_key: torch.Tensor,
    seq_lens: torch.Tensor,
    max_keys: int,
    *,
    threshold: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(key_list, key_counts): keys of clusters at or above `threshold`, and all later tokens.

    Positions rise. When more than max_keys qualify the earliest are dropped: the tokens after the
    context come last and are always kept. Torch on every device, without a host sync: `max_keys`
    also bounds the positions looked at beyond the context.
    """
    context = cluster_of_key.shape[1]
    num_seqs, num_kv_heads, _ = weights.shape
    device = weights.device
    index = cluster_of_key.long().expand(num_seqs, -1, -1)
    chosen = weights.gather(2, index) >= threshold
    tail = torch.ones(num_seqs, num_kv_heads, max_keys, dtype=torch.bool, device=device)
    chosen = torch.cat([chosen, tail], dim=-1)
    positions = torch.arange(context + max_keys, device=device)
    chosen = chosen & (positions < seq_lens.to(device)[:, None, None])
    found = chosen.sum(-1, keepdim=True)
    rank = chosen.cumsum(-1) - 1 - (found - max_keys).clamp(min=0)
    rank = torch.where(chosen & (rank >= 0), rank, max_keys)
    key_list = torch.zeros(num_seqs, num_kv_heads, max_keys + 1, dtype=torch.int64, device=device)
    key_list.scatter_(2, rank, positions.expand_as(rank))
    counts = found.squeeze(-1).clamp(max=max_keys)
    return key_list[..., :max_keys].to(torch.int32).contiguous(), counts.to(torch.int32)


def key_list_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    key_list: torch.Tensor,
    key_counts: torch.Tensor,
    *,
    scale: float,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query row per sequence over listed token positions.

    Returns out `(num_seqs, num_heads, head_dim)` and, with `return_lse`, the log-sum-exp
    `(num_seqs, num_heads)`. Raises KernelArgumentError.
    """
    check_shape("q", q, (None, None, None), "(num_seqs, num_heads, head_dim)")
    check_attention(q, k_cache, v_cache, block_tables, seq_lens, q.shape[0])
    check_attention_options(k_cache, None, None, None, None)
    shape = (q.shape[0], k_cache.shape[1])
    check_shape("key_list", key_list, (*shape, None), "(num_seqs, num_kv_heads, max_keys)")
    check_shape("key_counts", key_counts, shape, "(num_seqs, num_kv_heads)")
    check_dtype("key_list", key_list, (torch.int32,))
    check_dtype("key_counts", key_counts, (torch.int32,))
    check_same_device("q", q, key_list=key_list, key_counts=key_counts)
    arguments = (q, k_cache, v_cache, block_tables, key_list, key_counts)
    if runs_on_triton(q):
        out, lse = _launch_attention(*arguments, scale)
    else:
        out, lse = key_list_attention_reference(*arguments, scale=scale)
    return (out, lse) if return_lse else out


def key_list_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    key_list: torch.Tensor,
    key_counts: torch.Tensor,
    *,
    scale: float,
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the listed keys and values, then dense attention."""
    compute = compute_dtype or compute_dtype_of(q, k_cache)
    visible = torch.arange(key_list.shape[2]) < key_counts.long()[..., None]
    positions = torch.where(visible, key_list, 0).long()
    blocks = block_tables.long().gather(1, (positions // BLOCK_SIZE).flatten(1))
    blocks = torch.where(visible, blocks.view(positions.shape), 0)
    head = torch.arange(k_cache.shape[1])[None, :, None]
    offsets = positions % BLOCK_SIZE
    keys = k_cache[blocks, head, offsets].to(compute)
    values = v_cache[blocks, head, offsets].to(compute)
    return attend_listed(q, keys, values, visible, scale, None, compute)


# Clusters per step and warps of the look-up. Untuned.
_CLUSTERS = 64
_NUM_WARPS = 4


@triton.jit
def _weights_kernel(
    q_ptr, centroids_ptr, sizes_ptr, out_ptr, num_clusters, scale, stride_qs, stride_qh,
    stride_centroid_head, stride_centroid,
    GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, CLUSTERS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One (sequence, KV head): the weighted log-sum-exp over clusters, then each weight."""
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < HEAD_DIM
    q = tl.load(
        q_ptr + seq * stride_qs + ((kv_head * GROUP + m) * stride_qh)[:, None] + dims[None, :],
        mask=(m < GROUP)[:, None] & dim_mask[None, :],
        other=0.0,
    )
    base = centroids_ptr + kv_head.to(tl.int64) * stride_centroid_head + dims[:, None]
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, num_clusters, CLUSTERS):
        cluster = start + tl.arange(0, CLUSTERS)
        mask = cluster < num_clusters
        size = tl.load(sizes_ptr + kv_head * num_clusters + cluster, mask=mask, other=0)
        centroid = tl.load(
            base + (cluster * stride_centroid)[None, :],
            mask=dim_mask[:, None] & mask[None, :],
            other=0.0,
        )
        scores = tl.dot(q, centroid.to(q.dtype), input_precision=PRECISION) * scale
        scores = tl.where((size > 0)[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - shift[:, None]) * size.to(tl.float32)[None, :]
        total = total * tl.exp2(highest - shift) + tl.sum(weights, 1)
        highest = new_highest
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    for start in range(0, num_clusters, CLUSTERS):
        cluster = start + tl.arange(0, CLUSTERS)
        mask = cluster < num_clusters
        size = tl.load(sizes_ptr + kv_head * num_clusters + cluster, mask=mask, other=0)
        centroid = tl.load(
            base + (cluster * stride_centroid)[None, :],
            mask=dim_mask[:, None] & mask[None, :],
            other=0.0,
        )
        scores = tl.dot(q, centroid.to(q.dtype), input_precision=PRECISION) * scale
        weights = tl.exp2(scores - shift[:, None]) / tl.where(total > 0, total, 1.0)[:, None]
        weights = tl.where((m < GROUP)[:, None] & (size > 0)[None, :], weights, 0.0)
        out = out_ptr + (seq * NUM_KV_HEADS + kv_head) * num_clusters + cluster
        tl.store(out, tl.max(weights, 0), mask=mask)


def _launch_weights(q, centroids, cluster_sizes, scale):
    check_last_contiguous("q", q)
    check_last_contiguous("centroids", centroids)
    check(cluster_sizes.is_contiguous(), "cluster_sizes must be contiguous")
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads, num_clusters = centroids.shape[:2]
    shape = (num_seqs, num_kv_heads, num_clusters)
    out = torch.empty(shape, dtype=torch.float32, device=q.device)
    if out.numel():
        group = num_heads // num_kv_heads
        _weights_kernel[(num_seqs, num_kv_heads)](
            q, centroids, cluster_sizes, out, num_clusters, score_scale(scale, None),
            *q.stride()[:2], *centroids.stride()[:2],
            GROUP=group, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_M=padded(group),
            BLOCK_D=padded(head_dim), CLUSTERS=_CLUSTERS, PRECISION=dot_precision(q.dtype),
            num_warps=_NUM_WARPS,
        )  # fmt: skip
    return out


def _launch_attention(q, k_cache, v_cache, block_tables, key_list, key_counts, scale):
    check(key_counts.is_contiguous(), "key_counts must be contiguous")
    return launch_listed(
        q, k_cache, v_cache, block_tables, None, key_list, key_counts, scale, None,
        -(-key_list.shape[2] // BLOCK_SIZE),
    )  # fmt: skip
