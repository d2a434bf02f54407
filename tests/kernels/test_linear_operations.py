"""Norm, SwiGLU, quantized linears, block copies and warm-up on the CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_kernels import (
    EngineShapes,
    KernelArgumentError,
    QuantizedWeight,
    add_rms_norm,
    dequantize,
    kv_block_copy,
    kv_block_gather,
    kv_block_scatter,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
    skinny_gemm,
    swiglu,
    warm_up,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_add_rms_norm_normalises_the_rounded_sum(dtype):
    x, residual = (torch.randn(3, 40).to(dtype) for _ in range(2))
    weight = torch.rand(40).to(dtype)

    normed, summed = add_rms_norm(x, residual, weight, 1e-5)

    assert torch.equal(summed, x + residual)
    wide = summed.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(normed.double(), expected, rtol=tolerance, atol=tolerance)


def test_without_a_residual_x_is_the_residual():
    x = torch.randn(2, 8)

    normed, summed = add_rms_norm(x, None, torch.ones(8), 0.0)

    assert summed is x
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(2))


def test_swiglu_is_silu_of_the_first_half_times_the_second():
    x = torch.randn(2, 3, 10, dtype=torch.float64)

    gate, up = x[..., :5], x[..., 5:]
    torch.testing.assert_close(swiglu(x), gate * torch.sigmoid(gate) * up)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 9), groups=st.integers(1, 3), group_size=st.sampled_from([32, 64, 128]))
def test_quantized_weights_are_within_half_a_step(n, groups, group_size):
    weight = torch.randn(n, groups * group_size)

    int8, int4 = quantize_int8(weight), quantize_int4(weight, group_size)

    assert bool(((dequantize(int8) - weight).abs() <= int8.scales[:, None] * 0.5001).all())
    error = (dequantize(int4) - weight).abs().view(n, groups, group_size)
    assert bool((error <= int4.scales[..., None] * 1.0001).all())  # code and zero point round
    relative = (dequantize(quantize_fp8(weight)) - weight).abs() / weight.abs()
    assert float(relative[weight.abs() > 0.05].max()) <= 2**-4 + 1e-3


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_fp8, quantize_int4])
def test_quantized_linear_is_linear_with_the_dequantized_weight(quantize):
    weight = quantize(torch.randn(6, 256))
    x, bias = torch.randn(5, 256), torch.randn(6)

    out = skinny_gemm(
        x, weight.data, bias=bias, scales=weight.scales, zeros=weight.zeros,
        group_size=weight.group_size,
    )  # fmt: skip

    torch.testing.assert_close(out, x @ dequantize(weight).T + bias, rtol=1e-4, atol=1e-4)


def test_blocks_travel_through_gather_scatter_and_copy():
    cache = torch.randn(6, 2, 64, 4)
    before = cache.clone()

    taken = kv_block_gather(cache, torch.tensor([5, 2]))
    kv_block_scatter(taken, cache, torch.tensor([0, -1]))
    kv_block_copy(cache, torch.tensor([1]), torch.tensor([3]))

    assert torch.equal(taken, before[[5, 2]])
    assert torch.equal(cache, before[[5, 1, 2, 1, 4, 5]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: add_rms_norm(torch.ones(2, 4), None, torch.ones(3), 0.1), "weight has shape"),
        (lambda: swiglu(torch.ones(2, 3)), "gate_up has 3 columns"),
        (lambda: swiglu(torch.ones(2, 4).long()), "gate_up has dtype int64"),
        (lambda: skinny_gemm(torch.ones(65, 8), torch.ones(2, 8)), "x has 65 rows"),
        (lambda: skinny_gemm(torch.ones(1, 8), torch.ones(2, 8).char()), "scales is None"),
        (lambda: quantize_int4(torch.ones(2, 8), 7), "group_size=7"),
        (
            lambda: kv_block_copy(torch.ones(3, 4), torch.tensor([0]), torch.tensor([0])),
            "share a block",
        ),
        (
            lambda: dequantize(QuantizedWeight(torch.ones(1, 4).byte(), torch.ones(1, 1))),
            "needs zeros and group_size",
        ),
        (lambda: swiglu(torch.ones(2, 4, device="meta")), "device meta has no kernels"),
    ],
)
def test_wrong_arguments_are_named_with_value_and_rule(call, message):
    with pytest.raises(KernelArgumentError, match=message):
        call()


def test_warm_up_names_every_variant_it_runs():
    shapes = EngineShapes(
        num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=32, intermediate_size=48,
        vocab_size=100, dtype=torch.float32, qk_norm=True, query_rows=(1, 4),
        skinny_linears=((8, 32),), page_scoring=True, device="cpu",
    )  # fmt: skip

    seconds = warm_up(shapes)

    assert "paged_decode_attention rows=4 window=None" in seconds
    assert "page_list_attention" in seconds
    assert "skinny_gemm 8x32 rows=64" in seconds
    assert all(value >= 0 for value in seconds.values())
