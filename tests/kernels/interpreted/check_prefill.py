"""Chunked prefill attention against float64."""

import pytest
import torch

import harness
from tandem_kernels import prefill
from tandem_kernels.prefill import prefill_attention, prefill_attention_reference


def check(chunks, heads, kv_heads, head_dim, dtype, *, kv_dtype=None, **options):
    """chunks: per sequence (cached prefix, query rows)."""
    lens = [prefix + rows for prefix, rows in chunks]
    cache = harness.paged_cache(lens, kv_heads, head_dim, dtype, seed=1)
    scales = {}
    if kv_dtype is not None:
        cache = (cache[0].to(kv_dtype), cache[1].to(kv_dtype), *cache[2:])
        factors = torch.linspace(0.5, 1.5, kv_heads, device=harness.DEVICE)
        scales = {"k_scale": factors, "v_scale": factors.flip(0)}
    k_cache, v_cache, tables, seq_lens = cache
    starts = torch.tensor([0, *(rows for _, rows in chunks)]).cumsum(0).to(torch.int32)
    starts = starts.to(harness.DEVICE)
    q = harness.randn(int(starts[-1]), heads, head_dim, dtype=dtype)
    arguments = (q, k_cache, v_cache, tables, starts, seq_lens)
    out = prefill_attention(*arguments, scale=head_dim**-0.5, **options, **scales)

    scales = {name: scale.cpu() for name, scale in scales.items()}
    exact = prefill_attention_reference(
        *map(harness.wide, arguments), scale=head_dim**-0.5, **options,
        **{name: scale.double() for name, scale in scales.items()},
    )  # fmt: skip
    torchs = prefill_attention_reference(
        *(t.cpu() for t in arguments), scale=head_dim**-0.5, compute_dtype=dtype, **options,
        **scales,
    )  # fmt: skip
    harness.assert_as_exact_as_torch(out, exact, torchs)


RAGGED = ((0, 17), (64, 1), (3, 0), (0, 65), (63, 2), (237, 63), (0, 1))


@harness.AWKWARD
def check_awkward_shapes(case):
    """Contexts of awkward lengths, of which a chunk of up to 19 rows follows a cached prefix."""
    case = case.lighter()
    chunks = [(max(length - 19, 0), min(length, 19)) for length in case.lens]

    check(chunks, case.heads, case.kv_heads, case.head_dim, case.dtype)


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
def check_ragged_batch_with_cached_prefixes(dtype):
    check(RAGGED, 4, 2, 64, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("head_dim", "window"), [(64, None), (80, 70)])
def check_int8_cache(dtype, head_dim, window):
    options = {"scale": head_dim**-0.5, "sliding_window": window}
    lens = [prefix + rows for prefix, rows in RAGGED]
    *cache, tables, seq_lens = harness.paged_cache(lens, 2, head_dim, torch.float32)
    (k, k_scale, k_exact), (v, v_scale, v_exact) = map(harness.int8_cache, cache)
    starts = torch.tensor([0, *(rows for _, rows in RAGGED)]).cumsum(0).to(torch.int32)
    q = harness.randn(int(starts[-1]), 4, head_dim, dtype=dtype)
    rest = (tables, starts.to(harness.DEVICE), seq_lens)

    out = prefill_attention(q, k, v, *rest, k_scale=k_scale, v_scale=v_scale, **options)

    rest = tuple(tensor.cpu() for tensor in rest)
    exact = prefill_attention_reference(harness.wide(q), k_exact, v_exact, *rest, **options)
    torchs = prefill_attention_reference(
        q.cpu(), k_exact.to(dtype), v_exact.to(dtype), *rest, compute_dtype=dtype, **options
    )
    harness.assert_as_exact_as_torch(out, exact, torchs)


@pytest.mark.parametrize("window", [1, 20, 64, 130, 1000])
def check_sliding_window(window):
    check(((0, 17), (190, 70), (0, 1)), 2, 1, 64, torch.float32, sliding_window=window)


def check_soft_cap():
    check(RAGGED, 2, 1, 64, torch.float32, soft_cap=2.0)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def check_fp8_cache(kv_dtype):
    check(((64, 30), (0, 3)), 4, 2, 64, torch.bfloat16, kv_dtype=kv_dtype)


def check_more_sequences_than_one_planning_chunk(monkeypatch):
    monkeypatch.setattr(prefill, "PLAN_CHUNK", 4)

    check(((0, 1), (3, 40), (5, 0), (0, 2), (64, 33), (0, 3)), 1, 1, 32, torch.float32)


def check_one_prompt_of_a_thousand_tokens():
    check(((0, 1000),), 1, 1, 64, torch.bfloat16)
