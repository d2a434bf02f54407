"""Skinny GEMM in every weight format against float64."""

import pytest
import torch

import harness
from tandem_kernels import quantize_fp8, quantize_int4, quantize_int8, skinny_gemm
from tandem_kernels.skinny_gemm import skinny_gemm_reference

FORMATS = {
    "int8": quantize_int8,
    "fp8": quantize_fp8,
    "int8 groups of 64": lambda weight: quantize_int8(weight, 64),
    "fp8 groups of 128": lambda weight: quantize_fp8(weight, 128),
    "int4 groups of 32": lambda weight: quantize_int4(weight, 32),
    "int4 groups of 128": lambda weight: quantize_int4(weight, 128),
}


# Rows, outputs, inputs; 1, 17, 63, 64, 65, 300 and 1000 among them.
SIZES = [(1, 70, 200), (17, 64, 640), (64, 130, 96), (2, 1, 1), (63, 65, 300), (0, 17, 64),
         (1, 17, 1000)]  # fmt: skip


def check(x, weight, bias, **quantized):
    placed = {k: v.to(harness.DEVICE) if torch.is_tensor(v) else v for k, v in quantized.items()}
    out = skinny_gemm(x, weight.to(harness.DEVICE), bias=bias, **placed)

    exact_weight = weight if quantized else harness.wide(weight)
    exact = skinny_gemm_reference(
        harness.wide(x), exact_weight.cpu(), bias=harness.wide(bias), compute_dtype=torch.float64,
        **quantized,
    )  # fmt: skip
    torchs = skinny_gemm_reference(
        x.cpu(), weight.cpu(), bias=None if bias is None else bias.cpu(), compute_dtype=x.dtype,
        **quantized,
    )  # fmt: skip
    # Sums of k products in float32, whose order differs from torch's.
    floor = 1e-6 * x.shape[1] ** 0.5 if x.dtype == torch.float32 else None
    harness.assert_as_exact_as_torch(out, exact, torchs, floor=floor)


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def check_float_weights(m, n, k, dtype):
    x, weight = harness.randn(m, k, dtype=dtype), harness.randn(n, k, dtype=dtype, seed=1)
    bias = harness.randn(n, dtype=dtype, seed=2) if m > 1 else None

    check(x, weight, bias)


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [1, 17, 64])
def check_quantized_weights(rows, kind, dtype):
    x, bias = harness.randn(rows, 384, dtype=dtype), harness.randn(70, dtype=dtype, seed=2)
    weight = FORMATS[kind](harness.randn(70, 384, seed=1).cpu())
    fields = {"scales": weight.scales}
    if weight.group_size is not None:
        fields |= {"group_size": weight.group_size}
    if weight.zeros is not None:
        fields |= {"zeros": weight.zeros}

    check(x, weight.data, bias, **fields)
