"""The sampler's kernels against its reference: the same tokens from the same seeds."""

import pytest
import torch

import harness
from tandem_kernels import sample, sampler
from tandem_kernels.dispatch import tl, triton
from tandem_kernels.noise import gumbel, gumbel_noise
from tandem_kernels.sampler import sample_reference

ROWS = 5


@triton.jit
def _gumbel_kernel(seeds_ptr, positions_ptr, out_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    token = tl.arange(0, BLOCK)
    noise = gumbel(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), token)
    tl.store(out_ptr + row * BLOCK + token, noise)


def parameters(vocab, *, seed=0, **which):
    """Random per-row parameters for the steps named in `which`."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return torch.rand(ROWS, generator=generator) * (high - low) + low

    counts = torch.randint(-3, 3, (ROWS, vocab), generator=generator).clamp(min=0).to(torch.int32)
    every = {
        "top_k": torch.randint(0, vocab, (ROWS,), generator=generator).clamp(max=20),
        "top_p": torch.where(uniform(0, 1) < 0.2, 1.0, uniform(0.1, 1.0)),
        "min_p": torch.where(uniform(0, 1) < 0.3, 0.0, uniform(0.0, 0.5)),
        "repetition_penalty": uniform(0.8, 2.0),
        "frequency_penalty": uniform(-1.0, 1.0),
        "presence_penalty": uniform(-1.0, 1.0),
        "output_counts": counts,
        "prompt_mask": torch.randint(0, 2, (ROWS, vocab), generator=generator).bool(),
        "logit_bias": torch.where(torch.rand(ROWS, vocab) < 0.3, float("-inf"), 0.5),
    }
    temperature = torch.where(uniform(0, 1) < 0.2, 0.0, uniform(0.2, 2.0))
    seeds = torch.randint(-(2**62), 2**62, (ROWS,), generator=generator)
    positions = torch.randint(0, 2**34, (ROWS,), generator=generator)
    chosen = {name: every[name] for name, wanted in which.items() if wanted}
    return {"temperature": temperature, "seeds": seeds, "positions": positions, **chosen}


STEPS = {
    "plain": {},
    "top_k": {"top_k": True},
    "top_p": {"top_p": True},
    "min_p": {"min_p": True},
    "filters": {"top_k": True, "top_p": True, "min_p": True},
    "penalties": {
        "repetition_penalty": True,
        "frequency_penalty": True,
        "presence_penalty": True,
        "output_counts": True,
        "prompt_mask": True,
    },
    "all": dict.fromkeys(
        ("top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty",
         "presence_penalty", "output_counts", "prompt_mask", "logit_bias"), True
    ),
}  # fmt: skip


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("vocab", [1, 17, 63, 64, 65, 300, 1000])
def check_tokens_match_the_reference(steps, vocab, monkeypatch):
    monkeypatch.setattr(sampler, "_CHUNK", 64 if vocab < 1000 else 512)
    monkeypatch.setattr(sampler, "_SEARCH_BLOCK", 128 if vocab < 1000 else 1024)
    options = parameters(vocab, seed=vocab, **STEPS[steps])
    logits = harness.randn(ROWS, vocab, scale=3)

    placed = {name: value.to(harness.DEVICE) for name, value in options.items()}
    out = sample(logits, **placed, return_logprobs=True)

    assert torch.equal(out.token_ids.cpu(), sample_reference(logits.cpu(), **options))
    exact = torch.log_softmax(harness.wide(logits), -1).gather(1, out.token_ids.cpu()[:, None])
    torchs = torch.log_softmax(logits.cpu(), -1).gather(1, out.token_ids.cpu()[:, None])
    harness.assert_as_exact_as_torch(out.logprobs[:, None], exact, torchs, floor=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def check_half_precision_logits(dtype):
    options = parameters(300, seed=5, **STEPS["filters"])
    logits = harness.randn(ROWS, 300, scale=3, dtype=dtype)

    placed = {name: value.to(harness.DEVICE) for name, value in options.items()}
    out = sample(logits, **placed)

    assert torch.equal(out.token_ids.cpu(), sample_reference(logits.cpu(), **options))


def check_greedy_takes_the_first_of_equal_logits():
    logits = torch.zeros(3, 200, device=harness.DEVICE)
    logits[1, [7, 150]] = 2.0
    zero = torch.zeros(3, device=harness.DEVICE)

    out = sample(logits, temperature=zero, seeds=zero.long(), positions=zero.long())

    assert out.token_ids.tolist() == [0, 7, 0]


def check_gumbel_noise_is_the_same_bits_in_kernel_and_torch():
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, 12345678901234], device=harness.DEVICE)
    positions = torch.tensor([0, 2**40, 3, 4095, 2**31], device=harness.DEVICE)
    out = torch.empty(5, 1024, device=harness.DEVICE)
    _gumbel_kernel[(5,)](seeds, positions, out, BLOCK=1024)

    expected = gumbel_noise(seeds.cpu(), positions.cpu(), 1024)
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-6, atol=2e-6)
