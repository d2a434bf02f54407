"""Online controllers on a virtual clock: money, shares, quality, change."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_router.control import (
    ArrivalRate,
    Bucket,
    BudgetPacer,
    OnlineControl,
    QualityFloor,
    ResidualDrift,
    RoutingCurve,
    ShadowLabel,
    ShadowSampler,
    ShareTracker,
    TrafficShift,
    budget_bucket,
    price_of_money,
)
from tandem_router.policy import (
    PlainScore,
    PolicySetPoints,
    PolicyState,
    Reason,
    RouteRequest,
    TierOption,
    decide,
)

TIERS = (
    TierOption("small", usd_per_1m_input_tokens=0.2, usd_per_1m_output_tokens=0.6),
    TierOption("large", usd_per_1m_input_tokens=5.0, usd_per_1m_output_tokens=15.0),
)


# Money.

amounts = st.floats(0.0, 20.0)


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(st.tuples(st.floats(0.0, 30.0), amounts, st.floats(0.0, 1.0)), max_size=60),
    rate=st.floats(0.01, 1.0),
    capacity=st.floats(0.1, 30.0),
)
def test_spend_never_exceeds_what_the_bucket_held_plus_the_refill(steps, rate, capacity):
    now, spent = 0.0, 0.0
    bucket = Bucket(rate, capacity, now)
    open_reservations = []
    for elapsed, usd, part in steps:
        now += elapsed
        if bucket.hold(now, usd):
            open_reservations.append((usd, usd * part))
        if len(open_reservations) > 2:
            reserved, actual = open_reservations.pop(0)
            bucket.settle(now, reserved, actual)
            spent += actual
        assert spent <= capacity + rate * now + 1e-6
        assert bucket.left(now) >= -1e-6


def test_an_overrun_closes_the_bucket_until_the_debt_is_paid():
    bucket = Bucket(1.0, 10.0, now=0.0, level=2.0)

    assert bucket.hold(0.0, 1.0)
    bucket.settle(0.0, 1.0, 5.0)

    assert not bucket.hold(1.0, 0.5)
    assert bucket.hold(4.0, 0.5)


def test_a_clock_that_steps_back_refills_nothing():
    bucket = Bucket(1.0, 10.0, now=100.0, level=0.0)
    assert bucket.left(50.0) == 0.0
    assert bucket.left(101.0) == 1.0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), parts=st.tuples(st.floats(0.01, 1.2), st.floats(0.01, 1.2)))
def test_the_price_of_money_meets_the_target_and_falls_with_more_budget(seed, parts):
    rng = np.random.default_rng(seed)
    values = rng.random((200, 3))
    costs = rng.random((200, 3)) * np.array([0.1, 1.0, 5.0])
    everything = costs[np.arange(200), values.argmax(axis=1)].mean()
    cheapest = costs.min(axis=1).mean()
    low, high = sorted(cheapest + part * (everything - cheapest) for part in parts)

    price_low, price_high = (price_of_money(values, costs, target) for target in (low, high))

    assert price_high <= price_low
    for target, price in ((low, price_low), (high, price_high)):
        choice = (values - price * costs).argmax(axis=1)
        assert costs[np.arange(200), choice].mean() <= target + 1e-9


def test_arrival_rate_is_right_from_the_first_seconds_on():
    rate = ArrivalRate(30.0, now=0.0)
    for i in range(1, 101):
        rate.observe(i / 10)
    assert rate.per_s(10.0) == pytest.approx(10.0, rel=0.05)


def run_budget(
    usd_per_hour: float, rate_at, seconds: float, *, price_jump: float = 1.0, odd=0.0, seed=7
):
    """Replay Poisson arrivals whose rate is `rate_at(t)`; real costs jump half-way.

    odd: share of answers that cost ten times as much as expected.
    """
    rng = random.Random(seed)
    pacer = BudgetPacer(budget_bucket(usd_per_hour, 0.0), 0.0)
    control, state = OnlineControl(PolicySetPoints(), pacer=pacer), PolicyState()
    now, spent, quality, count, stops = 0.0, 0.0, 0.0, 0, 0
    while now < seconds:
        now += rng.expovariate(rate_at(now))
        p_small = rng.random() * 0.8
        score = PlainScore({"small": p_small, "large": min(1.0, p_small + rng.random() * 0.4)})
        request = RouteRequest(500, score, max_tokens=800)
        decision = decide(request, TIERS, control.set_points(now), state)
        count += 1
        if decision.tier is None:
            control.decided(now, decision, 500)
            continue
        assert pacer.bucket.hold(now, decision.reserve_cost_usd)
        control.decided(now, decision, 500)
        jump = price_jump if now > seconds / 2 else 1.0
        usd = decision.expected_cost_usd * rng.uniform(0.5, 1.5) * jump
        usd *= 10.0 if odd and rng.random() < odd else 1.0
        pacer.bucket.settle(now, decision.reserve_cost_usd, usd)
        control.answered(decision.tier, decision.expected_cost_usd, usd)
        spent += usd
        quality += score.quality[decision.tier]
        stops += decision.reason is Reason.BUDGET
    return spent / (usd_per_hour * now / 3600), quality / count, stops / count, pacer


def test_spend_is_within_one_percent_under_a_threefold_load_step():
    spend, _, stops, _ = run_budget(25.0, lambda t: 4.5 if 400 < t < 800 else 1.5, 1200.0)
    assert abs(spend - 1.0) < 0.01
    assert stops < 0.01


def test_spend_is_within_one_percent_when_answers_get_longer_than_predicted():
    spend, _, _, _ = run_budget(25.0, lambda t: 2.5, 1200.0, price_jump=1.5)
    assert abs(spend - 1.0) < 0.01


def test_spend_is_not_above_the_budget_where_one_answer_costs_what_a_hundred_requests_may():
    spends = [run_budget(4.0, lambda t: 2.0, 900.0, odd=0.02, seed=s)[0] for s in (0, 1)]
    assert max(spends) < 1.004
    assert min(spends) > 0.9


def test_more_budget_buys_more_quality():
    qualities = [run_budget(usd, lambda t: 2.0, 400.0)[1] for usd in (7.0, 14.0, 28.0)]
    assert qualities == sorted(qualities)


def test_a_budget_above_all_demand_costs_no_quality():
    _, _, _, pacer = run_budget(10_000.0, lambda t: 3.0, 60.0)
    assert pacer.lambda_per_usd == 0.0


# Shares.


@pytest.mark.parametrize("target", [0.1, 0.3, 0.5])
def test_share_stays_within_two_points_in_every_window_while_gains_shift(target):
    rng = np.random.default_rng(3)
    gains = np.concatenate([rng.normal(0.1, 0.1, 3000), rng.normal(0.25, 0.05, 3000)])
    tracker, large = ShareTracker(target), []
    for gain in gains:
        large.append(gain > tracker.threshold)
        tracker.observe(float(gain), bool(large[-1]))

    counts = np.concatenate([[0], np.cumsum(large)])
    worst = np.abs((counts[500:] - counts[:-500]) / 500 - target).max()

    assert worst <= 0.02


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_share_is_held_while_every_gain_is_above_or_below_all_before_it(target, direction):
    tracker, large = ShareTracker(target), []
    for step in range(4000):
        gain = direction * step / 10_000
        large.append(gain > tracker.threshold)
        tracker.observe(gain, large[-1])

    counts = np.concatenate([[0], np.cumsum(large)])
    worst = np.abs((counts[1000:] - counts[500:-500]) / 500 - target).max()

    assert worst <= 0.03


def test_share_is_held_even_when_all_gains_are_equal():
    tracker, large = ShareTracker(0.25), 0
    for _ in range(2000):
        took = tracker.threshold < 0.1
        large += took
        tracker.observe(0.1, took)
    assert large / 2000 == pytest.approx(0.25, abs=0.02)


def test_unusable_gains_do_not_move_the_scale():
    tracker = ShareTracker(0.5)
    for i in range(100):
        tracker.observe(i / 100, i % 2 == 0)
    before = tracker.threshold

    tracker.observe(math.nan, True)
    tracker.observe(None, False)

    assert tracker.threshold == pytest.approx(before, abs=1e-9)


# Quality.


def draw_labels(rng: np.random.Generator, count: int, small_drop: float = 0.0):
    gain = rng.uniform(-0.1, 0.4, count)
    large = (rng.random(count) < 0.85).astype(float)
    small = (rng.random(count) < 0.85 - gain - small_drop).astype(float)
    return gain, small, large


def test_the_floor_is_broken_in_at_most_the_stated_share_of_200_runs():
    """At any time of a run; the truth is known because the labels are drawn from it."""
    floor, risk = 0.95, 0.1
    grid = np.linspace(-0.1, 0.4, 21)
    # E[loss at t] = integral of the gain up to t; the floor allows 0.05 * 0.85.
    true_loss = np.array([(t * t - 0.01) / 2 / 0.5 for t in grid])
    broken = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        controller = QualityFloor(floor, risk, smallest_probability=0.1, thresholds=grid)
        sampler = ShadowSampler(0.1, 0.4)
        worst = -math.inf
        for gain, small, large in zip(*draw_labels(rng, 700), strict=True):
            chosen = "large" if gain > controller.threshold else "small"
            plan = sampler.draw(float(rng.random()), chosen, "small", "large")
            if plan:
                controller.observe(ShadowLabel(gain, small, large, plan.probability))
                worst = max(worst, controller.threshold)
        if worst > -math.inf:
            broken += true_loss[np.searchsorted(grid, worst - 1e-9)] > (1 - floor) * 0.85
    assert broken <= risk * 200


def certify(controller: QualityFloor, rng: np.random.Generator, count: int, drop: float = 0.0):
    alarms = 0
    for gain, small, large in zip(*draw_labels(rng, count, drop), strict=True):
        label = ShadowLabel(gain, small, large, 0.1, 0.85 - gain, 0.85)
        alarms += controller.observe(label)
    return alarms


def test_without_labels_everything_goes_to_the_large_tier():
    assert QualityFloor(0.95).threshold == -math.inf


def test_labels_certify_a_threshold_and_a_lower_floor_a_higher_one():
    strict, lax = (QualityFloor(f, smallest_probability=0.1) for f in (0.97, 0.9))
    for controller in (strict, lax):
        certify(controller, np.random.default_rng(1), 3000)
    assert -math.inf < strict.threshold < lax.threshold


def test_after_a_silent_regression_labels_are_forgotten_and_the_large_tier_takes_over():
    controller = QualityFloor(0.95, smallest_probability=0.1)
    rng = np.random.default_rng(2)
    certify(controller, rng, 3000)
    before = controller.threshold

    alarms = certify(controller, rng, 300, drop=0.4)

    assert before > 0.0
    assert alarms >= 1
    assert controller.threshold < before


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.floats(allow_nan=True, allow_infinity=True)] * 4), max_size=30))
def test_hostile_labels_never_certify_by_breaking_the_arithmetic(labels):
    controller = QualityFloor(0.99, smallest_probability=0.1)
    for numbers in labels:
        controller.observe(ShadowLabel(*numbers))
    assert not math.isnan(controller.threshold)
    assert np.isfinite(controller.log_capital).all()


def test_shadow_labels_weighted_by_their_probability_are_unbiased():
    rng = random.Random(5)
    sampler, total, weighted = ShadowSampler(0.05, 0.5), 0, 0.0
    for _ in range(40_000):
        chosen = "small" if rng.random() < 0.7 else "large"
        plan = sampler.draw(rng.random(), chosen, "small", "large")
        total += chosen == "small"
        if plan and chosen == "small":
            assert plan.tier == "large"
            weighted += 1 / plan.probability
    assert weighted == pytest.approx(total, rel=0.06)


# Change.


def test_traffic_shift_is_noticed_within_two_hundred_requests_and_not_before():
    rng, shift = np.random.default_rng(0), TrafficShift()
    quiet = [shift.observe(x, y) for x, y in rng.normal(size=(5000, 2))]
    moved = [shift.observe(x + 1.5, y) for x, y in rng.normal(size=(200, 2))]
    assert not any(quiet)
    assert sum(moved) == 1


def test_residual_drift_finds_a_drop_and_stays_quiet_on_noise():
    rng, drift = np.random.default_rng(0), ResidualDrift()
    p = rng.uniform(0.4, 0.9, 5000)
    quiet = sum(drift.observe(float(rng.random() < q), q) for q in p)
    found = sum(drift.observe(float(rng.random() < q - 0.25), q) for q in p[:200])
    assert quiet == 0
    assert found == 1


@pytest.mark.parametrize("right", [0.5, 0.9, 0.97, 1.0])
def test_steady_labels_raise_no_alarm_however_skewed(right):
    rng, drift = np.random.default_rng(1), ResidualDrift()

    assert sum(drift.observe(float(y < right), 0.8) for y in rng.random(8000)) == 0


def test_rare_failures_of_a_tier_that_is_well_predicted_are_found_in_two_hundred_labels():
    """One answer in five turns worthless; all others stay within .15 of what was predicted."""
    needed = []
    for seed in range(20):
        rng, drift = np.random.default_rng(seed), ResidualDrift()
        steady = np.clip(0.8 + 0.15 * rng.normal(size=600), 0.0, 1.0)
        worse = np.where(rng.random(600) < 0.2, 0.0, np.clip(steady[::-1], 0.0, 1.0))
        assert not any(drift.observe(float(y), 0.8) for y in steady)
        seen = (n for n, y in enumerate(worse, 1) if drift.observe(float(y), 0.8))
        needed.append(next(seen, 1000))

    assert max(needed) <= 200


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.6), (0.7, 0.4), (0.5, 0.8)])
def test_a_drift_of_three_points_in_ten_is_found_in_two_hundred_labels(before, after):
    needed = []
    for seed in range(20):
        rng, drift = np.random.default_rng(seed), ResidualDrift()
        for y in rng.random(400):
            assert not drift.observe(float(y < before), before)
        seen = (
            number
            for number, y in enumerate(rng.random(1000), 1)
            if drift.observe(float(y < after), before)
        )
        needed.append(next(seen, 1000))
        assert drift.rose == (after > before)

    assert float(np.median(needed)) < 200


# All together.


def test_disagreeing_controllers_rank_money_over_share_over_quality():
    floor = QualityFloor(0.9, smallest_probability=0.1)
    certify(floor, np.random.default_rng(1), 3000)
    share = ShareTracker(0.2)
    for i in range(200):
        share.observe(i / 400, i % 5 == 0)
    base = PolicySetPoints(gain_threshold=0.01, fallback_tier="small")

    only_floor = OnlineControl(base, floor=floor).set_points(0.0)
    ceiling = OnlineControl(base, floor=floor, share=share, share_ceiling=True).set_points(0.0)
    money = OnlineControl(
        base, floor=floor, pacer=BudgetPacer(budget_bucket(1.0, 0.0), 0.0)
    ).set_points(0.0)

    assert only_floor.gain_threshold == floor.threshold
    assert ceiling.gain_threshold == max(floor.threshold, share.threshold)
    assert money.budget_remaining_usd == pytest.approx(150 / 3600)
    assert money.fallback_tier == "small"


@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_set_points_are_numbers_that_json_can_hold_from_the_first_request_on(target):
    control = OnlineControl(PolicySetPoints(), share=ShareTracker(target), share_ceiling=True)
    for step in range(40):
        assert math.isfinite(control.set_points(float(step)).gain_threshold)
        control.share.observe(step / 100, True)

    uncertified = OnlineControl(PolicySetPoints(), floor=QualityFloor(0.95))
    assert math.isfinite(uncertified.set_points(0.0).gain_threshold)


def test_a_floor_that_expects_more_labels_than_are_drawn_is_refused():
    sampler = ShadowSampler(after_small=0.01)

    with pytest.raises(ValueError, match=r"give it `sampler\.smallest_probability`"):
        OnlineControl(PolicySetPoints(), floor=QualityFloor(0.95), sampler=sampler)


def test_the_routing_curve_predicts_what_each_threshold_would_do():
    rng, curve = random.Random(4), RoutingCurve(window=300)
    scores = []
    for _ in range(300):
        small = rng.random() * 0.7
        scores.append(PlainScore({"small": small, "large": small + rng.random() * 0.3}))
        curve.observe(decide(RouteRequest(100, scores[-1]), TIERS, PolicySetPoints()))

    points = curve.points()

    assert points[0].shares["large"] == 1.0
    assert points[0].quality_ratio == pytest.approx(1.0)
    assert points[-1].shares["small"] == 1.0
    ratios = [point.quality_ratio for point in points]
    assert ratios == sorted(ratios, reverse=True)
    for point in points:
        routed = [
            decide(RouteRequest(100, s), TIERS, PolicySetPoints(gain_threshold=point.threshold))
            for s in scores
        ]
        share = sum(decision.tier == "large" for decision in routed) / len(routed)
        assert share == pytest.approx(point.shares["large"], abs=0.01)


def test_an_empty_or_unscored_curve_has_no_points():
    curve = RoutingCurve()
    curve.observe(decide(RouteRequest(100), TIERS, PolicySetPoints()))
    assert curve.points() == ()
