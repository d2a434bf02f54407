# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return"
"""Per-head RMSNorm of Q and K, rotary embedding, and the write of K and V into the paged cache.

    q' = rope(norm(q) * q_weight),  k' = rope(norm(k) * k_weight)
    k_cache[slot] = k' / k_scale,   v_cache[slot] = v / v_scale        (scales: fp8, int8 caches)
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

from .attention_inputs import check_scales, scale_strides
from .checks import (
    BLOCK_SIZE,
    FLOAT_DTYPES,
    FP8_DTYPES,
    check,
    check_dtype,
    check_fp8_support,
    check_heads,
    check_last_contiguous,
    check_paged_cache,
    check_same_device,
    check_shape,
    compute_dtype_of,
)
from .dispatch import runs_on_triton, tl, triton
from .int8_kv import LIMIT as INT8_LIMIT
from .int8_kv import quantize_tokens
from .online_softmax import padded


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
    switch the per-head norm on (Qwen3). k_scale and v_scale, float32, are `(num_kv_heads,)` and
    read for fp8 caches, whose values saturate; for int8 caches they are `(num_blocks, num_kv_heads,
    64)` and written: max |value| / 127 of each token (see int8_kv). key_min and key_max collect
    each block's key bounds for page scoring; the engine resets a block's bounds with
    `quest.reset_page_bounds` when it allocates the block. Raises KernelArgumentError.
    """
    _check(q, k, v, positions, cos_sin_cache, slot_mapping, k_cache, v_cache)
    head_dim = q.shape[2]
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
    check_scales(k_cache, k_scale, v_scale)
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
    if k_cache.dtype == torch.int8:
        assert k_scale is not None
        assert v_scale is not None
        for values, cache, scales in ((k_out, k_cache, k_scale), (v_out, v_cache, v_scale)):
            codes, factors = quantize_tokens(values)
            cache[blocks, :, offsets] = codes
            scales[blocks, :, offsets] = factors.to(scales.dtype)
    else:
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


# Heads per program and warps. Untuned.
_HEADS = 8
_NUM_WARPS = 2


