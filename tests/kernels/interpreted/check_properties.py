"""Random shapes through the kernels: what must hold whatever the lengths, heads and splits."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import check_paged_decode
import check_prefill
import harness

few = settings(max_examples=8, deadline=None, derandomize=True, database=None)
heads = st.sampled_from([(1, 1), (4, 2), (3, 1), (6, 2)])
dims = st.sampled_from([16, 32, 48])
dtypes = st.sampled_from(harness.DTYPES)
windows = st.sampled_from([None, 1, 50])


@few
@given(
    lens=st.lists(st.integers(0, 140), min_size=1, max_size=3),
    heads=heads,
    head_dim=dims,
    rows=st.integers(1, 3),
    dtype=dtypes,
    window=windows,
)
def check_decode_over_random_shapes(lens, heads, head_dim, rows, dtype, window):
    check_paged_decode.check(lens, *heads, head_dim, dtype, rows=rows, sliding_window=window)


@few
@given(
    chunks=st.lists(
        st.tuples(st.integers(0, 100), st.integers(0, 70)), min_size=1, max_size=3
    ).filter(lambda chunks: any(rows for _, rows in chunks)),
    heads=heads,
    head_dim=dims,
    dtype=dtypes,
    window=windows,
)
def check_prefill_over_random_shapes(chunks, heads, head_dim, dtype, window):
    check_prefill.check(chunks, *heads, head_dim, dtype, sliding_window=window)


@few
@given(rows=st.integers(1, 4), vocab=st.integers(1, 90), seed=st.integers(-(2**63), 2**63 - 1))
def check_sampling_over_random_shapes(rows, vocab, seed):
    from tandem_kernels import sample
    from tandem_kernels.sampler import sample_reference

    logits = harness.randn(rows, vocab, scale=2)
    options = {
        "temperature": torch.linspace(0, 1.5, rows),
        "seeds": torch.full((rows,), seed),
        "positions": torch.arange(rows),
        "top_k": torch.arange(rows) * 3,
        "top_p": torch.linspace(1.0, 0.2, rows),
    }

    placed = {name: value.to(harness.DEVICE) for name, value in options.items()}
    token_ids = sample(logits, **placed).token_ids

    assert torch.equal(token_ids.cpu(), sample_reference(logits.cpu(), **options))
