"""What a layer's KV cache looks like for each number format, and how a CPU writes and reads it.

Rows of a flat cache count as everywhere: ``(block * num_kv_heads + head) * 64 + offset``.
"""

from __future__ import annotations

import torch

from tandem_kernels.int8_kv import SCALE_BYTES, codes_and_scales, quantize_tokens

BLOCK = 64
QUANTIZED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""``kv_cache_dtype`` by name; anything else is the model's own type."""
_FP8_LIMIT = torch.finfo(torch.float8_e4m3fn).max

Pair = tuple[torch.Tensor, torch.Tensor]


def token_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one token of one KV head, K or V alone."""
    return head_dim + SCALE_BYTES if dtype == torch.int8 else head_dim * dtype.itemsize


def allocate(
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    file: str | None = None,
) -> list[Pair]:
    """K and V of each layer, zeroed; an int8 cache holds its scales, see `tandem_kernels.int8_kv`.

    Args:
        file: Memory of the host that other processes map too; its size must be all layers'.

    Raises:
        RuntimeError: there is no such memory.
    """
    width = head_dim + SCALE_BYTES if dtype == torch.int8 else head_dim
    shape = (num_blocks, num_kv_heads, BLOCK, width)
    if file is None:
        made = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * num_layers)]
    else:
        size = 2 * num_layers * num_blocks * num_kv_heads * BLOCK * token_bytes(head_dim, dtype)
        flat = torch.from_file(file, shared=True, size=size, dtype=torch.uint8)
        made = [part.view(dtype).view(shape) for part in flat.chunk(2 * num_layers)]
    return list(zip(made[::2], made[1::2], strict=True))


def opened(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The values or codes ``(num_blocks, num_kv_heads, 64, head_dim)``, and the tokens' scales."""
    return codes_and_scales(cache) if cache.dtype == torch.int8 else (cache, None)


def write_rows(cache: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Store ``(num_rows, head_dim)``; returns them as reading gives them back, in float32.

    What an unquantized cache rounds to 16 bits is returned unrounded: nobody tells the difference
    in chunks of a prompt apart, where codes of 8 bits would.
    """
    if cache.dtype == torch.int8:
        codes, scales = codes_and_scales(cache)
        made, factors = quantize_tokens(values.float())
        boxes, offsets = rows // BLOCK, rows % BLOCK
        codes.flatten(0, 1)[boxes, offsets] = made
        scales.flatten(0, 1)[boxes, offsets] = factors
        return made.float() * factors[:, None]
    flat = cache.view(-1, cache.shape[-1])
    if cache.dtype == torch.float8_e4m3fn:
        stored = values.float().clamp(-_FP8_LIMIT, _FP8_LIMIT).to(cache.dtype)
        flat.view(torch.uint8).index_copy_(0, rows, stored.view(torch.uint8))
        return stored.float()
    flat.index_copy_(0, rows, values.to(cache.dtype))
    return values.float()


def read_rows(cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``(num_rows, head_dim)`` in float32."""
    if cache.dtype == torch.int8:
        codes, scales = codes_and_scales(cache)
        boxes, offsets = rows // BLOCK, rows % BLOCK
        read = codes.flatten(0, 1)[boxes, offsets].float()
        return read * scales.flatten(0, 1)[boxes, offsets][:, None]
    flat = cache.view(-1, cache.shape[-1])
    if cache.dtype == torch.float8_e4m3fn:
        return flat.view(torch.uint8).index_select(0, rows).view(cache.dtype).float()
    return flat.index_select(0, rows).float()
