"""What the kernel checks share: poisoned paged caches, the error rule, and the bf16 patch.

The error rule: a kernel's largest error against float64 may be at most twice that of the same
computation in torch at the kernel's dtype.
"""

import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from tandem_kernels.int8_kv import SCALE_BYTES, codes_and_scales, quantize_tokens

DEVICE = os.environ.get("TANDEM_KERNELS_DEVICE", "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADS = ((4, 2), (8, 1), (14, 2), (28, 4), (32, 8))
HEAD_DIMS = (64, 80, 96, 128)
LENGTHS = (0, 1, 17, 63, 64, 65, 300, 1000)


@dataclass(frozen=True)
class Case:
    """An awkward shape: heads and KV heads, head dim, dtype, lengths of a ragged batch."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    lens: tuple[int, ...]

    def lighter(self):
        """Without the longest contexts where there are many heads: one kernel program per head."""
        few = self.heads <= 14
        return replace(self, lens=tuple(n for n in self.lens if few or n <= 65))

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.heads}/{self.kv_heads} d{self.head_dim} {dtype} {self.lens}"


def awkward_cases():
    """20 cases: every pair of heads and head dim; each of them and each dtype with every length."""
    cases = []
    for i, (heads, kv_heads) in enumerate(HEADS):
        for j, head_dim in enumerate(HEAD_DIMS):
            lens = tuple(LENGTHS[(j + 2 * i + k) % 8] for k in (0, 2, 5))
            dtype = DTYPES[(i + j) % 3]
            cases.append(Case(heads, kv_heads, head_dim, dtype, lens))
    return cases


AWKWARD = pytest.mark.parametrize("case", awkward_cases(), ids=str)


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(shape))
    values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    return values.to(dtype).to(DEVICE)


def paged_cache(lens, num_kv_heads, head_dim, dtype, *, seed=0, spare_blocks=3):
    """Caches holding `lens` tokens per sequence in shuffled blocks; every unused slot is NaN.

    Unused table entries name a block that is all NaN. Returns k_cache, v_cache, block_tables,
    seq_lens.
    """
    counts = [(length + 63) // 64 for length in lens]
    num_blocks = sum(counts) + spare_blocks
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_blocks - 1, generator=generator).tolist()
    tables = torch.full((len(lens), max([*counts, 1])), num_blocks - 1, dtype=torch.int32)
    caches = []
    for which in range(2):
        values = torch.randn(
            num_blocks, num_kv_heads, 64, head_dim, generator=generator, dtype=torch.float64
        )
        caches.append(values)
        used = 0
        kept = torch.zeros(num_blocks, 64, dtype=torch.bool)
        for s, (length, count) in enumerate(zip(lens, counts, strict=True)):
            for index in range(count):
                block = order[used + index]
                tables[s, index] = block
                kept[block, : min(64, length - 64 * index)] = True
            used += count
        values[~kept[:, None].expand(-1, num_kv_heads, -1)] = float("nan")
        caches[which] = values.to(dtype).to(DEVICE)
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    return caches[0], caches[1], tables.to(DEVICE), seq_lens.to(DEVICE)


def int8_cache(cache):
    """A paged cache's keys or values as int8: (codes, scales, the float64 that they stand for).

    Scales of unused slots are NaN, their codes the largest.
    """
    values = cache.cpu().double()
    unused = values.isnan().any(-1)
    num_blocks, kv_heads, _, head_dim = values.shape
    stored = torch.zeros(num_blocks, kv_heads, 64, head_dim + SCALE_BYTES, dtype=torch.int8)
    codes, scales = codes_and_scales(stored.to(DEVICE))
    made, factors = quantize_tokens(values.nan_to_num())
    made[unused], factors[unused] = 127, float("nan")
    codes.copy_(made)
    scales.copy_(factors)
    return codes, scales, made.double() * scales.cpu().double()[..., None]


def wide(tensor):
    """The same values in float64 on the CPU, for the references."""
    if tensor is None or not tensor.is_floating_point():
        return tensor if tensor is None else tensor.cpu()
    return tensor.cpu().double()


def assert_as_exact_as_torch(got, exact, torchs, *, floor=None, what="out"):
    """The error rule, on the largest absolute error; `floor` is the rounding of float32 sums."""
    if floor is None and got.dtype == torch.float32:
        # A sum of 128 products in another order moves a score by some 2^-24 of sqrt(128) products.
        floor = 5e-7 * max(exact.nan_to_num(0, 0, 0).abs().max().item(), 1e-3) if got.numel() else 0
    got, torchs = got.cpu().double(), torchs.cpu().double()
    assert got.shape == exact.shape, (got.shape, exact.shape)
    infinite = torch.isinf(exact)
    assert torch.equal(got[infinite], exact[infinite]), f"{what}: infinities differ"
    finite = ~infinite
    if not finite.any():
        return
    size = exact[finite].abs().max().item()
    ours = (got - exact)[finite].abs().max().item()
    theirs = (torchs - exact)[finite].abs().max().item()
    if floor is None:
        floor = 2e-7 * max(size, 1e-3)
    assert ours <= 2 * theirs + floor, f"{what}: error {ours:.3g}, torch {theirs:.3g}, size {size}"


def patch_interpreter():
    """Give Triton's interpreter correct bf16 and fp8, and loop bounds for new NumPy.

    As shipped it truncates float32 to bf16 where hardware rounds to nearest even, multiplies raw
    bf16 bits in tl.dot, casts integers to bf16 as bits, and loses the carry when rounding to fp8.
    Arithmetic on bf16 outside tl.dot raises here: the kernels compute in float32.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    torch_dtypes = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e5: torch.float8_e5m2,
        tl.float8e4nv: torch.float8_e4m3fn,
    }
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}

    def convert(data, source, target, rounding=None):
        source, target = torch_dtypes[source], torch_dtypes[target]
        raw = torch.from_numpy(np.array(data, order="C", copy=True).view(np.uint8).reshape(-1))
        values = raw.view(source).to(torch.float32).to(target)
        out = values.view(torch.uint8).numpy().view(bits[target.itemsize])
        return out.reshape(np.shape(data))

    builder = interpreter.InterpreterBuilder
    handle_type = interpreter.TensorHandle
    plain_cast, plain_dot, plain_binary = builder.cast_impl, builder.create_dot, builder.binary_op

    def as_float32(handle):
        data = convert(handle.data, tl.bfloat16, tl.float32).view(np.float32)
        return handle_type(data, tl.float32)

    def cast(self, source, target):
        source_type, target_type = source.dtype.scalar, target.scalar
        if source_type == target_type:
            return source
        if source_type in torch_dtypes and target_type in torch_dtypes:
            data = convert(source.data, source_type, target_type)
            return handle_type(data.view(interpreter._get_np_dtype(target)), target_type)
        if source_type == tl.bfloat16:
            return plain_cast(self, as_float32(source), target)
        if target_type == tl.bfloat16:
            single = handle_type(source.data.astype(np.float32), tl.float32)
            return cast(self, single, target)
        return plain_cast(self, source, target)

    def dot(self, a, b, d, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = as_float32(a), as_float32(b)
        elif a.dtype.scalar == tl.float16:  # products of fp16 are summed in float32, not in fp16
            a = handle_type(a.data.astype(np.float32), tl.float32)
            b = handle_type(b.data.astype(np.float32), tl.float32)
        return plain_dot(self, a, b, d, *rest)

    def binary(self, lhs, rhs, op):
        if lhs.dtype.scalar == tl.bfloat16:
            raise TypeError("bf16 arithmetic outside tl.dot; convert to float32 first")
        return plain_binary(self, lhs, rhs, op)

    # Program ids are arrays of one element, which NumPy 2.5 no longer lets Triton 3.6 use as ints.
    plain_tensor = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):
        plain_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor
    interpreter._convert_float = convert
    builder.cast_impl = cast
    builder.create_dot = dot
    builder.binary_op = binary
