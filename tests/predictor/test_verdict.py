"""One verdict: the same numbers give the same decision, and no saving is claimed by luck."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.predictor.evaluation.evidence import PairRows, evidence, met_on_other_rows
from tandem_router.predictor.evaluation.verdict import (
    TOLERANCE,
    Decision,
    Estimate,
    Evidence,
    judge,
    rows_needed,
)


def pair(
    gap: tuple[float, float, float],
    usd: tuple[float, float] | None = None,
    apgr: tuple[float, float, float] | None = None,
    saved: tuple[float, float, float] | None = None,
    mixed: float = 0.03,
) -> Evidence:
    return Evidence(
        "small",
        "large",
        1000,
        0.906,
        0.906 + gap[0],
        Estimate(*gap),
        usd,
        Estimate(*apgr) if apgr else None,
        Estimate(*saved) if saved else None,
        mixed,
    )


SHARP = {"apgr": (0.7, 0.65, 0.75), "saved": (0.41, 0.36, 0.45)}


def test_a_gap_that_may_be_nothing_sends_all_to_the_cheaper_tier() -> None:
    found = judge(pair((0.003, -0.004, 0.010), (0.00006, 0.001), **SHARP))

    assert found.decision is Decision.CHEAP
    assert found.sentence.startswith(
        "send all to small: within .003 (-.004 to .010) of large at 6 % of the price "
        "($0.06 against $1.00 per 1,000 requests)"
    )


def test_a_point_of_quality_at_seventeen_times_the_price_is_not_worth_it() -> None:
    found = judge(pair((0.008, 0.004, 0.012), (0.001, 0.017), **SHARP))

    assert found.decision is Decision.CHEAP
    assert "a point of quality would cost $20.00 per 1,000 requests" in found.sentence


def test_a_worse_tier_at_a_higher_price_gets_nothing() -> None:
    found = judge(pair((-0.02, -0.03, -0.01), (0.001, 0.017), **SHARP))

    assert found.sentence.startswith("send all to small: large is worse by .020 (.010 to .030)")


def test_nothing_predictable_sends_all_to_the_better_tier_and_says_what_mixing_costs() -> None:
    found = judge(pair((0.2, 0.18, 0.22), None, (0.51, 0.47, 0.55), (0.04, 0.0, 0.1)))

    assert found.decision is Decision.DEAR
    assert "nothing is predictable of which prompts need it" in found.sentence
    assert "mixing costs .020 of quality for every tenth of the requests" in found.sentence


def test_floors_are_worth_a_table_where_the_ranking_is_better_than_chance() -> None:
    gap = (0.2, 0.18, 0.22)

    chance = judge(pair(gap, None, (0.51, 0.47, 0.55), (0.04, 0.0, 0.1)))
    ranked = judge(pair(gap, None, (0.75, 0.7, 0.8), (0.0, 0.0, 0.1)))
    routed = judge(pair(gap, None, **SHARP))

    assert [found.floors for found in (chance, ranked, routed)] == [False, True, True]
    assert not ranked.routable


def test_a_saving_is_said_in_dollars_where_they_are_known_and_in_calls_where_not() -> None:
    dollars = judge(pair((0.2, 0.18, 0.22), (0.001, 0.01), **SHARP))
    calls = judge(pair((0.2, 0.18, 0.22), None, **SHARP))

    assert dollars.routable
    assert dollars.sentence.startswith(
        "route: saves 41 % (36 to 45) of the cost of large, $4.10 of $10.00 per 1,000 requests, "
        "at no more than half a point below all-large"
    )
    assert calls.sentence.startswith("route: saves 41 % (36 to 45) of the calls of large at")


numbers = st.tuples(*[st.floats(-1, 1)] * 3).map(sorted).map(lambda v: (v[1], v[0], v[2]))
shares = st.tuples(*[st.floats(0, 1)] * 3).map(sorted).map(lambda v: (v[1], v[0], v[2]))


@given(
    numbers,
    st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.none() | shares,
    st.none() | shares,
    st.floats(0, 1),
)
def test_routing_is_advised_only_where_all_three_questions_say_yes(
    gap: tuple[float, float, float],
    usd: tuple[float, float] | None,
    apgr: tuple[float, float, float] | None,
    saved: tuple[float, float, float] | None,
    mixed: float,
) -> None:
    found = judge(pair(gap, usd, apgr, saved, mixed))

    assert found.sentence
    if found.routable:
        assert gap[1] > 0.0
        assert gap[0] > TOLERANCE
        assert apgr is not None
        assert apgr[1] > 0.5
        assert saved is not None
        assert saved[1] > mixed


def rows(gain: np.ndarray) -> PairRows:
    count = len(gain)
    spend = np.stack((np.zeros(count), np.ones(count)), axis=1)
    return PairRows(np.full(count, 0.5), 0.5 + gain, spend, np.arange(count))


def test_noise_never_saves_more_than_mixing_by_more_than_chance() -> None:
    """A threshold that looked good by luck is judged on the rows it was not chosen on."""
    generator = np.random.default_rng(0)
    lucky = 0
    for seed in range(20):
        gain = np.where(
            generator.random(400) < 0.3, 0.5, np.where(generator.random(400) < 0.15, -0.5, 0.0)
        )
        found = evidence(
            ("small", "large"), rows(gain), False, generator.normal(size=400), 60, seed
        )
        lucky += judge(found).routable
    assert lucky <= 1


def test_a_perfect_ranking_is_routed_and_saves_what_it_can() -> None:
    gain = np.repeat([0.5, 0.0], [120, 280])

    met = met_on_other_rows(gain + np.linspace(0.0, 1e-6, 400), rows(gain), TOLERANCE, 0)

    assert met.saved == pytest.approx(0.7, abs=0.05)
    assert met.quality >= 0.5 + gain.mean() - TOLERANCE


@pytest.mark.parametrize("num_rows", [120, 200, 300])
def test_few_rows_that_the_prompt_separates_are_routed(num_rows: int) -> None:
    """One miss in half of 120 rows is more than half a point: the threshold leaves room for it."""
    gain = np.repeat([1.0, 0.0], num_rows // 2)
    spread = np.random.default_rng(0).normal(0.0, 0.02, num_rows)
    apart = PairRows(1.0 - gain, np.ones(num_rows), rows(gain).spend, np.arange(num_rows))

    found = evidence(("small", "large"), apart, False, 0.8 * gain + spread, 60, 0)

    assert judge(found).routable, judge(found).sentence
    assert found.saved is not None
    assert found.saved.value == pytest.approx(0.5, abs=0.02)


def test_the_fewer_rows_are_needed_the_wider_the_gap() -> None:
    assert rows_needed(pair((0.2, 0.18, 0.22))) is None
    near, wide = rows_needed(pair((0.01, -0.02, 0.04))), rows_needed(pair((0.02, -0.01, 0.05)))
    assert near is not None
    assert wide is not None
    assert 1000 < wide < near
