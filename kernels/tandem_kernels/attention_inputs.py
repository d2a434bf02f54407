"""What every attention over the paged KV cache checks of its arguments, and how references read it.

The shapes are those of paged_decode.
"""

from __future__ import annotations

import torch

from .checks import (
    FLOAT_DTYPES,
    FP8_DTYPES,
    check,
    check_dtype,
    check_heads,
    check_last_contiguous,
    check_paged_cache,
    check_same_device,
    check_shape,
)

INTEGER_DTYPES = (torch.int32, torch.int64)


def gather_blocks(
    cache: torch.Tensor, blocks: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None
) -> torch.Tensor:
    """Copy blocks out of a cache as `(len(blocks), num_kv_heads, 64, head_dim)` in `dtype`.

    `scale` is that of each KV head, or of each token of an int8 cache.
    """
    if cache.dtype in FP8_DTYPES:
        gathered = cache.view(torch.uint8).index_select(0, blocks).view(cache.dtype).to(dtype)
    else:
        gathered = cache.index_select(0, blocks).to(dtype)
    if scale is None:
        return gathered
    if scale.dim() == 3:
        return gathered * scale.index_select(0, blocks).to(dtype)[..., None]
    return gathered * scale.to(dtype)[:, None, None]


def check_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    num_seqs: int,
) -> None:
    """Checks every attention over the paged cache shares; q is `(..., num_heads, head_dim)`."""
    check_dtype("q", q, FLOAT_DTYPES)
    _, num_kv_heads = check_paged_cache(k_cache, v_cache, q.shape[-1])
    check_heads(q.shape[-2], num_kv_heads)
    check_shape("block_tables", block_tables, (num_seqs, None), "(num_seqs, max_blocks)")
    check_dtype("block_tables", block_tables, INTEGER_DTYPES)
    check_shape("seq_lens", seq_lens, (num_seqs,), "(num_seqs,)")
    check_dtype("seq_lens", seq_lens, INTEGER_DTYPES)
    check_same_device(
        "q", q, k_cache=k_cache, v_cache=v_cache, block_tables=block_tables, seq_lens=seq_lens
    )


def check_attention_options(
    k_cache: torch.Tensor,
    sliding_window: int | None,
    soft_cap: float | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Checks of window, cap and the scales of quantized caches."""
    check(
        sliding_window is None or sliding_window > 0,
        f"sliding_window={sliding_window} must be positive; use None for full attention",
    )
    check(
        soft_cap is None or soft_cap > 0,
        f"soft_cap={soft_cap} must be positive; use None for none",
    )
    check_scales(k_cache, k_scale, v_scale)


def check_scales(
    k_cache: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None
) -> None:
    """An int8 cache needs a scale per token, an fp8 cache may have one per head, others none."""
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if k_cache.dtype == torch.int8:
            check(
                scale is not None,
                f"{name} is absent but the cache is int8; give the scales of its tokens "
                "(int8_kv.codes_and_scales)",
            )
            assert scale is not None
            check_shape(name, scale, tuple(k_cache.shape[:3]), "(num_blocks, num_kv_heads, 64)")
            check_last_contiguous(name, scale)
        elif scale is not None:
            check_shape(name, scale, (k_cache.shape[1],), "(num_kv_heads,)")
            check(
                k_cache.dtype in FP8_DTYPES,
                f"{name} is given but the cache is {k_cache.dtype}; scales belong to fp8 and "
                "int8 caches",
            )


def scale_strides(scale: torch.Tensor | None) -> tuple[int, int]:
    """Elements from one block and one KV head to the next; 0 where scales are not of tokens."""
    return (scale.stride(0), scale.stride(1)) if scale is not None and scale.dim() == 3 else (0, 0)
