"""RMSNorm, SwiGLU, RoPE with cache write, and block copies against float64."""

import pytest
import torch

import harness
from tandem_kernels import (
    add_rms_norm,
    kv_block_copy,
    kv_block_gather,
    kv_block_scatter,
    qk_norm_rope_write,
    reset_page_bounds,
    rope_table,
    swiglu,
)
from tandem_kernels.int8_kv import codes_and_scales
from tandem_kernels.qk_norm_rope import qk_norm_rope_write_reference
from tandem_kernels.rms_norm import add_rms_norm_reference
from tandem_kernels.swiglu import swiglu_reference


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (17, 63), (3, 65), (64, 300), (2, 2, 896), (5, 1000), (0, 64)], ids=str
)
def check_add_rms_norm(shape, dtype):
    x = harness.randn(*shape, dtype=dtype)
    residual = harness.randn(*shape, dtype=dtype, seed=1)
    weight = harness.randn(shape[-1], dtype=dtype, seed=2)
    for other in (None, residual):
        normed, summed = add_rms_norm(x, other, weight, 1e-6)

        rounded = x.cpu() if other is None else x.cpu() + other.cpu()
        assert torch.equal(summed.cpu(), rounded)
        exact, _ = add_rms_norm_reference(harness.wide(rounded), None, harness.wide(weight), 1e-6)
        torchs, _ = add_rms_norm_reference(rounded, None, weight.cpu(), 1e-6, compute_dtype=dtype)
        harness.assert_as_exact_as_torch(normed, exact, torchs)


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 2), (17, 126), (65, 130), (3, 160), (2, 2, 2600), (0, 64)], ids=str
)
def check_swiglu(shape, dtype):
    x = harness.randn(*shape, dtype=dtype, scale=3)

    out = swiglu(x)

    torchs = swiglu_reference(x.cpu(), compute_dtype=dtype)
    harness.assert_as_exact_as_torch(out, swiglu_reference(harness.wide(x)), torchs)


