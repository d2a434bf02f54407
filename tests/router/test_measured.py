"""What labels say, whoever lies: no tenant decides alone, nothing counts twice, drops are told."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.quality.measured import MOST_TENANT_WEIGHT, Measured
from tandem_router.store.records import Label

TIERS = ("small", "large")
PREDICTED = {"small": 0.7, "large": 0.9}


def judged(
    number: int, rng: random.Random, small: float = 0.7, large: float = 0.9, **more: Any
) -> Label:
    tier = "small" if number % 2 else "large"
    quality = {"small": float(rng.random() < small), "large": float(rng.random() < large)}
    fields = {"tenant": "a", "probability": 0.1, "predicted": PREDICTED, **more}
    return Label(f"r{number}", "judge", float(number), fields.pop("tenant"), tier,
                 fields.pop("probability"), quality, **fields)  # fmt: skip


def labelled(num: int = 400, seed: int = 1) -> Measured:
    """Half the requests to each tier, of two tenants, one in ten judged."""
    rng, measured = random.Random(seed), Measured(TIERS, "large")
    for number in range(10 * num):
        tier = "small" if number % 2 else "large"
        measured.served("a" if number % 5 else "b", tier, PREDICTED)
    for number in range(num):
        measured.learn(judged(number, rng, tenant="a" if number % 5 else "b"))
    return measured


def feedback(number: int, tenant: str, score: float) -> Label:
    return Label(f"f{number}", "feedback", 1e4 + number, tenant, "small", 1.0, {"small": score},
                 predicted=PREDICTED)  # fmt: skip


def test_ratios_are_of_what_was_delivered_by_tenant_and_of_each_tier() -> None:
    measured = labelled()

    whole, small, large = measured.ratio(), measured.tier("small"), measured.tier("large")

    assert whole.ratio == pytest.approx((0.7 + 0.9) / 1.8, abs=0.06)
    assert small.ratio == pytest.approx(0.7 / 0.9, abs=0.08)
    assert large.ratio == pytest.approx(1.0)
    assert measured.ratio("a").num_labels + measured.ratio("b").num_labels == whole.num_labels
    assert measured.predicted_ratio() == pytest.approx(1.6 / 1.8)


@pytest.mark.parametrize(("tenant", "most"), [("a", 0.05), ("b", 0.05), ("c", 0.0)])
def test_a_tenant_that_always_says_bad_moves_the_ratio_by_no_more_than_its_part(
    tenant: str, most: float
) -> None:
    measured, praised = labelled(), labelled()
    before = measured.ratio().ratio

    for number in range(3000):
        measured.learn(feedback(number, tenant, 0.0))
        praised.learn(feedback(number, tenant, 1.0))
    after, high = measured.ratio(), praised.ratio()

    assert before is not None
    assert after.ratio is not None
    assert high.ratio is not None
    assert abs(after.ratio - before) <= most + 1e-9
    assert high.ratio - after.ratio <= most + 1e-9
    # What cannot be known for certain only widens the interval.
    assert after.low is not None
    assert after.low <= after.ratio


def test_a_small_tenant_counts_by_its_traffic() -> None:
    measured = labelled()
    for _ in range(40):
        measured.served("tiny", "small", PREDICTED)
    before = measured.ratio().ratio or 0.0

    for number in range(3000):
        measured.learn(feedback(number, "tiny", 0.0))

    share = 40 / (4000 + 40)
    assert 0.0 < before - (measured.ratio().ratio or 0.0) <= share < MOST_TENANT_WEIGHT


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 0.5, 1.0])), max_size=60))
def test_only_the_last_word_on_an_answer_counts(said: list[tuple[int, float]]) -> None:
    measured, once = Measured(TIERS, "large"), Measured(TIERS, "large")
    for each in (measured, once):
        each.served("a", "small", PREDICTED)
    last = dict(said)

    for number, score in said:
        measured.learn(feedback(number, "a", score))
    for number, score in last.items():
        once.learn(feedback(number, "a", score))

    assert measured.feedback() == pytest.approx(once.feedback(), abs=1e-9)


def test_labels_that_contradict_each_other_leave_a_wide_interval() -> None:
    """The first verdict on a request stands; another judge's is not a second request."""
    measured, rng = Measured(TIERS, "large"), random.Random(3)
    for _ in range(2000):
        measured.served("a", "small", PREDICTED)
    for number in range(200):
        label = judged(number, rng, small=0.5)
        measured.learn(label)
        flipped = {tier: 1.0 - quality for tier, quality in label.quality.items()}
        measured.learn(replace(label, source="cascade", quality=flipped))

    found = measured.ratio()

    assert measured.num_labels == found.num_labels == 200
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low > 0.1


