"""Paged decode attention against float64."""

import pytest
import torch

import harness
from tandem_kernels import paged_decode
from tandem_kernels.paged_decode import paged_decode_attention, paged_decode_attention_reference

LENS = (1, 300, 0, 17, 63, 64, 65)


def check(lens, heads, kv_heads, head_dim, dtype, *, rows=1, kv_dtype=None, **options):
    cache = harness.paged_cache(lens, kv_heads, head_dim, dtype, seed=rows)
    k_scale = v_scale = None
    if kv_dtype is not None:
        cache = (cache[0].to(kv_dtype), cache[1].to(kv_dtype), *cache[2:])
        k_scale = torch.linspace(0.5, 1.5, kv_heads, device=harness.DEVICE)
        v_scale = torch.linspace(1.5, 0.5, kv_heads, device=harness.DEVICE)
    q = harness.randn(len(lens), rows, heads, head_dim, dtype=dtype)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    out, lse = paged_decode_attention(
        q, *cache, scale=head_dim**-0.5, return_lse=True, **options, **scales
    )

    scales = {name: harness.wide(scale) for name, scale in scales.items()}
    exact, exact_lse = paged_decode_attention_reference(
        harness.wide(q), *map(harness.wide, cache), scale=head_dim**-0.5, **options, **scales
    )
    torchs, torchs_lse = paged_decode_attention_reference(
        q.cpu(), *(t.cpu() for t in cache), scale=head_dim**-0.5, compute_dtype=dtype,
        **options, **scales,
    )  # fmt: skip
    harness.assert_as_exact_as_torch(out, exact, torchs)
    harness.assert_as_exact_as_torch(lse, exact_lse, torchs_lse, floor=4e-6, what="lse")


@harness.AWKWARD
def check_awkward_shapes(case):
    check(case.lens, case.heads, case.kv_heads, case.head_dim, case.dtype)


@pytest.mark.parametrize("rows", [2, 5])
def check_several_query_rows_see_a_staircase(rows):
    check((1, 300, 0, 17, 64, 65, 67), 4, 2, 64, torch.float32, rows=rows)


@pytest.mark.parametrize("window", [1, 40, 64, 200])
def check_sliding_window(window):
    check(LENS, 4, 2, 64, torch.float16, rows=2, sliding_window=window)


def check_soft_cap():
    check(LENS, 4, 2, 64, torch.float32, rows=2, soft_cap=2.0)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def check_fp8_cache(kv_dtype):
    check(LENS, 4, 2, 64, torch.bfloat16, kv_dtype=kv_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "head_dim", "window"), [(4, 64, None), (14, 80, 40)])
def check_int8_cache(dtype, heads, head_dim, window):
    options = {"scale": head_dim**-0.5, "sliding_window": window}
    *cache, tables, lens = harness.paged_cache(LENS, 2, head_dim, torch.float32)
    (k, k_scale, k_exact), (v, v_scale, v_exact) = map(harness.int8_cache, cache)
    q = harness.randn(len(LENS), 2, heads, head_dim, dtype=dtype)

    out = paged_decode_attention(q, k, v, tables, lens, k_scale=k_scale, v_scale=v_scale, **options)

    exact, _ = paged_decode_attention_reference(
        harness.wide(q), k_exact, v_exact, tables.cpu(), lens.cpu(), **options
    )
    torchs, _ = paged_decode_attention_reference(
        q.cpu(), k_exact.to(dtype), v_exact.to(dtype), tables.cpu(), lens.cpu(),
        compute_dtype=dtype, **options,
    )  # fmt: skip
    harness.assert_as_exact_as_torch(out, exact, torchs)


def check_one_long_sequence_is_split():
    check((1000,), 8, 1, 128, torch.float16)


@pytest.mark.parametrize("target", [1, 3, 30])
def check_any_number_of_splits_gives_the_same_attention(target, monkeypatch):
    monkeypatch.setattr(paged_decode, "num_processors", lambda tensor: target)

    check((300, 1, 0, 64), 4, 2, 32, torch.float32)


def check_more_sequences_than_one_planning_chunk(monkeypatch):
    monkeypatch.setattr(paged_decode, "PLAN_CHUNK", 4)

    check((5, 70, 0, 1, 130, 64, 3, 0, 200), 2, 1, 32, torch.float32)


def check_empty_batch():
    check((), 2, 1, 32, torch.float32)
