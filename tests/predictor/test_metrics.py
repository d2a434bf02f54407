"""The routing metrics are exact: checked against enumeration and by their own laws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.predictor.evaluation import metrics

numbers = st.floats(0, 1, allow_nan=False)


def test_the_curve_of_a_known_case() -> None:
    first, second = np.array([1.0, 0.0, 0.0, 1.0]), np.array([1.0, 1.0, 1.0, 0.0])

    curve = metrics.curve(np.array([0.1, 0.9, 0.8, 0.0]), first, second)

    np.testing.assert_allclose(curve.quality, [0.5, 0.75, 1.0, 1.0, 0.75])
    assert curve.apgr() == pytest.approx((0 + 1 + 2 + 2 + 0.5) / 4)
    assert curve.cpt(50.0) == pytest.approx(0.125)
    assert curve.saved(0.0) == pytest.approx(0.75)


def test_ties_count_as_the_mean_over_all_orders() -> None:
    draw = np.random.default_rng(0)
    first, second = draw.random(5), draw.random(5) + 0.3
    score = np.array([1.0, 0.0, 0.0, 0.0, 2.0])
    orders = [[4, 0, *rest] for rest in itertools.permutations([1, 2, 3])]

    exact = metrics.curve(score, first, second).quality
    listed = [
        metrics.curve(-np.argsort(np.array(order)).astype(float), first, second).quality
        for order in orders
    ]

    np.testing.assert_allclose(exact, np.mean(listed, axis=0))


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=40))
def test_a_constant_score_is_random_routing(rows: list[tuple[float, float]]) -> None:
    first, second = np.array(rows).T

    curve = metrics.curve(np.zeros(len(rows)), first, second)

    if curve.routable:
        assert curve.apgr() == pytest.approx(0.5)
        assert curve.cpt(80.0) == pytest.approx(0.8)


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=3, max_size=40))
def test_no_score_beats_the_oracle_and_a_score_and_its_opposite_add_up(
    rows: list[tuple[float, float, float]],
) -> None:
    score, first, second = np.array(rows).T
    curve = metrics.curve(score, first, second)
    if not curve.routable:
        assert curve.apgr() is None
        return

    own, oracle = curve.apgr(), metrics.apgr(second - first, first, second)
    opposite = metrics.apgr(-score, first, second)

    assert own is not None
    assert oracle is not None
    assert opposite is not None
    assert own <= oracle + 1e-6 * (1 + abs(oracle))
    assert own + opposite == pytest.approx(1.0, abs=1e-6 * (1 + abs(oracle)))


def test_calibration_error_of_known_cases() -> None:
    predicted = np.repeat([0.2, 0.8], 500)
    actual = np.tile([1, 0, 0, 0, 0], 100).astype(float)

    assert metrics.expected_calibration_error(predicted[:500], actual, 1) == pytest.approx(0.0)
    assert metrics.expected_calibration_error(predicted[500:], actual, 1) == pytest.approx(0.6)


def test_bins_of_equal_width_and_of_equal_count() -> None:
    predicted = np.array([0.1, 0.1, 0.1, 0.95])
    actual = np.array([0.0, 0.0, 0.0, 1.0])

    by_width = metrics.expected_calibration_error(predicted, actual)
    by_count = metrics.adaptive_calibration_error(predicted, actual, 2)

    assert by_width == pytest.approx((3 * 0.1 + 0.05) / 4)
    assert by_count == pytest.approx((2 * 0.1 + abs(0.1 - 0.05)) / 4)
    assert metrics.expected_calibration_error(np.ones(3), np.ones(3)) == 0.0


def test_an_exact_predictor_shows_the_noise_and_a_wrong_one_more() -> None:
    draw = np.random.default_rng(0)
    chance = draw.uniform(0.5, 0.8, 800)
    actual = (draw.random(800) < chance).astype(float)

    noise = metrics.calibration_noise(chance, metrics.expected_calibration_error)
    more_rows = metrics.calibration_noise(np.tile(chance, 16), metrics.expected_calibration_error)

    assert more_rows == pytest.approx(noise / 4.0, rel=0.2)
    assert metrics.expected_calibration_error(chance, actual) < 2.5 * noise
    assert metrics.expected_calibration_error(chance - 0.2, actual) > 4.0 * noise


def test_pinball_is_least_at_the_quantile() -> None:
    actual = np.arange(101.0)
    losses = [metrics.pinball(np.full(101, q), actual, 0.9) for q in (50.0, 90.0, 99.0)]

    assert losses[1] == min(losses)


def test_bootstrap_intervals_hold_the_truth_and_draw_groups_whole() -> None:
    groups = np.repeat(np.arange(50), 2)
    samples = list(metrics.resamples(groups, 20, 0))

    for rows in samples:
        counts = np.bincount(rows, minlength=100)
        assert (counts[0::2] == counts[1::2]).all()
    values = np.random.default_rng(1).normal(3.0, 1.0, 400)
    found = metrics.interval([values[r].mean() for r in metrics.resamples(np.arange(400), 200, 0)])
    assert found is not None
    assert found[0] < 3.0 < found[1]
    assert metrics.interval([None, None, 1.0]) is None


def test_auc_is_the_share_of_pairs_in_order_and_ties_count_half() -> None:
    right = np.array([1.0, 0.0, 1.0, 0.0])

    assert metrics.auc(np.array([0.9, 0.1, 0.8, 0.2]), right) == 1.0
    assert metrics.auc(np.array([0.9, 0.85, 0.8, 0.2]), right) == 0.75
    assert metrics.auc(np.full(4, 0.3), right) == 0.5
    assert metrics.auc(np.array([0.9, 0.1]), np.ones(2)) is None


@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=2, max_size=40).filter(
        lambda rows: len({label for _, label in rows}) == 2
    )
)
def test_auc_is_what_counting_all_pairs_gives(rows: list[tuple[int, int]]) -> None:
    score, right = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    good, bad = score[right == 1.0], score[right == 0.0]
    counted = np.mean([(g > b) + 0.5 * (g == b) for g in good for b in bad])

    assert metrics.auc(score, right) == pytest.approx(counted)


def test_the_false_positive_rate_is_of_the_wrong_answers() -> None:
    score, right = np.array([0.9, 0.6, 0.4, 0.1]), np.array([1.0, 0.0, 0.0, 0.5])

    assert metrics.false_positive_rate(score, right) == pytest.approx(1.0 / 2.5)
    assert metrics.false_positive_rate(score, np.ones(4)) is None