def test_gold_labels_correct_a_judge_that_lies() -> None:
    measured, rng = Measured(TIERS, "large"), random.Random(4)
    for number in range(20_000):
        measured.served("a", "small" if number % 2 else "large", PREDICTED)
    for number in range(2000):
        truth = judged(number, rng)
        lie = {**truth.quality, "small": 1.0}  # it always likes the small tier
        measured.learn(replace(truth, quality=lie))
        if number % 5 == 0:
            measured.learn(replace(truth, source="gold", gold=True, probability=0.2))

    small = measured.tier("small")

    assert small.num_gold == 400
    assert small.ratio == pytest.approx(0.7 / 0.9, abs=0.08)
    assert small.low is not None
    assert small.high is not None
    assert small.low <= 0.7 / 0.9 <= small.high


def test_a_drop_is_told_with_its_statistic_and_what_was_learned_before_is_forgotten() -> None:
    rng, measured, told = random.Random(5), Measured(TIERS, "large"), []
    measured.on_change = told.append
    for number in range(600):
        measured.learn(judged(number, rng, small=0.7 if number < 400 else 0.2))

    (change,) = told
    assert (change.tier, change.rose) == ("small", False)
    assert 400 < change.at < 500
    assert change.statistic >= 7.0
    assert change.after < change.before
    assert measured.since == change.at
    assert measured.num_labels == 600 - int(change.at) - 1
    assert measured.state()["changes"][0]["tier"] == "small"


def test_steady_traffic_raises_no_alarm() -> None:
    for seed in range(5):
        rng, measured = random.Random(seed), Measured(TIERS, "large")
        for number in range(1500):
            measured.learn(judged(number, rng))
        assert not measured.changes


def test_without_labels_nothing_is_measured_and_state_is_json() -> None:
    import json

    measured = Measured(TIERS, "large")
    measured.served("a", "small", {})
    measured.learn(Label("g", "gold", 1.0, "a", "small", 0.5, {"small": 1.0}, gold=True))

    state = json.loads(json.dumps(measured.state(), allow_nan=False))

    assert state["measured"] is None
    assert state["predicted"] is None
    assert state["labels_by_source"] == {"gold": 1}


def test_after_a_refutation_only_what_is_delivered_since_counts_and_tiers_stay_known() -> None:
    rng, measured = random.Random(3), Measured(TIERS, "large")
    for number in range(600):
        measured.served("a", "small", PREDICTED)
        measured.learn(replace(judged(number, rng, small=0.5), tier="small"))
    broken, small = measured.ratio(), measured.tier("small")

    measured.delivers_otherwise(600.0)
    nothing_yet = measured.ratio()
    for number in range(601, 700):
        measured.served("a", "large", PREDICTED)
        measured.learn(replace(judged(number, rng, small=0.5), tier="large"))
    again = measured.ratio()

    assert broken.high is not None
    assert broken.high < 0.9
    assert (nothing_yet.ratio, nothing_yet.num_labels) == (None, 0)
    assert again.low is not None
    assert again.low > 0.95
    assert again.num_labels > 90
    assert measured.since == 600.0
    # What the small tier is worth is known from all labels.
    assert measured.tier("small").num_labels > 690
    assert small.num_labels == 600
