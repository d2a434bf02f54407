"""Argument checks of the kernels: what is wrong, its value, the rule, in one sentence.

Only metadata (shape, dtype, device, stride) is looked at, never a tensor's values, because reading
a value from a GPU would stall the stream and break CUDA graph capture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

BLOCK_SIZE = 64
"""Tokens per KV block; the block is also the tile of the attention kernels."""

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KV_DTYPES = (*FLOAT_DTYPES, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


class KernelArgumentError(ValueError):
    """An argument of a kernel breaks a rule; the message names argument, value and rule."""


def check_shape(
    name: str, tensor: torch.Tensor, expected: Sequence[int | None], meaning: str
) -> None:
    """Raise unless `tensor.shape` equals `expected`; None in `expected` admits any size."""
    shape = tensor.shape
    if len(shape) == len(expected):
        for size, wanted in zip(shape, expected, strict=True):
            if wanted is not None and size != wanted:
                break
        else:
            return
    wanted_text = ", ".join("any" if size is None else str(size) for size in expected)
    raise KernelArgumentError(
        f"{name} has shape {tuple(shape)}; expected {meaning} = ({wanted_text})"
    )


def check_dtype(name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise unless `tensor.dtype` is one of `allowed`."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise KernelArgumentError(
            f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}; use one of {names}"
        )


def check_same_device(first: str, tensor: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raise unless every other tensor lives on the device of `tensor`."""
    for name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise KernelArgumentError(
                f"{name} is on {other.device} and {first} on {tensor.device}; "
                "all tensors of a call must share one device"
            )


def check_last_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Raise unless the innermost dimension has stride 1 (kernels load it as a vector)."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise KernelArgumentError(
            f"{name} has stride {tensor.stride(-1)} in its last dimension; it must be 1 "
            "(call .contiguous())"
        )


def check(condition: bool, message: str) -> None:
    """Raise `KernelArgumentError(message)` unless `condition` holds."""
    if not condition:
        raise KernelArgumentError(message)


def check_heads(num_heads: int, num_kv_heads: int) -> int:
    """Return query heads per KV head; raise when they do not divide."""
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise KernelArgumentError(
            f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}; "
            "each KV head must serve the same number of query heads"
        )
    return num_heads // num_kv_heads


def check_paged_cache(
    k_cache: torch.Tensor, v_cache: torch.Tensor, head_dim: int, *, block_size: int = BLOCK_SIZE
) -> tuple[int, int]:
    """Check a KV cache pair `(num_blocks, num_kv_heads, 64, head_dim)`; return the first two."""
    check_shape(
        "k_cache",
        k_cache,
        (None, None, block_size, head_dim),
        "(num_blocks, num_kv_heads, block_size, head_dim)",
    )
    check_shape("v_cache", v_cache, tuple(k_cache.shape), "the shape of k_cache")
    check_dtype("k_cache", k_cache, KV_DTYPES)
    check_dtype("v_cache", v_cache, (k_cache.dtype,))
    check_last_contiguous("k_cache", k_cache)
    check_last_contiguous("v_cache", v_cache)
    return k_cache.shape[0], k_cache.shape[1]


def compute_dtype_of(*tensors: torch.Tensor | None) -> torch.dtype:
    """The dtype references accumulate in: float64 when any input is, else float32."""
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        return torch.float64
    return torch.float32


def check_fp8_support(tensor: torch.Tensor, *caches: torch.Tensor) -> None:
    """Raise where a GPU cannot convert a cache's fp8 format (e4m3 needs sm_89 or ROCm)."""
    if not tensor.is_cuda or torch.version.hip:
        return
    if any(cache.dtype == torch.float8_e4m3fn for cache in caches):
        check(
            torch.cuda.get_device_capability(tensor.device) >= (8, 9),
            f"float8_e4m3fn needs compute capability 8.9, {tensor.device} is older; "
            "use float8_e5m2",
        )