def _rope_case(
    heads, kv_heads, head_dim, dtype,
    *, tokens=7, rotary_dim=None, scaling=None, slots=None, **options,
):  # fmt: skip
    """Run kernel, float64 and torch on one case; return their (q, k_cache, v_cache, bounds)."""
    fused = harness.randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
    kv_dtype = options.pop("kv_dtype", dtype)
    table = rope_table(rotary_dim or head_dim, 400, 1e4, scaling)
    positions = torch.tensor([0, 399, 5, 6, 7, 63, 64]).repeat(-(-tokens // 7))[:tokens]
    if slots is None:
        slots = torch.tensor([64, 0, -1, 127, 130, 131, 132])[:tokens]
    num_blocks = max(4, -(-tokens // 64) + 1)
    results = []
    for kind in ("kernel", "float64", "torch"):
        place = harness.wide if kind == "float64" else (lambda t: t if t is None else t.cpu())
        if kind == "kernel":
            place = lambda t: t if t is None else t.to(harness.DEVICE)  # noqa: E731
        cache_dtype = torch.float64 if kind == "float64" else kv_dtype
        cache = [
            torch.zeros(
                num_blocks, kv_heads, 64, head_dim, dtype=cache_dtype, device=place(slots).device
            )
            for _ in range(2)
        ]
        extra = {name: place(value) for name, value in options.items()}
        bounds = [
            torch.zeros(num_blocks, kv_heads, head_dim, device=place(slots).device)
            for _ in range(2)
        ]
        if kind == "float64":
            bounds = [bound.double() for bound in bounds]
        reset_page_bounds(*bounds, torch.arange(num_blocks, device=bounds[0].device))
        call = qk_norm_rope_write if kind == "kernel" else qk_norm_rope_write_reference
        if kind == "torch":
            extra["compute_dtype"] = dtype
        out = call(
            place(q), place(k), place(v), positions=place(positions), cos_sin_cache=place(table),
            slot_mapping=place(slots), k_cache=cache[0], v_cache=cache[1],
            key_min=bounds[0], key_max=bounds[1], **extra,
        )  # fmt: skip
        results.append((out, *cache, *bounds))
    return results


def assert_rope_case(got, exact, torchs):
    names = ("q", "k_cache", "v_cache", "key_min", "key_max")
    for name, ours, want, theirs in zip(names, got, exact, torchs, strict=True):
        harness.assert_as_exact_as_torch(ours, want, theirs, what=name)


def norm_weights(head_dim, dtype):
    return {
        "q_weight": harness.randn(head_dim, dtype=dtype, seed=3),
        "k_weight": harness.randn(head_dim, dtype=dtype, seed=4),
    }


@harness.AWKWARD
def check_qk_norm_rope_write(case):
    """The lengths of a case up to 65 as numbers of tokens, in shuffled slots."""
    for tokens in (length for length in case.lens if length <= 65):
        order = torch.randperm(64 * (1 + tokens // 64), generator=torch.Generator().manual_seed(1))
        results = _rope_case(
            case.heads, case.kv_heads, case.head_dim, case.dtype, tokens=tokens,
            slots=order[:tokens], **norm_weights(case.head_dim, case.dtype),
        )  # fmt: skip

        assert_rope_case(*results)


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
def check_rotation_of_a_part_of_the_head(dtype):
    assert_rope_case(*_rope_case(8, 1, 80, dtype, rotary_dim=20, **norm_weights(80, dtype)))


def check_more_tokens_than_a_block_holds():
    assert_rope_case(
        *_rope_case(2, 1, 64, torch.float16, tokens=300, slots=torch.arange(300).flip(0))
    )


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 100,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100},
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALINGS)
def check_every_scaling_of_the_frequencies(kind):
    assert_rope_case(*_rope_case(4, 2, 64, torch.bfloat16, scaling=SCALINGS[kind]))


def check_rope_without_norm_leaves_padding_slots_alone():
    got, exact, torchs = _rope_case(4, 2, 64, torch.float32)

    harness.assert_as_exact_as_torch(got[0], exact[0], torchs[0])
    assert int((got[1] != 0).any(-1).any(1).sum()) == 6


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def check_fp8_write_divides_by_the_scale_and_saturates(kv_dtype):
    scale = torch.tensor([0.5, 1e-5])

    got, exact, _ = _rope_case(
        4, 2, 64, torch.float32, kv_dtype=kv_dtype, k_scale=scale, v_scale=scale
    )

    limit = torch.finfo(kv_dtype).max
    for ours, want in zip(got[1:3], exact[1:3], strict=True):
        divided = (want / scale.double()[:, None, None]).clamp(-limit, limit)
        rounding = 2.0 ** -(3 if kv_dtype == torch.float8_e4m3fn else 2) / 2
        error = (ours.cpu().double() - divided).abs()
        assert bool((error <= divided.abs() * rounding + 2.0**-10).all())
        assert ours.float().abs().max() == limit


@pytest.mark.parametrize("rotary_dim", [64, 20])
def check_int8_write_gives_each_token_its_scale(rotary_dim):
    fused = harness.randn(7, 8, 64, scale=3)
    fused[3, 6:] = 0  # a value of zeros has the scale 0
    q, k, v = fused.split([4, 2, 2], dim=1)
    arguments = {
        "positions": torch.arange(7),
        "cos_sin_cache": rope_table(rotary_dim, 400, 1e4, None),
        "slot_mapping": torch.tensor([64, 0, -1, 127, 130, 131, 132]),
    }
    arguments = {name: value.to(harness.DEVICE) for name, value in arguments.items()}
    stored = [torch.zeros(4, 2, 64, 68, dtype=torch.int8, device=harness.DEVICE) for _ in "kv"]
    (keys, k_scale), (values, v_scale) = map(codes_and_scales, stored)
    qk_norm_rope_write(
        q, k, v, **arguments, k_cache=keys, v_cache=values, k_scale=k_scale, v_scale=v_scale
    )

    exact = [torch.zeros(4, 2, 64, 64, dtype=torch.float64) for _ in "kv"]
    qk_norm_rope_write_reference(
        *map(harness.wide, (q, k, v)), **{n: t.cpu() for n, t in arguments.items()},
        k_cache=exact[0], v_cache=exact[1],
    )  # fmt: skip
    for codes, scales, want in ((keys, k_scale, exact[0]), (values, v_scale, exact[1])):
        highest = want.abs().amax(-1)
        assert torch.allclose(scales.cpu().double(), highest / 127, rtol=1e-6, atol=0)
        error = codes.cpu().double() * scales.cpu().double()[..., None] - want
        assert bool((error.abs() <= 0.5001 * highest[..., None] / 127).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32], ids=str)
@pytest.mark.parametrize("tail", [(2, 64, 32), (3,)], ids=str)
def check_blocks_are_gathered_scattered_and_copied(dtype, tail):
    cache = harness.randn(9, *tail).to(dtype)
    before = cache.clone()
    ids = torch.tensor([4, 0, -1, 7], device=harness.DEVICE)
    kept = ids >= 0

    gathered = kv_block_gather(cache, ids)
    same = gathered[kept].float() == before[ids[kept]].float()
    assert bool(same.all())

    target = torch.zeros_like(cache)
    kv_block_scatter(gathered, target, ids)
    assert torch.equal(target[ids[kept]].float(), before[ids[kept]].float())
    assert not target[[1, 2, 3, 5, 6, 8]].float().any()

    kv_block_copy(cache, ids, torch.tensor([1, 2, 3, -1], device=harness.DEVICE))
    assert torch.equal(cache[[1, 2]].float(), before[[4, 0]].float())
    assert torch.equal(cache[[0, 3, 4, 5, 6, 7, 8]].float(), before[[0, 3, 4, 5, 6, 7, 8]].float())
