"""Addresses beyond 2^31 elements: a pool of that size gives what a small copy of it gives.

The pools are mappings whose pages are mostly never touched, so they cost address space, not memory.
"""

import pytest
import torch

import harness
from tandem_kernels import (
    KernelArgumentError,
    add_rms_norm,
    key_list_attention,
    kv_block_copy,
    kv_block_gather,
    kv_block_scatter,
    page_list_attention,
    page_scores,
    paged_decode_attention,
    prefill_attention,
    qk_norm_rope_write,
    sample,
    skinny_gemm,
    snapkv_votes,
    swiglu,
)

HALF = 2**30  # elements between neighbours along the stretched dimension


def stretched(tensor, dim):
    """The same values, elements along `dim` 2^30 apart: the fourth lies beyond 2^31."""
    strides = list(tensor.stride())
    strides[dim] = HALF
    size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
    assert size > 2**31
    far = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
    far = far.as_strided(tensor.shape, strides)
    far.copy_(tensor)
    return far


TABLES = torch.tensor([[3, 1], [0, 3]], dtype=torch.int32, device=harness.DEVICE)
LENS = torch.tensor([70, 100], dtype=torch.int32, device=harness.DEVICE)


def small_caches():
    """Four blocks, four KV heads."""
    return [harness.randn(4, 4, 64, 16, dtype=torch.float16, seed=i) for i in range(2)]


def query(*shape):
    return harness.randn(*shape, 4, 16, dtype=torch.float16)


LISTED = torch.tensor([0, 1], dtype=torch.int32, device=harness.DEVICE).expand(2, 4, 2)
COUNTS = torch.full((2, 4), 2, dtype=torch.int32, device=harness.DEVICE)
STARTS = torch.tensor([0, 3, 5], dtype=torch.int32, device=harness.DEVICE)
ATTENTIONS = {
    "decode": lambda k, v: paged_decode_attention(query(2, 1), k, v, TABLES, LENS, scale=0.25),
    "prefill": lambda k, v: prefill_attention(query(5), k, v, TABLES, STARTS, LENS, scale=0.25),
    "pages": lambda k, v: page_list_attention(query(2), k, v, TABLES, LENS, LISTED, scale=0.25),
    "keys": lambda k, v: key_list_attention(
        query(2), k, v, TABLES, LENS, LISTED * 65, COUNTS, scale=0.25
    ),
    "votes": lambda k, v: snapkv_votes(query(2, 3), k, TABLES, LENS, scale=0.25),
}


@pytest.mark.parametrize("dim", [0, 1], ids=["far blocks", "far heads"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def check_attention_over_a_large_pool(attention, dim):
    small = small_caches()
    if (attention, dim) == ("decode", 1):
        with pytest.raises(KernelArgumentError, match="k_cache has stride 1073741824 between KV"):
            ATTENTIONS[attention](*(stretched(cache, dim) for cache in small))
        return

    out = ATTENTIONS[attention](*(stretched(cache, dim) for cache in small))

    assert torch.equal(out, ATTENTIONS[attention](*small))


@pytest.mark.parametrize("dim", [0, 1], ids=["far blocks", "far heads"])
def check_writes_into_a_large_pool(dim):
    small = small_caches()
    large = [stretched(cache, dim) for cache in small]
    slots = torch.tensor([3 * 64 + 5, 0, 130], device=harness.DEVICE)
    fused = harness.randn(3, 12, 16, dtype=torch.float16, seed=4)
    for caches in (small, large):
        q, k, v = fused.split([4, 4, 4], dim=1)
        qk_norm_rope_write(
            q, k, v, positions=slots, cos_sin_cache=harness.randn(200, 16), slot_mapping=slots,
            k_cache=caches[0], v_cache=caches[1],
        )  # fmt: skip

    assert torch.equal(large[0], small[0])
    assert torch.equal(large[1], small[1])


def check_blocks_of_a_large_pool_are_copied():
    size = 1001  # odd, so that blocks are copied byte by byte and an index is an element
    num_blocks = 2**31 // size + 4
    pool = torch.empty(num_blocks, size, dtype=torch.uint8, device=harness.DEVICE)
    first, last = torch.tensor([1, 0]), torch.tensor([num_blocks - 1, num_blocks - 2])
    first, last = first.to(harness.DEVICE), last.to(harness.DEVICE)
    blocks = torch.arange(2 * size, device=harness.DEVICE).view(2, size).to(torch.uint8)

    kv_block_scatter(blocks, pool, last)
    kv_block_copy(pool, last, first)

    assert torch.equal(kv_block_gather(pool, last), blocks)
    assert torch.equal(pool[:2], blocks.flip(0))


def check_rows_far_apart():
    """Rows of activations, logits and weights."""
    x = harness.randn(4, 64, dtype=torch.float16)
    weight = harness.randn(64, dtype=torch.float16)
    options = {
        "temperature": torch.ones(4), "seeds": torch.arange(4), "positions": torch.arange(4),
        "top_k": torch.full((4,), 9),
    }  # fmt: skip
    options = {name: value.to(harness.DEVICE) for name, value in options.items()}
    far = stretched(x, 0)

    assert torch.equal(add_rms_norm(far, far, weight, 1e-6)[0], add_rms_norm(x, x, weight, 1e-6)[0])
    assert torch.equal(swiglu(far), swiglu(x))
    assert torch.equal(sample(far, **options).token_ids, sample(x, **options).token_ids)
    assert torch.equal(skinny_gemm(x, far), skinny_gemm(x, x))
    assert torch.equal(skinny_gemm(far, x), skinny_gemm(x, x))


def check_page_scores_of_a_large_pool():
    num_blocks = 2**31 // (4 * 16) + 4
    bounds = torch.empty(num_blocks, 4, 16, device=harness.DEVICE)
    bounds[-4:] = small = harness.randn(4, 4, 16)
    tables = TABLES + (num_blocks - 4)

    scores = page_scores(query(2), bounds, bounds, tables, LENS)

    assert torch.equal(scores, page_scores(query(2), small, small, TABLES, LENS))
