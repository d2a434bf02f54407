"""How an int8 KV cache lies in memory: a block's codes, then one float32 scale per token.

    value = code * scale,   scale = max |value| of the token's head / 127

A cache is one int8 tensor `(num_blocks, num_kv_heads, 64, head_dim + 4)`, contiguous, whose last
two dimensions are 64 * head_dim codes followed by 64 scales: a (block, head) pair stays one box
that travels as it is, and codes stay tiles of `(64, head_dim)` that begin at 16 bytes.
A token's codes depend on nothing but its own values, so a block is the same whoever filled it and
in whatever chunks.
"""

from __future__ import annotations

import torch

from .checks import BLOCK_SIZE

SCALE_BYTES = 4
"""What a token of a head takes beside its codes."""
LIMIT = 127.0


def codes_and_scales(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a cache: codes `(num_blocks, num_kv_heads, 64, head_dim)`, scales `(..., 64)`."""
    head_dim = cache.shape[-1] - SCALE_BYTES
    boxes = cache.view(*cache.shape[:2], BLOCK_SIZE * cache.shape[-1])
    codes = boxes[..., : BLOCK_SIZE * head_dim].view(*cache.shape[:2], BLOCK_SIZE, head_dim)
    return codes, boxes[..., BLOCK_SIZE * head_dim :].view(torch.float32)


def quantize_tokens(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of `(..., head_dim)` as int8, and scales `(...)` in the dtype of the values."""
    scales = values.abs().amax(-1) / LIMIT
    divisor = torch.where(scales > 0, scales, 1)[..., None]
    codes = torch.floor(values / divisor + 0.5).clamp(-LIMIT, LIMIT)
    return codes.to(torch.int8), scales