@triton.jit
def _load_rotated(
    base_ptr, offsets, head_mask, weight_ptr, table_ptr, eps,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Heads as (first half, second half, channels beyond the rotation), normed and rotated."""
    half = tl.arange(0, BLOCK_HALF)
    half_mask = half < HALF
    mask = head_mask[:, None] & half_mask[None, :]
    pointers = base_ptr + offsets[:, None] + half[None, :]
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointers + HALF, mask=mask, other=0.0).to(tl.float32)
    rest_index = 2 * HALF + tl.arange(0, BLOCK_REST)
    rest_mask = rest_index < HEAD_DIM
    rest = tl.load(
        base_ptr + offsets[:, None] + rest_index[None, :],
        mask=head_mask[:, None] & rest_mask[None, :],
        other=0.0,
    ).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(rest * rest, 1)
        scale = 1.0 / tl.sqrt(squares / HEAD_DIM + eps)
        weight_first = tl.load(weight_ptr + half, mask=half_mask, other=0.0).to(tl.float32)
        weight_second = tl.load(weight_ptr + HALF + half, mask=half_mask, other=0.0)
        weight_rest = tl.load(weight_ptr + rest_index, mask=rest_mask, other=0.0)
        first *= scale[:, None] * weight_first[None, :]
        second *= scale[:, None] * weight_second.to(tl.float32)[None, :]
        rest *= scale[:, None] * weight_rest.to(tl.float32)[None, :]
    cos = tl.load(table_ptr + half, mask=half_mask, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(table_ptr + HALF + half, mask=half_mask, other=0.0).to(tl.float32)[None, :]
    return first * cos - second * sin, second * cos + first * sin, rest


@triton.jit
def _to_cache(
    values, scale, LIMIT: tl.constexpr, HAS_SCALE: tl.constexpr, TOKEN_SCALES: tl.constexpr
):
    """Divide by the head's scale and saturate; LIMIT 0 is a cache that is not quantized."""
    if HAS_SCALE or TOKEN_SCALES:
        values = values / scale[:, None]
    if TOKEN_SCALES:
        values = tl.floor(values + 0.5)
    if LIMIT > 0:
        values = tl.minimum(tl.maximum(values, -LIMIT), LIMIT)
    return values


@triton.jit
def _kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, table_ptr, slots_ptr, k_cache_ptr, v_cache_ptr, out_ptr,
    q_weight_ptr, k_weight_ptr, k_scale_ptr, v_scale_ptr, key_min_ptr, key_max_ptr, eps,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_table,
    stride_kcb, stride_kch, stride_kct, stride_vcb, stride_vch, stride_vct,
    stride_ksb, stride_ksh, stride_vsb, stride_vsh,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_D: tl.constexpr, HEADS: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_K_SCALE: tl.constexpr, HAS_V_SCALE: tl.constexpr, TOKEN_SCALES: tl.constexpr,
    HAS_BOUNDS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_parts: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    table = table_ptr + tl.load(positions_ptr + token).to(tl.int64) * stride_table
    half = tl.arange(0, BLOCK_HALF)
    rest_index = 2 * HALF + tl.arange(0, BLOCK_REST)
    if part < q_parts:
        head = part * HEADS + tl.arange(0, HEADS)
        head_mask = head < NUM_HEADS
        first, second, rest = _load_rotated(
            q_ptr, token * stride_qt + head * stride_qh, head_mask, q_weight_ptr, table, eps,
            HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, HAS_NORM,
        )  # fmt: skip
        mask = head_mask[:, None] & (half < HALF)[None, :]
        rest_mask = head_mask[:, None] & (rest_index < HEAD_DIM)[None, :]
        out = out_ptr + ((token * NUM_HEADS + head) * HEAD_DIM)[:, None]
        kind = out_ptr.dtype.element_ty
        tl.store(out + half[None, :], first.to(kind), mask=mask)
        tl.store(out + HALF + half[None, :], second.to(kind), mask=mask)
        tl.store(out + rest_index[None, :], rest.to(kind), mask=rest_mask)
    else:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            block = slot // 64
            offset = slot % 64
            head = ((part - q_parts) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
            head_mask = head < NUM_KV_HEADS
            mask = head_mask[:, None] & (half < HALF)[None, :]
            rest_mask = head_mask[:, None] & (rest_index < HEAD_DIM)[None, :]
            first, second, rest = _load_rotated(
                k_ptr, token * stride_kt + head * stride_kh, head_mask, k_weight_ptr, table, eps,
                HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, HAS_NORM,
            )  # fmt: skip
            if HAS_BOUNDS:
                bounds = ((block * NUM_KV_HEADS + head) * HEAD_DIM)[:, None]
                at = bounds + half[None, :]
                tl.atomic_min(key_min_ptr + at, first, mask=mask, sem="relaxed")
                tl.atomic_max(key_max_ptr + at, first, mask=mask, sem="relaxed")
                tl.atomic_min(key_min_ptr + at + HALF, second, mask=mask, sem="relaxed")
                tl.atomic_max(key_max_ptr + at + HALF, second, mask=mask, sem="relaxed")
                if 2 * HALF < HEAD_DIM:
                    at = bounds + rest_index[None, :]
                    tl.atomic_min(key_min_ptr + at, rest, mask=rest_mask, sem="relaxed")
                    tl.atomic_max(key_max_ptr + at, rest, mask=rest_mask, sem="relaxed")
            k_scale = tl.full((HEADS,), 1.0, tl.float32)
            v_scale = tl.full((HEADS,), 1.0, tl.float32)
            if HAS_K_SCALE:
                k_scale = tl.load(k_scale_ptr + head, mask=head_mask, other=1.0)
            if HAS_V_SCALE:
                v_scale = tl.load(v_scale_ptr + head, mask=head_mask, other=1.0)
            if TOKEN_SCALES:
                highest = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
                highest = tl.maximum(highest, tl.max(tl.abs(rest), 1))
                at = block * stride_ksb + head * stride_ksh + offset
                tl.store(k_scale_ptr + at, highest / LIMIT, mask=head_mask)
                k_scale = tl.where(highest > 0, highest / LIMIT, 1.0)
            kind = k_cache_ptr.dtype.element_ty
            target = (
                k_cache_ptr
                + (block * stride_kcb + head * stride_kch + offset * stride_kct)[:, None]
            )
            first = _to_cache(first, k_scale, LIMIT, HAS_K_SCALE, TOKEN_SCALES)
            second = _to_cache(second, k_scale, LIMIT, HAS_K_SCALE, TOKEN_SCALES)
            rest = _to_cache(rest, k_scale, LIMIT, HAS_K_SCALE, TOKEN_SCALES)
            tl.store(target + half[None, :], first.to(kind), mask=mask)
            tl.store(target + HALF + half[None, :], second.to(kind), mask=mask)
            tl.store(target + rest_index[None, :], rest.to(kind), mask=rest_mask)

            dims = tl.arange(0, BLOCK_D)
            dim_mask = head_mask[:, None] & (dims < HEAD_DIM)[None, :]
            v = tl.load(
                v_ptr + (token * stride_vt + head * stride_vh)[:, None] + dims[None, :],
                mask=dim_mask,
                other=0.0,
            ).to(tl.float32)
            if TOKEN_SCALES:
                highest = tl.max(tl.abs(v), 1)
                at = block * stride_vsb + head * stride_vsh + offset
                tl.store(v_scale_ptr + at, highest / LIMIT, mask=head_mask)
                v_scale = tl.where(highest > 0, highest / LIMIT, 1.0)
            v = _to_cache(v, v_scale, LIMIT, HAS_V_SCALE, TOKEN_SCALES)
            target = (
                v_cache_ptr
                + (block * stride_vcb + head * stride_vch + offset * stride_vct)[:, None]
            )
            tl.store(target + dims[None, :], v.to(kind), mask=dim_mask)


def _limit(dtype: torch.dtype) -> float:
    """The greatest value of a quantized cache's codes; 0 for others."""
    if dtype == torch.int8:
        return INT8_LIMIT
    return torch.finfo(dtype).max if dtype in FP8_DTYPES else 0.0


def _launch(
    q, k, v, positions, cos_sin_cache, slot_mapping, k_cache, v_cache,
    q_weight, k_weight, eps, k_scale, v_scale, key_min, key_max,
):  # fmt: skip
    for name, tensor in (("q", q), ("k", k), ("v", v), ("cos_sin_cache", cos_sin_cache)):
        check_last_contiguous(name, tensor)
    for name, tensor in (("key_min", key_min), ("key_max", key_max)):
        check(tensor is None or tensor.is_contiguous(), f"{name} must be contiguous")
    check_fp8_support(q, k_cache)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    half = cos_sin_cache.shape[1] // 2
    heads = min(_HEADS, padded(num_heads, 1))
    parts = -(-num_heads // heads) + -(-num_kv_heads // heads)
    _kernel[(num_tokens, parts)](
        q, k, v, positions, cos_sin_cache, slot_mapping, k_cache, v_cache, out,
        q_weight, k_weight, k_scale, v_scale, key_min, key_max, eps,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos_sin_cache.stride(0),
        *k_cache.stride()[:3], *v_cache.stride()[:3],
        *scale_strides(k_scale), *scale_strides(v_scale),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, HALF=half,
        BLOCK_HALF=padded(half, 1), BLOCK_REST=padded(head_dim - 2 * half, 1),
        BLOCK_D=padded(head_dim, 1), HEADS=heads, HAS_NORM=q_weight is not None,
        HAS_K_SCALE=k_scale is not None and k_scale.dim() == 1,
        HAS_V_SCALE=v_scale is not None and v_scale.dim() == 1,
        TOKEN_SCALES=k_cache.dtype == torch.int8,
        HAS_BOUNDS=key_min is not None, LIMIT=_limit(k_cache.dtype),
        num_warps=_NUM_WARPS,
    )  # fmt: skip
    return out
