"""A conversation stays where its prefix is held, unless the gain is worth moving it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tandem_router.control.floor_limit import FloorLimit
from tandem_router.control.predicted_floor import MIN_STAKES, PredictedFloor
from tandem_router.control.usual_saving import NEEDED, UsualSaving
from tandem_router.policy import (
    PlainScore,
    PolicySetPoints,
    Reason,
    RouteRequest,
    TierOption,
    decide,
    weighed,
)
from tandem_router.policy.decide import decide_fully

SMALL = TierOption("small", True, 0.2, 0.4, is_pool=True)
LARGE = TierOption("large", True, 2.0, 4.0, is_pool=True)
TIERS = (SMALL, LARGE)
THRESHOLD = PolicySetPoints(gain_threshold=0.1)
quality = st.floats(0.0, 1.0)


def ask(gain: float, prompt: int = 20_000, **held: float) -> RouteRequest:
    return RouteRequest(
        prompt, PlainScore({"small": 0.5, "large": 0.5 + gain}), held_tokens=held or None
    )


def test_a_conversation_stays_at_the_dearer_tier_that_holds_it() -> None:
    """To compute 20,000 tokens anew costs the small tier more than 500 do the large one."""
    new, held = ask(0.05), ask(0.05, large=19_500.0)

    assert decide(new, TIERS, THRESHOLD).tier == "small"
    taken = decide(held, TIERS, THRESHOLD)

    assert (taken.tier, taken.reason) == ("large", Reason.PREFIX)
    assert taken.verdicts[1].held_tokens == 19_500
    assert taken.verdicts[1].expected_cost_usd < taken.verdicts[0].expected_cost_usd


def test_a_conversation_stays_at_the_cheaper_tier_where_the_gain_is_hardly_worth_it() -> None:
    assert decide(ask(0.11), TIERS, THRESHOLD).tier == "large"
    assert decide(ask(0.11, small=19_500.0), TIERS, THRESHOLD).reason is Reason.PREFIX
    assert decide(ask(0.3, small=19_500.0), TIERS, THRESHOLD).tier == "large"


def test_what_all_tiers_hold_decides_nothing() -> None:
    for gain in (0.05, 0.099, 0.101, 0.2):
        alone = decide(ask(gain), TIERS, THRESHOLD)
        both = decide(ask(gain, small=16_000.0, large=16_000.0), TIERS, THRESHOLD)

        assert (alone.tier, alone.reason) == (both.tier, both.reason)


def test_a_provider_that_bills_cached_tokens_alike_holds_nothing_worth_having() -> None:
    far = replace(LARGE, is_pool=False)
    cheaper = replace(far, usd_per_1m_cached_input_tokens=0.2)
    request = ask(0.05, large=19_500.0)

    assert decide(request, (SMALL, far), THRESHOLD).tier == "small"
    assert decide(request, (SMALL, cheaper), THRESHOLD).tier == "large"


def test_where_money_has_a_price_a_discount_counts_once() -> None:
    points = PolicySetPoints(lambda_per_usd=2.0)
    far = replace(LARGE, is_pool=False, usd_per_1m_cached_input_tokens=0.0)
    extra = 20_000 * (2.0 - 0.2) / 1e6 + 256 * (4.0 - 0.4) / 1e6
    saved = 19_500 * 2.0 / 1e6

    found = decide(ask(0.05, large=19_500.0), (SMALL, far), points)

    assert found.threshold == pytest.approx(2.0 * (extra - saved))
    assert found.expected_cost_usd == pytest.approx((500 * 2.0 + 256 * 4.0) / 1e6)


def test_a_usual_saving_asks_of_each_request_in_proportion_to_its_own() -> None:
    usual = decide(ask(0.05), TIERS, THRESHOLD).verdicts
    points = replace(
        THRESHOLD, usual_saving_usd=usual[1].expected_cost_usd - usual[0].expected_cost_usd
    )

    assert decide(ask(0.05), TIERS, points).stake == pytest.approx(1.0)
    assert decide(ask(0.05), TIERS, points).tier == "small"
    assert decide(ask(0.05, prompt=5_000), TIERS, points).tier == "large"  # a fourth of the money
    assert decide(ask(0.15, prompt=60_000), TIERS, points).tier == "small"


@settings(max_examples=200, deadline=None)
@given(
    qualities=st.tuples(quality, quality),
    prompt=st.integers(0, 200_000),
    points=st.builds(
        PolicySetPoints,
        gain_threshold=st.floats(-1.0, 1.0),
        lambda_per_usd=st.sampled_from([0.0, 0.0, 3.0]),
        usual_saving_usd=st.floats(0.0, 0.1),
        most_stake=st.floats(0.0, 60.0),
    ),
)
def test_the_short_way_weighs_savings_as_the_long_one_does(
    qualities: tuple[float, float], prompt: int, points: PolicySetPoints
) -> None:
    request = RouteRequest(
        prompt, PlainScore(dict(zip(("small", "large"), qualities, strict=True)))
    )

    assert decide(request, TIERS, points) == decide_fully(request, TIERS, points)


@settings(max_examples=200, deadline=None)
@given(
    gain=st.floats(-0.5, 0.5),
    prompt=st.integers(0, 100_000),
    held=st.tuples(st.floats(0.0, 2e5), st.floats(0.0, 2e5)),
    usual=st.sampled_from([0.0, 0.01]),
)
def test_holding_more_of_a_prompt_never_loses_a_tier_the_request(
    gain: float, prompt: int, held: tuple[float, float], usual: float
) -> None:
    points = replace(THRESHOLD, usual_saving_usd=usual)
    small, large = held
    before = decide(ask(gain, prompt, small=small, large=large), TIERS, points)
    more = {"small": small, "large": large}
    assert before.tier is not None
    more[before.tier] *= 2.0

    assert decide(ask(gain, prompt, **more), TIERS, points).tier == before.tier


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.floats(-0.3, 0.6), st.floats(0.3, 1.0), st.floats(0.05, 20.0)),
        min_size=MIN_STAKES,
        max_size=MIN_STAKES + 60,
    ),
    floor=st.floats(0.8, 1.0),
)
def test_a_floor_that_weighs_stakes_holds_on_what_it_saw(
    requests: list[tuple[float, float, float]], floor: float
) -> None:
    limit = PredictedFloor(floor, 0.1)
    for gain, dearest, stake in requests:
        limit.observe(gain, dearest, stake)
    limit.weigh(True)

    lost = sum(g for g, _, stake in requests if weighed(g, stake) <= limit.threshold)

    assert lost <= (1.0 - floor) * sum(q for _, q, _ in requests) + 1e-6


def test_stakes_save_more_than_gains_alone_at_the_same_floor() -> None:
    """Half of the requests are long and dear, and nobody gains more by them than by others."""
    limit, plain = PredictedFloor(0.95, 0.1), PredictedFloor(0.95, 0.1)
    rows = [(0.01 * (n % 30), 1.0, 4.0 if n % 2 else 0.2) for n in range(300)]
    for gain, dearest, stake in rows:
        limit.observe(gain, dearest, stake)
        plain.observe(gain, dearest)
    limit.weigh(True)

    assert limit.stakes_pay
    saved = sum(stake for g, _, stake in rows if weighed(g, stake) <= limit.threshold)
    by_gain = sum(stake for g, _, stake in rows if g <= plain.threshold)

    assert saved > 1.2 * by_gain


def test_where_stakes_would_save_little_each_request_is_asked_for_the_same() -> None:
    """Whoever gains most costs most, as with questions of which the hard ones are long."""
    limit = FloorLimit(0.95, 0.1)
    for number in range(4 * MIN_STAKES):
        gain = 0.01 * (number % 30)
        limit.observe(gain, 1.0, 0.7 + 2.0 * gain)

    assert not limit.weigh(True)


def test_a_threshold_that_somebody_asks_for_means_gain() -> None:
    limit, saving, base = FloorLimit(0.95, 0.1), UsualSaving(), PolicySetPoints()
    for number in range(2 * MIN_STAKES):
        decision = decide(ask(0.01 * (number % 20), 100 if number % 2 else 10_000), TIERS, base)
        limit.observe(0.01 * (number % 20), 0.7, saving.observe(decision))

    free = saving.in_force(base, lambda: limit.clip(None), limit, True)
    asked = saving.in_force(base, lambda: limit.clip(0.02), limit, False)

    assert free.usual_saving_usd == pytest.approx(saving.usd)
    assert asked.usual_saving_usd == 0.0
    assert (asked.gain_threshold, asked.most_stake) == (0.02, 1.0)


def test_the_usual_saving_is_not_believed_before_some_requests() -> None:
    saving = UsualSaving()
    decision = decide(ask(0.1), TIERS, THRESHOLD)

    stakes = [saving.observe(decision) for _ in range(NEEDED)]

    assert stakes[:-1] == [1.0] * (NEEDED - 1)
    assert stakes[-1] == pytest.approx(1.0)
    assert saving.usd > 0.0
