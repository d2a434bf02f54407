"""A profile is the machine's own numbers back: measured on a model of a server, fitted, priced."""

from __future__ import annotations

import json
from collections.abc import Sequence

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_operator.plan.measured_prices import token_price
from tandem_operator.profiling.endpoint import Endpoint, EndpointError
from tandem_operator.profiling.fit import (
    DecodeTiming,
    PrefillTiming,
    fit_decode,
    fit_prefill,
)
from tandem_operator.profiling.measure import Completion, decode_timing, grid, measure

PREFILL = (0.02, 1e-4, 3e-8)
DECODE = (0.015, 2e-7, 4e-4)


class ModelOfAServer:
    """Answers in the times of known coefficients; three tokens a word."""

    def __init__(self) -> None:
        self.now = 0.0

    async def complete(self, prompts: Sequence[str], output_tokens: int) -> list[Completion]:
        lengths = [3 * len(prompt.split()) for prompt in prompts]
        started = self.now
        a, b, c = PREFILL
        times: list[list[float]] = [[] for _ in prompts]
        for index, length in enumerate(lengths):
            self.now += a + b * length + c * length**2
            times[index].append(self.now)
        a, b, c = DECODE
        for step in range(1, output_tokens):
            self.now += a + b * sum(n + step for n in lengths) + c * len(prompts)
            for row in times:
                row.append(self.now)
        return [Completion(n, started, t) for n, t in zip(lengths, times, strict=True)]


async def test_the_coefficients_of_a_machine_are_found_again() -> None:
    server = ModelOfAServer()

    prefills, decodes = await measure(
        server.complete, grid(4096, 16, 3.0), seed=0, progress=lambda text: None
    )

    prefill, decode = fit_prefill(prefills), fit_decode(decodes)
    assert prefill.coefficients == pytest.approx(PREFILL, rel=0.02)
    assert decode.coefficients == pytest.approx(DECODE, rel=0.05)
    assert max(prefill.worst_error, decode.worst_error) < 0.02


@settings(max_examples=30, deadline=None)
@given(
    a=st.floats(1e-4, 1.0), b=st.floats(0.0, 1e-3), c=st.floats(0.0, 1e-7), noise=st.integers(0, 99)
)
def test_a_fit_is_never_negative_and_close_on_clean_data(
    a: float, b: float, c: float, noise: int
) -> None:
    lengths = (16, 64, 256, 1024, 4096)
    timings = [PrefillTiming(n, a + b * n + c * n * n) for n in lengths]

    found = fit_prefill(timings)

    assert min(found.coefficients) >= 0.0
    assert found.worst_error < 0.05


def test_too_few_points_are_refused_with_what_is_missing() -> None:
    with pytest.raises(ValueError, match="three prompt lengths"):
        fit_prefill([PrefillTiming(1, 1.0), PrefillTiming(2, 1.0)])
    with pytest.raises(ValueError, match="two batch sizes"):
        fit_decode([DecodeTiming(1, float(n), 1.0) for n in range(5)])


def test_answers_that_never_ran_together_give_no_decode_timing() -> None:
    early = Completion(10, 0.0, [0.1 * i for i in range(20)])
    late = Completion(10, 0.0, [9.0 + 0.1 * i for i in range(20)])

    assert decode_timing([early, late]) is None


def test_a_price_counts_the_time_of_a_token_at_the_planned_load() -> None:
    prefill, decode = (0.0, 1e-3, 0.0), (0.1, 0.0, 0.0)
    found = token_price(prefill, decode, 3.6, 3.6, batch=10, context_tokens=100)

    assert found.usd_per_1m_input_tokens == pytest.approx(1.0)  # 1 ms at $0.001 a second
    assert found.usd_per_1m_output_tokens == pytest.approx(10.0)


def serve(handler: httpx.MockTransport) -> Endpoint:
    return Endpoint("http://engine/v1", transport=handler)


async def test_an_engine_says_its_model_context_and_capacity() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m", "max_model_len": 999}]})
        load = {"kv_blocks": {"total": 10}, "block_size": 64, "max_model_len": 512}
        return httpx.Response(200, json=load)

    async with serve(httpx.MockTransport(answer)) as endpoint:
        engine = await endpoint.describe()

    assert (engine.model, engine.max_tokens, engine.kv_tokens) == ("m", 512, 640)


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (httpx.Response(404), "answered 404"),
        (httpx.Response(200, text="<html>"), "did not answer in JSON"),
        (httpx.Response(200, json={"data": []}), "lists no model"),
    ],
)
async def test_what_is_no_engine_is_told(reply: httpx.Response, says: str) -> None:
    async with serve(httpx.MockTransport(lambda request: reply)) as endpoint:
        with pytest.raises(EndpointError, match=says):
            await endpoint.describe()


async def test_a_server_that_streams_no_usage_is_told() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        chunk = json.dumps({"choices": [{"text": "a"}]})
        return httpx.Response(200, text=f"data: {chunk}\n\ndata: [DONE]\n\n")

    async with serve(httpx.MockTransport(answer)) as endpoint:
        with pytest.raises(EndpointError, match="no usage"):
            await endpoint.complete(["a"], 1)
