# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return"
"""Gather, scatter and copy whole KV blocks.

    gather:   out[i] = cache[block_ids[i]]
    scatter:  cache[block_ids[i]] = source[i]
    copy:     cache[target_ids[i]] = cache[source_ids[i]]

Shapes: cache `(num_blocks, ...)` contiguous; block_ids `(n,)` int32 or int64; out and source
`(n, ...)`. Bytes moved: each block read once and written once. A negative id is padding of a
captured graph: nothing is written for it (gather leaves that row undefined).
The kernels use few programs (see PROGRAMS), so that a running forward pass keeps its processors:
these copies feed transfers, which the network bounds far below the memory's bandwidth.
"""

from __future__ import annotations

import torch

from .checks import KernelArgumentError, check, check_dtype, check_same_device, check_shape
from .dispatch import runs_on_triton, tl, triton

ID_DTYPES = (torch.int32, torch.int64)


def kv_block_gather(
    cache: torch.Tensor, block_ids: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Copy blocks out of a cache into `out` (allocated when None). Raises KernelArgumentError."""
    _check(cache, block_ids=block_ids)
    shape = (block_ids.shape[0], *cache.shape[1:])
    if out is None:
        out = torch.empty(shape, dtype=cache.dtype, device=cache.device)
    else:
        check_shape("out", out, shape, "(n, *cache.shape[1:])")
        check_dtype("out", out, (cache.dtype,))
        check(out.is_contiguous(), "out is not contiguous; blocks are copied as flat bytes")
        check_same_device("cache", cache, out=out)
    if runs_on_triton(cache):
        _launch(cache, block_ids, out, None)
    else:
        kv_block_gather_reference(cache, block_ids, out)
    return out


def kv_block_scatter(source: torch.Tensor, cache: torch.Tensor, block_ids: torch.Tensor) -> None:
    """Write `source (n, ...)` into the cache's blocks. Ids must differ (not checked on a GPU)."""
    _check(cache, block_ids=block_ids)
    check_shape("source", source, (block_ids.shape[0], *cache.shape[1:]), "(n, *cache.shape[1:])")
    check_dtype("source", source, (cache.dtype,))
    check(source.is_contiguous(), "source is not contiguous; blocks are copied as flat bytes")
    check_same_device("cache", cache, source=source)
    if runs_on_triton(cache):
        _launch(source, None, cache, block_ids)
    else:
        kv_block_scatter_reference(source, cache, block_ids)


def kv_block_copy(cache: torch.Tensor, source_ids: torch.Tensor, target_ids: torch.Tensor) -> None:
    """Copy blocks within a cache. No target may also be a source (not checked on a GPU)."""
    _check(cache, source_ids=source_ids, target_ids=target_ids)
    check_shape("target_ids", target_ids, tuple(source_ids.shape), "the shape of source_ids")
    if runs_on_triton(cache):
        _launch(cache, source_ids, cache, target_ids)
    else:
        kv_block_copy_reference(cache, source_ids, target_ids)


def kv_block_gather_reference(
    cache: torch.Tensor, block_ids: torch.Tensor, out: torch.Tensor
) -> None:
    """out[i] = cache[block_ids[i]] in torch, as bytes so that fp8 caches work."""
    kept = (block_ids >= 0).nonzero().squeeze(-1)
    _flat(out)[kept] = _flat(cache)[block_ids[kept].long()]


def kv_block_scatter_reference(
    source: torch.Tensor, cache: torch.Tensor, block_ids: torch.Tensor
) -> None:
    """cache[block_ids[i]] = source[i] in torch."""
    kept = (block_ids >= 0).nonzero().squeeze(-1)
    _flat(cache)[block_ids[kept].long()] = _flat(source)[kept]


def kv_block_copy_reference(
    cache: torch.Tensor, source_ids: torch.Tensor, target_ids: torch.Tensor
) -> None:
    """cache[target_ids[i]] = cache[source_ids[i]] in torch; refuses overlapping ids."""
    kept = (source_ids >= 0) & (target_ids >= 0)
    sources, targets = source_ids[kept].long(), target_ids[kept].long()
    if bool(torch.isin(targets, sources).any()):
        raise KernelArgumentError("target_ids and source_ids share a block; copies run in parallel")
    _flat(cache)[targets] = _flat(cache)[sources]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.shape[0] == 0:
        return torch.empty((0, 1), dtype=torch.uint8, device=tensor.device)
    return tensor.view(tensor.shape[0], -1).view(torch.uint8)


def _check(cache: torch.Tensor, **ids: torch.Tensor) -> None:
    check(cache.dim() >= 2, f"cache has {cache.dim()} dimensions; expected (num_blocks, ...)")
    check(cache.is_contiguous(), "cache is not contiguous; blocks are copied as flat bytes")
    for name, tensor in ids.items():
        check_shape(name, tensor, (None,), "(n,)")
        check_dtype(name, tensor, ID_DTYPES)
    check_same_device("cache", cache, **ids)


# Programs of one copy (of an H200's 132 processors, 116 stay with the forward pass), and words of
# 8 bytes each program moves at a time. Untuned.
PROGRAMS = 16
_BLOCK = 1024
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_blocks"])
def _kernel(
    source_ptr, source_ids_ptr, target_ptr, target_ids_ptr, num_blocks, words_per_block,
    HAS_SOURCE_IDS: tl.constexpr, HAS_TARGET_IDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunks = (words_per_block + BLOCK - 1) // BLOCK
    work = tl.program_id(0)
    total = num_blocks * chunks
    for index in range(work, total, tl.num_programs(0)):
        row = index // chunks
        source = row.to(tl.int64)
        target = row.to(tl.int64)
        if HAS_SOURCE_IDS:
            source = tl.load(source_ids_ptr + row).to(tl.int64)
        if HAS_TARGET_IDS:
            target = tl.load(target_ids_ptr + row).to(tl.int64)
        word = (index % chunks) * BLOCK + tl.arange(0, BLOCK)
        if (source >= 0) & (target >= 0):
            mask = word < words_per_block
            values = tl.load(source_ptr + source * words_per_block + word, mask=mask, other=0)
            tl.store(target_ptr + target * words_per_block + word, values, mask=mask)


def _launch(source, source_ids, target, target_ids):
    ids = source_ids if source_ids is not None else target_ids
    num_blocks = ids.shape[0]
    if num_blocks == 0 or source.shape[0] == 0:
        return
    source_bytes, target_bytes = _flat(source), _flat(target)
    size = source_bytes.shape[1]
    words = torch.int64 if size % 8 == 0 else torch.uint8
    source_words, target_words = source_bytes.view(words), target_bytes.view(words)
    per_block = source_words.shape[1]
    programs = min(PROGRAMS, num_blocks * -(-per_block // _BLOCK))
    _kernel[(programs,)](
        source_words, source_ids, target_words, target_ids, num_blocks, per_block,
        HAS_SOURCE_IDS=source_ids is not None, HAS_TARGET_IDS=target_ids is not None,
        BLOCK=_BLOCK, num_warps=_NUM_WARPS,
    )  # fmt: skip
