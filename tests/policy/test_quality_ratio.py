"""The measured quality ratio: right on average, covered at any time, cheap with a good judge."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_router.control.floor_limit import FloorLimit
from tandem_router.control.quality_ratio import MIN_GOLD, MIN_LABELS, Estimate, Sample, estimate
from tandem_router.control.shadow_sampler import ShadowLabel


class World:
    """20,000 requests of which the truth is known, a biased predictor, an erring judge."""

    def __init__(self, seed: int, right: float = 1.0, gold: float = 0.0, bias: float = 0.05):
        rng = np.random.default_rng(seed)
        num = 20_000
        hard = rng.beta(2, 2, num)
        p_small, p_large = np.clip(1 - 0.9 * hard, 0, 1), np.clip(1 - 0.35 * hard, 0, 1)
        small, large = (rng.random((2, num)) < (p_small, p_large)).astype(float)
        noisy = [
            np.clip(p + bias * k + rng.normal(0, 0.15, num), 0, 1)
            for p, k in ((p_small, 1), (p_large, 0))
        ]
        self.goes_small = (noisy[1] - noisy[0]) < 0.2
        self.truth_of = np.stack([np.where(self.goes_small, small, large), large], axis=1)
        said = np.where(rng.random((2, num)) < right, (small, large), (1 - small, 1 - large))
        judged = np.stack([np.where(self.goes_small, said[0], said[1]), said[1]], axis=1)
        predicted = np.stack([np.where(self.goes_small, noisy[0], noisy[1]), noisy[1]], axis=1)
        drawn = np.flatnonzero(rng.random(num) < 0.05)
        is_gold = rng.random(len(drawn)) < gold
        self.truth = self.truth_of[:, 0].mean() / self.truth_of[:, 1].mean()
        self.whole = Sample(
            np.full(len(drawn), 20.0),
            judged[drawn],
            predicted[drawn],
            np.where(is_gold[:, None], self.truth_of[drawn], np.nan),
            np.full(len(drawn), 1.0 / max(gold, 1e-9)),
            predicted.mean(axis=0),
            num,
        )

    def after(self, num: int) -> Sample:
        """The first labels only."""
        s = self.whole
        parts = (s.weight, s.judged, s.predicted, s.gold, s.gold_weight)
        return Sample(*(part[:num] for part in parts), s.traffic, s.num_traffic)


def covers(found: Estimate, truth: float) -> bool:
    assert found.low is not None
    assert found.high is not None
    return found.low <= truth <= found.high


@pytest.mark.parametrize(("right", "gold"), [(1.0, 0.0), (0.85, 0.3), (0.8, 0.5)])
def test_the_interval_holds_at_every_look_though_predictor_and_judge_are_wrong(
    right: float, gold: float
) -> None:
    missed = 0
    for seed in range(40):
        world = World(seed, right, gold)
        looks = range(100, len(world.whole.weight), 100)
        missed += not all(covers(estimate(world.after(num)), world.truth) for num in looks)

    assert missed <= 4


def test_a_judge_that_errs_without_gold_labels_is_believed_and_with_them_corrected() -> None:
    believed = [estimate(World(seed, 0.8).whole).ratio for seed in range(20)]
    worlds = [World(seed, 0.8, 0.5) for seed in range(20)]
    corrected = [(estimate(world.whole).ratio or 0.0) - world.truth for world in worlds]

    bias = np.mean([(ratio or 0.0) - World(seed, 0.8).truth for seed, ratio in enumerate(believed)])
    assert abs(bias) > 0.02
    assert abs(float(np.mean(corrected))) < 0.01


def test_a_good_judge_saves_gold_labels_and_a_senseless_one_costs_none() -> None:
    def half(right: float, seed: int, use_judge: bool = True) -> float:
        sample = World(seed, right, 0.3).whole
        if not use_judge:
            known = np.isfinite(sample.gold).all(axis=1)
            sample = Sample(
                sample.weight[known],
                sample.gold[known],
                np.zeros((known.sum(), 2)),
                np.full((known.sum(), 2), np.nan),
                np.ones(known.sum()),
                np.zeros(2),
                sample.num_traffic,
            )
        found = estimate(sample)
        return (found.high or 0.0) - (found.ratio or 0.0)

    plain = np.mean([half(0.9, seed, use_judge=False) for seed in range(10)])
    judged = np.mean([half(0.9, seed) for seed in range(10)])
    coin = np.mean([half(0.5, seed) for seed in range(10)])
    assert (judged / plain) ** 2 < 0.75
    assert coin < 1.05 * plain


def test_few_labels_say_nothing_and_labels_that_agree_prove_little() -> None:
    def agreeing(num: int) -> Estimate:
        ones = np.ones((num, 2))
        nan = np.full((num, 2), np.nan)
        return estimate(
            Sample(np.ones(num), ones, ones * 0.9, nan, np.ones(num), np.array([0.9, 0.9]), 1000)
        )

    assert agreeing(MIN_LABELS - 1).ratio is None
    few, many = agreeing(MIN_LABELS), agreeing(3000)
    assert few.ratio == many.ratio == pytest.approx(1.0)
    assert few.low is not None
    assert few.low < 0.95
    assert many.low is not None
    assert many.low > 0.98


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(*(st.sampled_from([0.0, 0.5, 1.0]) for _ in range(4)), st.floats(0.01, 1.0)),
        min_size=MIN_LABELS,
        max_size=80,
    ),
    st.integers(0, 80),
)
def test_whatever_is_said_the_numbers_are_numbers(
    rows: list[tuple[float, float, float, float, float]], num_gold: int
) -> None:
    table = np.array(rows)
    gold = np.where(np.arange(len(rows))[:, None] < num_gold, 1.0 - table[:, :2], np.nan)
    sample = Sample(
        1.0 / table[:, 4],
        table[:, :2],
        table[:, 2:4],
        gold,
        np.full(len(rows), 2.0),
        table[:, 2:4].mean(axis=0),
        5000,
    )

    found = estimate(sample)

    assert found.ratio is not None
    assert found.low is not None
    assert found.high is not None
    assert 0.0 <= found.low <= found.ratio <= found.high < np.inf
    assert found.num_gold == min(num_gold, len(rows))
    assert MIN_GOLD <= MIN_LABELS


# The limit of the threshold.


def labels_of(rng: np.random.Generator, num: int, small: float, bias: float = 0.0):  # type: ignore[no-untyped-def]
    """Labels of easy (gain .05) and hard (gain .4) requests; `small` shifts the small tier."""
    for _ in range(num):
        gain = 0.05 if rng.random() < 0.5 else 0.4
        p_large = 0.9
        p_small = p_large - gain
        yield ShadowLabel(
            gain,
            float(rng.random() < p_small + small),
            float(rng.random() < p_large),
            1.0,
            p_small + bias,
            p_large,
        )


def limit_at(floor: float = 0.95) -> FloorLimit:
    limit = FloorLimit(floor, 0.1)
    for number in range(200):
        limit.observe(0.05 if number % 2 else 0.4, 0.9)
    return limit


def test_the_predicted_limit_holds_until_labels_certify_more() -> None:
    rng = np.random.default_rng(1)
    limit = limit_at()
    assert limit.basis == "Predicted"
    assert limit.threshold == pytest.approx(0.05)

    for label in labels_of(rng, 4000, small=0.1):
        limit.learn(label, limit.threshold)

    assert limit.basis == "Certified"
    assert limit.threshold >= 0.05
    assert limit.clip(0.9) == limit.threshold
    assert limit.clip(-0.5) == -0.5


def test_a_small_tier_that_got_worse_refutes_the_prediction_within_hundreds_of_labels() -> None:
    rng = np.random.default_rng(2)
    limit = limit_at()
    for label in labels_of(rng, 300, small=0.0):
        limit.learn(label, limit.threshold)
    assert not limit.refuted

    needed = 0
    for label in labels_of(rng, 1000, small=-0.5):
        limit.learn(label, limit.threshold)
        needed += 1
        if limit.refuted:
            break

    assert needed < 200
    assert limit.basis == "Refuted"
    assert limit.threshold < 0.05


def test_a_biased_predictor_is_corrected_by_what_labels_say() -> None:
    """Small is worse by .3 on every prompt than the predictor has it."""
    rng = np.random.default_rng(3)
    limit = limit_at(0.9)
    before = limit.threshold
    for label in labels_of(rng, 60, small=-0.3):
        limit.learn(label, limit.threshold)

    for number in range(64):
        limit.observe(0.05 if number % 2 else 0.4, 0.9)

    assert limit.threshold < before


def test_another_floor_begins_anew_and_senseless_labels_are_ignored() -> None:
    rng = np.random.default_rng(4)
    limit = limit_at()
    for label in labels_of(rng, 500, small=-0.6):
        limit.learn(label, limit.threshold)
    assert limit.refuted

    limit.set_floor(0.5)
    limit.learn(ShadowLabel(float("nan"), 1.0, 1.0, 1.0), 0.1)

    assert not limit.refuted
    assert limit.num_labels == 0
    assert limit.basis == "Predicted"


def test_without_stated_qualities_only_labels_limit() -> None:
    rng = np.random.default_rng(5)
    limit = FloorLimit(0.95, 0.5, predicts=False, thresholds=np.linspace(0, 1, 51))
    assert limit.clip(0.5) == 0.5

    for label in labels_of(rng, 600, small=-0.4):
        limit.learn(label, 0.5)

    assert limit.basis == "Refuted"
    assert limit.clip(0.5) < 0.5
