# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Per-head RMSNorm of Q and K, rotary embedding, and the write of K and V into the paged cache.

    q' = rope(norm(q) * q_weight),  k' = rope(norm(k) * k_weight)
    k_cache[slot] = k' / k_scale,   v_cache[slot] = v / v_scale        (scales: fp8 caches only)
    key_min[block] = min(key_min[block], k'), key_max likewise          (only when given)

rope rotates the pairs (i, i + rotary_dim / 2) of the first `rotary_dim` channels, as Hugging Face
models do; channels beyond stay. A slot is `block * 64 + offset`; a negative slot is padding and
writes nothing. Shapes: q `(num_tokens, num_heads, head_dim)`, k and v `(num_tokens, num_kv_heads,
head_dim)`, caches `(num_blocks, num_kv_heads, 64, head_dim)`, key_min and key_max
`(num_blocks, num_kv_heads, head_dim)` float32.
Bytes moved: q, k, v read once; q', k', v written once; one table row per token.
Norm and rotation are in float32; k' is rounded to the cache's dtype once.
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


def qk_norm_rope_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    key_min: torch.Tensor | None = None,
    key_max: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the rotated queries; write rotated keys and values into the cache in place.

    positions `(num_tokens,)` int64 or int32 index `cos_sin_cache (max_positions, rotary_dim)`
    (see rope.rope_table); slot_mapping `(num_tokens,)` int64. q_weight and k_weight `(head_dim,)`
    switch the per-head norm on (Qwen3). k_scale and v_scale `(num_kv_heads,)` float32 belong to
    fp8 caches, whose values saturate. key_min and key_max collect each block's key bounds for
    page scoring; the engine resets a block's bounds with `quest.reset_page_bounds` when it
    allocates the block. Raises KernelArgumentError.
    """
    num_tokens, num_heads, head_dim = _check(
        q, k, v, positions, cos_sin_cache, slot_mapping, k_cache, v_cache
    )
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_shape(name, weight, (head_dim,), "(head_dim,)")
    check(
        (q_weight is None) == (k_weight is None),
        "q_weight and k_weight must both be given or both be None",
    )
    check(
        (key_min is None) == (key_max is None),
        "key_min and key_max must both be given or both be None",
    )
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            check_shape(name, scale, (k.shape[1],), "(num_kv_heads,)")
            check(
                k_cache.dtype in FP8_DTYPES,
                f"{name} is given but the cache is {k_cache.dtype}; scales belong to fp8 caches",
            )
    for name, bound in (("key_min", key_min), ("key_max", key_max)):
        if bound is not None:
            wanted = (k_cache.shape[0], k_cache.shape[1], head_dim)
            check_shape(name, bound, wanted, "(num_blocks, num_kv_heads, head_dim)")
            check_dtype(name, bound, (torch.float32, torch.float64))
    arguments = (q, k, v, positions, cos_sin_cache, slot_mapping, k_cache, v_cache)
    options = (q_weight, k_weight, eps, k_scale, v_scale, key_min, key_max)
    if runs_on_triton(q):
        return _launch(*arguments, *options)
    return qk_norm_rope_write_reference(
        q,
        k,
        v,
        positions=positions,
        cos_sin_cache=cos_sin_cache,
        slot_mapping=slot_mapping,
        k_cache=k_cache,
        v_cache=v_cache,
        q_weight=q_weight,
        k_weight=k_weight,
        eps=eps,
        k_scale=k_scale,
        v_scale=v_scale,
        key_min=key_min,
        key_max=key_max,
    )


def qk_norm_rope_write_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    key_min: torch.Tensor | None = None,
    key_max: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The formula in torch; `compute_dtype` overrides the accumulation dtype (tests)."""
    compute = compute_dtype or compute_dtype_of(q)
    rows = cos_sin_cache.index_select(0, positions.long()).to(compute)[:, None, :]
    q_out = _rotate(_norm(q.to(compute), q_weight, eps), rows).to(q.dtype)
    k_out = _rotate(_norm(k.to(compute), k_weight, eps), rows)
    v_out = v.to(compute)
    if slot_mapping.numel() and int(slot_mapping.min()) < 0:
        kept = slot_mapping >= 0
        slot_mapping, k_out, v_out = slot_mapping[kept], k_out[kept], v_out[kept]
    blocks = torch.div(slot_mapping, BLOCK_SIZE, rounding_mode="floor")
    offsets = slot_mapping - blocks * BLOCK_SIZE
    k_cache[blocks, :, offsets] = to_cache_dtype(k_out, k_cache.dtype, k_scale)
    v_cache[blocks, :, offsets] = to_cache_dtype(v_out, v_cache.dtype, v_scale)
    if key_min is not None and key_max is not None:
        index = blocks[:, None, None].expand_as(k_out)
        key_min.scatter_reduce_(0, index, k_out.to(key_min.dtype), "amin")
        key_max.scatter_reduce_(0, index, k_out.to(key_max.dtype), "amax")
    return q_out


def to_cache_dtype(
    values: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None
) -> torch.Tensor:
    """Round `(num_tokens, num_kv_heads, head_dim)` to a cache's dtype; fp8 saturates."""
    if dtype not in FP8_DTYPES:
        return values.to(dtype)
    if scale is not None:
        values = values / scale.to(values.dtype)[:, None]
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def _norm(heads: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    if weight is None:
        return heads
    return torch.rms_norm(heads, (heads.shape[-1],), weight.to(heads.dtype), eps)


def _rotate(heads: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    half = rows.shape[-1] // 2
    cos, sin = rows[..., :half], rows[..., half:]
    first, second = heads[..., :half], heads[..., half : 2 * half]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < heads.shape[-1]:
        rotated.append(heads[..., 2 * half :])
    return torch.cat(rotated, dim=-1)


def _check(q, k, v, positions, cos_sin_cache, slot_mapping, k_cache, v_cache):
    check_dtype("q", q, FLOAT_DTYPES)
    check_shape("q", q, (None, None, None), "(num_tokens, num_heads, head_dim)")
    num_tokens, num_heads, head_dim = q.shape
    check_shape("k", k, (num_tokens, None, head_dim), "(num_tokens, num_kv_heads, head_dim)")
    check_shape("v", v, tuple(k.shape), "the shape of k")
    check_heads(num_heads, k.shape[1])
    check_shape("positions", positions, (num_tokens,), "(num_tokens,)")
    check_dtype("positions", positions, (torch.int64, torch.int32))
    check_shape("slot_mapping", slot_mapping, (num_tokens,), "(num_tokens,)")
    check_dtype("slot_mapping", slot_mapping, (torch.int64,))
    check_shape("cos_sin_cache", cos_sin_cache, (None, None), "(max_positions, rotary_dim)")
    rotary_dim = cos_sin_cache.shape[1]
    check(
        rotary_dim % 2 == 0 and rotary_dim <= head_dim,
        f"cos_sin_cache has {rotary_dim} columns; use an even number up to head_dim={head_dim}",
    )
    _, num_kv_heads = check_paged_cache(k_cache, v_cache, head_dim)
    check(
        num_kv_heads == k.shape[1],
        f"k_cache holds {num_kv_heads} KV heads and k {k.shape[1]}; they must be equal",
    )
    check_same_device(
        "q",
        q,
        k=k,
        v=v,
        positions=positions,
        cos_sin_cache=cos_sin_cache,
        slot_mapping=slot_mapping,
        k_cache=k_cache,
        v_cache=v_cache,
    )
    return num_tokens, num_heads, head_dim


def _launch(
    q, k, v, positions, cos_sin_cache, slot_mapping, k_cache, v_cache,
    q_weight, k_weight, eps, k_scale, v_scale, key_min, key_max,
):  # fmt: skip
    return qk_norm_rope_write_reference(
        q, k, v, positions=positions, cos_sin_cache=cos_sin_cache, slot_mapping=slot_mapping,
        k_cache=k_cache, v_cache=v_cache, q_weight=q_weight, k_weight=k_weight, eps=eps,
        k_scale=k_scale, v_scale=v_scale, key_min=key_min, key_max=key_max,
    )  # fmt: skip
