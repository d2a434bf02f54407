"""A retrained predictor takes over where it proves better, and goes where it does not."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.control.promotion import PairedTest, PredictorLife


def errors(rng: random.Random, small: float, large: float) -> tuple[float, float]:
    """Squared errors of a predictor that says `small` and one that says `large`, of a coin."""
    truth = float(rng.random() < 0.7)
    return (truth - small) ** 2, (truth - large) ** 2


def run(known: float, tested: float, seed: int, most: int = 1000) -> tuple[str | None, int]:
    rng, test = random.Random(seed), PairedTest(0.05, most)
    for number in range(most):
        verdict = test.observe(*errors(rng, known, tested))
        if verdict is not None:
            return verdict, number + 1
    return None, most


def test_a_better_predictor_is_found_better_and_a_worse_one_worse() -> None:
    better = [run(0.4, 0.7, seed) for seed in range(40)]
    worse = [run(0.7, 0.4, seed) for seed in range(40)]

    assert sum(verdict == "better" for verdict, _ in better) >= 38
    assert sum(verdict == "worse" for verdict, _ in worse) >= 38
    assert sorted(num for _, num in better)[20] < 250


def test_two_that_are_as_good_are_rarely_told_apart() -> None:
    # .6 and .8 are as far from .7: equal in expectation, different on every label.
    verdicts = [run(0.6, 0.8, seed)[0] for seed in range(200)]

    assert verdicts.count("better") <= 0.05 * 200 + 6
    assert verdicts.count("worse") <= 0.05 * 200 + 6


@given(
    st.lists(st.tuples(st.floats(), st.floats(), st.floats()), max_size=60),
)
def test_no_numbers_break_the_test(rows: list[tuple[float, float, float]]) -> None:
    test = PairedTest(0.05, 50)
    for known, tested, weight in rows:
        test.observe(known, tested, weight)

    assert math.isfinite(test.mean)
    assert test.num_labels <= len(rows)


def shadowed() -> PredictorLife:
    life = PredictorLife(3600.0, 100, most_labels=200)
    assert not life.due(0.0, 99)
    assert life.due(0.0, 100)
    life.began(0.0)
    assert not life.due(1e9, 10_000)
    life.trained(10.0, "v2", 100)
    return life


def feed(life: PredictorLife, active: str, in_use: float, other: float, num: int = 300) -> Any:
    for number in range(num):
        said = life.observe(20.0 + number, active, in_use, other)
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
