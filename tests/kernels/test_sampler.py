"""The sampler draws what it says it draws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_kernels import KernelArgumentError, gumbel_noise, sample
from tandem_kernels.noise import noise_bits
from tandem_kernels.sampler import apply_penalties

PINNED_BITS = [[-265868072, 1615460530, 2110239804], [457340830, -1060332096, 1342385487]]
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 1.0, -8.0])


def draw(count, logits=LOGITS, *, temperature=1.0, seed=0, **options):
    """`count` draws at successive positions of one seed."""
    rows = {
        name: torch.full((count,), value, dtype=torch.int64 if name == "top_k" else torch.float32)
        for name, value in options.items()
    }
    return sample(
        logits.expand(count, -1),
        temperature=torch.full((count,), temperature),
        seeds=torch.full((count,), seed, dtype=torch.int64),
        positions=torch.arange(count),
        **rows,
    ).token_ids


def chi_square(tokens, probabilities):
    """Pearson's statistic over the categories that can occur, and their number less one."""
    counts = torch.bincount(tokens, minlength=probabilities.numel()).double()
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = probabilities[possible].double() * tokens.numel()
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    return statistic, int(possible.sum()) - 1


def assert_drawn_from(tokens, probabilities):
    """Statistic below its mean plus five standard deviations (fixed seeds: it cannot flake)."""
    statistic, freedom = chi_square(tokens, probabilities)
    assert statistic <= freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, -(2**60), 2**63 - 1])
def test_draws_follow_the_softmax(temperature, seed):
    tokens = draw(20000, temperature=temperature, seed=seed)

    assert_drawn_from(tokens, torch.softmax(LOGITS / temperature, 0))


def test_draws_of_neighbouring_seeds_at_one_position_follow_the_softmax():
    count = 20000

    tokens = sample(
        LOGITS.expand(count, -1),
        temperature=torch.ones(count),
        seeds=torch.arange(count),
        positions=torch.full((count,), 7),
    ).token_ids

    assert_drawn_from(tokens, torch.softmax(LOGITS, 0))
    pairs = tokens[:-1] * LOGITS.numel() + tokens[1:]
    probabilities = torch.softmax(LOGITS[:6], 0)
    kept = pairs[(tokens[:-1] < 6) & (tokens[1:] < 6)]
    first, second = kept // LOGITS.numel(), kept % LOGITS.numel()
    assert_drawn_from(first * 6 + second, torch.outer(probabilities, probabilities).flatten())


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, [0]),
        ({"top_k": 2}, [0, 1, 5]),  # equal values stay
        ({"top_k": 0}, [0, 1, 2, 3, 4, 5, 6]),
        ({"top_p": 0.3}, [0]),
        ({"top_p": 0.6}, [0, 1, 5]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4, 5, 6]),
        ({"min_p": 0.3}, [0, 1, 5]),
        ({"min_p": 0.0}, [0, 1, 2, 3, 4, 5, 6]),
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.2}, [0, 1, 4, 5]),
    ],
)
def test_filters_keep_the_most_likely_tokens_and_their_proportions(options, kept):
    tokens = draw(8000, **options)

    probabilities = torch.zeros(LOGITS.numel())
    probabilities[kept] = torch.softmax(LOGITS[kept], 0)
    assert_drawn_from(tokens, probabilities)


def test_temperature_zero_takes_the_first_highest_logit():
    logits = torch.tensor([0.0, 3.0, 3.0, 1.0])

    assert draw(5, logits, temperature=0.0).tolist() == [1] * 5


def test_rows_of_a_batch_draw_as_they_would_alone():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    options = {
        "temperature": torch.tensor([0.0, 1.0, 0.7, 0.0, 2.0, 1.0]),
        "seeds": torch.arange(6) * 10**12,
        "positions": torch.arange(6) + 2**33,
        "top_k": torch.tensor([0, 5, 50, 1, 0, 3]),
        "top_p": torch.tensor([1.0, 0.9, 0.5, 0.1, 1.0, 1.0]),
    }

    together = sample(logits, **options).token_ids
    alone = [
        sample(logits[i : i + 1], **{k: v[i : i + 1] for k, v in options.items()}).token_ids
        for i in range(6)
    ]

    assert together.tolist() == torch.cat(alone).tolist()


def test_log_probabilities_are_of_the_raw_logits():
    logits = torch.randn(3, 20)
    ones = torch.ones(3)

    out = sample(
        logits, temperature=ones, seeds=ones.long(), positions=ones.long(), top_k=ones.long(),
        num_top_logprobs=4,
    )  # fmt: skip

    expected = torch.log_softmax(logits, -1)
    torch.testing.assert_close(out.logprobs, expected.gather(1, out.token_ids[:, None])[:, 0])
    torch.testing.assert_close(out.top_logprobs, expected.topk(4).values)
    assert torch.equal(out.top_token_ids, expected.topk(4).indices)


def test_penalties_follow_their_definitions():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 1.0]])
    counts = torch.tensor([[3, 1, 0, 0, 0]], dtype=torch.int32)
    prompt = torch.tensor([[False, False, True, False, False]])

    def penalise(**options):
        return apply_penalties(logits, output_counts=counts, prompt_mask=prompt, **options)

    assert penalise(repetition_penalty=torch.tensor([2.0])).tolist() == [[1, -4, 1, -2, 1]]
    assert penalise(frequency_penalty=torch.tensor([0.5])).tolist() == [[0.5, -2.5, 2, -2, 1]]
    assert penalise(presence_penalty=torch.tensor([0.5])).tolist() == [[1.5, -2.5, 2, -2, 1]]
    bias = torch.tensor([[0.0, 0.0, -math.inf, 0.0, 2.0]])
    assert penalise(logit_bias=bias).tolist() == [[2, -2, -math.inf, -2, 3]]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**40),
    vocab=st.integers(1, 300),
)
def test_noise_depends_on_seed_position_and_token_only(seed, position, vocab):
    seeds, positions = torch.tensor([seed, 5]), torch.tensor([position, 6])

    together = gumbel_noise(seeds, positions, vocab + 10)
    alone = gumbel_noise(seeds[:1], positions[:1], vocab)

    assert torch.equal(together[:1, :vocab], alone)
    assert bool(alone.isfinite().all())


def test_noise_bits_are_pinned_so_that_versions_agree():
    bits = noise_bits(torch.tensor([0, 123456789012345]), torch.tensor([0, 2**33 + 1]), 3)

    assert bits.tolist() == PINNED_BITS


def test_noise_has_the_moments_of_a_gumbel_variable():
    noise = gumbel_noise(torch.tensor([3]), torch.tensor([11]), 400_000, dtype=torch.float64)[0]

    assert abs(float(noise.mean()) - 0.5772156649) < 5 * 1.2825 / math.sqrt(400_000)
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02
    assert float(noise.max()) > 11


def test_noise_of_neighbours_is_uncorrelated():
    seeds = torch.tensor([0, 1, 2, 0, 0, 2**32])
    positions = torch.tensor([0, 0, 0, 1, 2, 0])

    noise = gumbel_noise(seeds, positions, 100_000, dtype=torch.float64)

    correlation = torch.corrcoef(noise) - torch.eye(6, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / math.sqrt(100_000)


def test_penalties_without_counts_are_refused():
    ones = torch.ones(1)

    with pytest.raises(KernelArgumentError, match="output_counts is None"):
        sample(
            LOGITS[None], temperature=ones, seeds=ones.long(), positions=ones.long(),
            presence_penalty=ones,
        )  # fmt: skip
