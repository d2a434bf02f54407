"""The summary compares strategies at equal cost and states fractions of all-large."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_operator.demo.strategies import Measured, Outcome, Summary, summarize

outcomes = st.builds(
    Outcome,
    right=st.booleans(),
    cost_usd=st.floats(1e-6, 1e-2),
    ttft_s=st.floats(0.001, 1),
    tpot_s=st.one_of(st.none(), st.floats(0.0001, 0.1)),
)


@st.composite
def questions(draw: st.DrawFn) -> Measured:
    small, large = draw(outcomes), draw(outcomes)
    routed_large = draw(st.booleans())
    routed = large if routed_large else small
    return Measured(draw(st.integers(1, 500)), small, large, routed, routed_large)


def by_name(measured: list[Measured]) -> dict[str, Summary]:
    return {summary.strategy: summary for summary in summarize(measured)}


def question(*, length: int, small: bool, large: bool, routed_large: bool) -> Measured:
    cheap = Outcome(small, 0.001, 0.01, 0.002)
    dear = Outcome(large, 0.010, 0.03, 0.006)
    return Measured(length, cheap, dear, dear if routed_large else cheap, routed_large)


def test_a_router_that_escalates_exactly_the_hard_questions_beats_random_at_equal_cost() -> None:
    hard = [question(length=10, small=False, large=True, routed_large=True)] * 5
    easy = [question(length=90, small=True, large=True, routed_large=False)] * 5

    found = by_name(hard + easy)

    assert found["tandem"].quality == 1.0
    assert found["tandem"].large_share == 0.5
    assert found["random"].quality == pytest.approx(0.75)
    assert found["random"].cost_usd == pytest.approx(found["tandem"].cost_usd)
    assert found["prompt length"].quality == pytest.approx(0.5)
    assert found["prompt length"].cost_usd == pytest.approx(found["tandem"].cost_usd)
    assert found["tandem"].cost_saved == pytest.approx(1 - 0.055 / 0.1)


@given(st.lists(questions(), min_size=1, max_size=40))
def test_every_strategy_is_a_fraction_and_all_large_saves_nothing(measured: list[Measured]) -> None:
    found = by_name(measured)

    for summary in found.values():
        assert 0.0 <= summary.quality <= 1.0 + 1e-9
        assert 0.0 <= summary.large_share <= 1.0 + 1e-9
        assert summary.num_questions == len(measured)
    assert found["all large"].cost_saved == pytest.approx(0.0)
    assert found["all small"].large_share == 0.0


def test_nothing_measured_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="ask at least one"):
        summarize([])
