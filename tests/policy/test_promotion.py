"""A retrained predictor takes over where it proves better, and goes where it does not."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.control.promotion import Compared, PairedTest, PredictorLife


def label(
    rng: random.Random, in_use: float, other: float, right: float = 0.7, differ: float = 1.0
) -> list[Compared]:
    """A coin that falls on 1 with `right`; on a share of labels both say what they say of it."""
    if rng.random() >= differ:
        return [Compared(1.0, 0.5, 0.5)]
    return [Compared(float(rng.random() < right), in_use, other)]


def run(seed: int, most: int = 1000, **of: float) -> tuple[str | None, int]:
    rng, test = random.Random(seed), PairedTest(0.05, most)
    for number in range(most):
        verdict = test.observe(label(rng, **of))
        if verdict is not None:
            return verdict, number + 1
    return None, most


def test_a_better_predictor_is_found_better_and_a_worse_one_worse() -> None:
    better = [run(seed, in_use=0.4, other=0.7) for seed in range(40)]
    worse = [run(seed, in_use=0.7, other=0.4) for seed in range(40)]

    assert sum(verdict == "better" for verdict, _ in better) >= 38
    assert sum(verdict == "worse" for verdict, _ in worse) >= 38
    assert sorted(num for _, num in better)[20] < 120


def test_a_candidate_that_halves_a_bias_of_ten_points_is_seen_within_three_hundred_labels() -> None:
    found = [run(seed, in_use=0.8, other=0.75) for seed in range(40)]

    assert [verdict for verdict, _ in found].count("better") >= 38
    assert sorted(num for _, num in found)[20] < 300


@pytest.mark.parametrize(
    "of",
    [
        # As far from the truth on either side: equal in expectation, different on every label.
        {"in_use": 0.6, "other": 0.8, "right": 0.7},
        {"in_use": 0.94, "other": 1.0, "right": 0.97},
        {"in_use": 0.9, "other": 1.0, "right": 0.95, "differ": 0.02},
    ],
    ids=["coin", "nearly always right", "rarely different"],
)
def test_two_that_are_as_good_are_rarely_told_apart(of: dict[str, float]) -> None:
    verdicts = [run(seed, **of)[0] for seed in range(200)]

    assert verdicts.count("better") <= 0.05 * 200 + 6
    assert verdicts.count("worse") <= 0.05 * 200 + 6


@given(st.lists(st.tuples(st.floats(), st.floats(), st.floats(), st.floats()), max_size=60))
def test_no_numbers_break_the_test(rows: list[tuple[float, float, float, float]]) -> None:
    test = PairedTest(0.05, 50)
    for measured, in_use, other, weight in rows:
        test.observe([Compared(measured, in_use, other)], weight)

    assert math.isfinite(test.mean)
    assert test.num_labels <= len(rows)


def shadowed() -> PredictorLife:
    life = PredictorLife(3600.0, 100, most_labels=200)
    assert not life.due(0.0, 99)
    assert life.due(0.0, 100)
    life.began(0.0)
    assert not life.due(1e9, 10_000)
    life.trained(10.0, "v2", 150)
    return life


def feed(life: PredictorLife, active: str, in_use: float, other: float, num: int = 300) -> Any:
    """Labels of which the predictor in use, and the other one, are off by so much."""
    for number in range(num):
        tiers = [Compared(0.0, in_use, other)]
        said = life.observe(20.0 + number, active, tiers)
        if said is not None:
            return said
    return None


def test_a_candidate_that_predicts_better_is_promoted_and_then_watched() -> None:
    life = shadowed()

    assert feed(life, "v1", 0.3, 0.1) == "promote"
    assert (life.phase, life.other) == ("watched", "v1")
    assert life.steps[-1].kind == "promoted"
    assert life.steps[-1].version == "v2"


@pytest.mark.parametrize(("in_use", "other"), [(0.1, 0.3), (0.2, 0.2)], ids=["worse", "equal"])
def test_a_candidate_that_is_not_better_is_rejected(in_use: float, other: float) -> None:
    life = shadowed()

    assert feed(life, "v1", in_use, other) == "reject"
    assert (life.phase, life.other) == ("idle", None)
    assert "v1" in life.steps[-1].why


def test_an_error_that_grew_is_called_larger() -> None:
    life = shadowed()
    feed(life, "v1", 0.1, 0.3)

    assert "squared error 0.0800 larger over " in life.steps[-1].why


def test_the_old_one_comes_back_where_it_proves_better() -> None:
    life = shadowed()
    feed(life, "v1", 0.3, 0.1)

    assert feed(life, "v2", 0.3, 0.1) == "roll back"
    assert life.steps[-1].kind == "rolled back"
    assert life.steps[-1].version == "v2"


def test_the_old_one_is_let_go_where_the_new_one_holds() -> None:
    life = shadowed()
    feed(life, "v1", 0.3, 0.1)

    assert feed(life, "v2", 0.1, 0.1) == "keep"
    assert life.phase == "idle"


def test_a_candidate_that_is_not_proven_makes_room_for_one_of_twice_the_labels() -> None:
    life = shadowed()

    assert not life.due(1e9, 149)
    assert not life.due(3599.0, 150)
    assert life.due(3600.0, 150)
    life.began(3600.0)

    assert (life.phase, life.other) == ("training", None)
    assert (life.steps[-1].kind, life.steps[-1].version) == ("rejected", "v2")


def test_a_fall_of_measured_quality_takes_a_promotion_back_and_nothing_else() -> None:
    life = shadowed()
    assert not life.quality_fell(20.0, "v1", "tier small went down")
    assert life.phase == "shadowed"
    feed(life, "v1", 0.3, 0.1)

    assert life.quality_fell(30.0, "v2", "tier small went down")
    assert not life.quality_fell(31.0, "v1", "again")


def test_trainings_keep_their_distance_and_a_failed_one_too() -> None:
    life = PredictorLife(3600.0, 10)
    life.began(0.0)
    life.failed(5.0, "no memory")

    assert not life.due(3599.0, 1000)
    assert life.due(3600.0, 10)
    assert life.steps[-1].why == "no memory"


def test_a_candidate_goes_when_what_it_was_trained_from_is_no_longer_so() -> None:
    life = shadowed()

    assert life.outdated(20.0, "tier small fell")
    assert not life.outdated(21.0, "again")
    assert (life.phase, life.steps[-1].kind, life.steps[-1].version) == ("idle", "rejected", "v2")


def test_another_process_goes_on_with_the_comparison_where_this_one_stopped() -> None:
    life, again = shadowed(), PredictorLife(3600.0, 100, most_labels=200)
    rng = random.Random(1)
    for number in range(60):
        life.observe(20.0 + number, "v1", label(rng, in_use=0.8, other=0.75))

    again.restore(json.loads(json.dumps(life.state())))

    assert again.state() == life.state()
    last = label(rng, in_use=0.8, other=0.75)
    assert again.observe(90.0, "v1", last) == life.observe(90.0, "v1", last)
    assert again.state() == life.state()
