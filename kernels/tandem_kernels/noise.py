# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return"
"""The sampler's noise: a hash of (seed, position, token), in torch and in Triton.

Nothing else enters, so a stream that is resumed, moved to another worker or batched differently
draws the same tokens. The integers are bit-identical in both forms; the two logarithms that make
them Gumbel noise agree to float32 rounding.
"""

from __future__ import annotations

import torch

from .dispatch import tl, triton

_MASK32 = 0xFFFFFFFF
# murmur3's multipliers and the golden ratio, as signed 32-bit integers.
_MIX_A = 0x85EBCA6B - 2**32
_MIX_B = 0xC2B2AE35 - 2**32
_GOLDEN = 0x9E3779B1 - 2**32


def gumbel_noise(
    seeds: torch.Tensor,
    positions: torch.Tensor,
    vocab: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Standard Gumbel noise `(num_rows, vocab)` from (seed, position, token).

    With w = (bits + 0.5) / 2^31, the exponential -log(1 - w) keeps its relative precision near 0,
    which is where the largest noise comes from; 24-bit uniforms would cap the noise at 16.6.
    """
    bits = (noise_bits(seeds, positions, vocab) >> 1) & 0x7FFFFFFF
    uniform = (bits.to(dtype) + 0.5) * 2.0**-31
    exponential = torch.where(
        uniform < 0.01,
        uniform * (1 + uniform * (0.5 + uniform * (1 / 3))),
        -torch.log((1 - uniform).clamp(min=2.0**-33)),
    )
    return -torch.log(exponential)


def noise_bits(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """Uniform 32-bit hashes `(num_rows, vocab)` as int32: the counter hash behind the noise.

    Two keys are mixed from seed and position; each token's counter then passes murmur3's
    finaliser twice, keyed before, between and after. All arithmetic is modulo 2^32.
    """
    low, high = (_signed(key)[:, None] for key in row_keys(seeds, positions))
    token = torch.arange(vocab, device=seeds.device, dtype=torch.int32)
    x = _mix32(token * _GOLDEN + low) ^ high
    return _mix32(x + low)


def row_keys(seeds: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two 32-bit keys of each row, as int64 `(num_rows,)`."""
    seed_low, seed_high = seeds & _MASK32, (seeds >> 32) & _MASK32
    position_low, position_high = positions & _MASK32, (positions >> 32) & _MASK32
    low = _mix(seed_low ^ 0x5BD1E995)
    low = _mix(((low + position_low) & _MASK32) ^ seed_high)
    low = _mix((low + position_high * 0x85EBCA6B) & _MASK32)
    high = _mix(((seed_high ^ 0x2545F491) + low) & _MASK32)
    high = _mix((high ^ seed_low) + 0x9E3779B9 & _MASK32) ^ position_low
    return low, _mix(high)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """murmur3's 32-bit finaliser on int32, whose products wrap; half the bytes of _mix."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _MIX_A
    x ^= (x >> 13) & 0x7FFFF
    x *= _MIX_B
    x ^= (x >> 16) & 0xFFFF
    return x


def _signed(x: torch.Tensor) -> torch.Tensor:
    """The int32 with the low 32 bits of x."""
    return (((x & _MASK32) ^ 0x80000000) - 0x80000000).to(torch.int32)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """murmur3's 32-bit finaliser on int64 values below 2^32 (products wrap, low bits are exact)."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK32
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


@triton.jit
def _mix_kernel(x):
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def gumbel(seed, position, token):
    """gumbel_noise in the kernel: the same integers, then two logarithms."""
    seed_low = seed.to(tl.uint32)
    seed_high = (seed >> 32).to(tl.uint32)
    position_low = position.to(tl.uint32)
    position_high = (position >> 32).to(tl.uint32)
    low = _mix_kernel(seed_low ^ 0x5BD1E995)
    low = _mix_kernel((low + position_low) ^ seed_high)
    low = _mix_kernel(low + position_high * 0x85EBCA6B)
    high = _mix_kernel((seed_high ^ 0x2545F491) + low)
    high = _mix_kernel((high ^ seed_low) + 0x9E3779B9) ^ position_low
    high = _mix_kernel(high)
    x = _mix_kernel(token.to(tl.uint32) * 0x9E3779B1 + low) ^ high
    bits = _mix_kernel(x + low)
    uniform = ((bits >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10
    series = uniform * (1 + uniform * (0.5 + uniform * 0.3333333333333333))
    rest = tl.maximum(1 - uniform, 1.1641532182693481e-10)
    return -tl.log(tl.where(uniform < 0.01, series, -tl.log(rest)))
