"""Tables that are kept from step to step equal tables made anew, whoever draws in between."""

from __future__ import annotations

from itertools import islice

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from tandem_worker.engine.requests import EngineRequest
from tandem_worker.engine.row_tables import RowTables
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.scheduling.sequence import Sequence

VOCAB, END = 12, 3
ENDS = frozenset({END})
CPU = torch.device("cpu")


def made_anew(
    requests: list[EngineRequest],
) -> tuple[list[list[bool]], list[list[int]], list[list[float]]]:
    prompts, counts, biases = [], [], []
    for request in requests:
        ids, split = request.sequence.token_ids, request.sequence.num_prompt_tokens
        penalised = request.sampling.has_penalties
        prompts.append([penalised and token in ids[:split] for token in range(VOCAB)])
        counts.append([penalised * ids[split:].count(token) for token in range(VOCAB)])
        bias = [dict(request.sampling.logit_bias).get(token, 0.0) for token in range(VOCAB)]
        if request.num_generated < request.sampling.min_tokens:
            for token in (END, *request.sampling.stop_token_ids):
                bias[token] = float("-inf")
        biases.append(bias)
    return prompts, counts, biases


params = st.builds(
    SamplingParams,
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    min_tokens=st.integers(0, 3),
    stop_token_ids=st.sampled_from([(), (5,)]),
    logit_bias=st.sampled_from([(), ((2, 1.5),), ((2, -4.0), (7, 3.0))]),
)
tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5)
requests = st.lists(st.tuples(params, tokens, tokens), min_size=6, max_size=6)
steps = st.lists(
    st.tuples(
        st.lists(st.integers(0, 5), unique=True, min_size=1, max_size=4),
        st.lists(st.integers(0, VOCAB - 1), min_size=4, max_size=4),
    ),
    max_size=12,
)


@given(requests=requests, steps=steps)
@settings(max_examples=80, deadline=None)
def test_tables_kept_equal_tables_made_anew(
    requests: list[tuple[SamplingParams, list[int], list[int]]],
    steps: list[tuple[list[int], list[int]]],
) -> None:
    known = [
        EngineRequest(Sequence(str(n), prompt + resumed, len(prompt)), sampling, lambda event: None)
        for n, (sampling, prompt, resumed) in enumerate(requests)
    ]
    tables = RowTables(VOCAB, CPU)
    for rows, drawn in steps:
        drawing = [known[row] for row in rows]
        prompts, counts, biases = made_anew(drawing)

        mask, seen = tables.history(drawing)
        bias = tables.bias(drawing, ENDS)

        assert mask.tolist() == prompts
        assert seen.tolist() == counts
        assert (bias.tolist() if bias is not None else [[0.0] * VOCAB] * len(rows)) == biases
        for request, token in zip(drawing, islice(drawn, len(rows)), strict=True):
            request.sequence.token_ids.append(token)


def test_a_step_of_the_same_requests_makes_no_table() -> None:
    sampling = SamplingParams(presence_penalty=0.5, logit_bias=((2, 1.0),))
    request = EngineRequest(Sequence("s", [1, 2], 2), sampling, lambda event: None)
    tables = RowTables(VOCAB, CPU)
    before = [*tables.history([request]), tables.bias([request], ENDS)]
    request.sequence.token_ids.append(4)

    after = [*tables.history([request]), tables.bias([request], ENDS)]

    assert [a is b for a, b in zip(after, before, strict=True)] == [True, True, True]
    assert after[1] is not None
    assert after[1][0, 4] == 1
