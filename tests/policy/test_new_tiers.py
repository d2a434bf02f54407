"""A tier that the predictor has never seen is looked at, learned and weighed; pure."""

from __future__ import annotations

import random

import pytest

from tandem_router.policy import PlainScore
from tandem_router.quality.shadow_gate import Explored, ShadowGate
from tandem_router.routing.new_tiers import ENOUGH, FIRST, NewTiers
from tandem_router.store.records import Label


def new_tiers() -> NewTiers:
    found = NewTiers()
    found.set_tiers(("new", "small", "large"), ("small", "large"))
    return found


def label(number: int, new: float, large: float, small: float = 0.6) -> Label:
    predicted = {"small": small, "large": 0.9}
    quality = {"new": new, "large": large}
    return Label(f"r{number}", "judge", float(number), "a", "large", 0.5, quality,
                 predicted=predicted)  # fmt: skip


def test_a_new_tier_is_not_weighed_before_enough_is_known_and_then_as_it_proved() -> None:
    found, rng = new_tiers(), random.Random(1)
    score = PlainScore({"small": 0.6, "large": 0.9})
    for number in range(FIRST - 1):
        found.learn(label(number, float(rng.random() < 0.85), float(rng.random() < 0.9)))

    assert found.complete(score) is score
    for number in range(FIRST, 200):
        found.learn(label(number, float(rng.random() < 0.85), float(rng.random() < 0.9)))
    completed = found.complete(score)

    assert completed is not None
    assert completed.quality["new"] == pytest.approx(0.85, abs=0.08)
    assert (completed.quality["small"], completed.quality["large"]) == (0.6, 0.9)
    assert found.state() == {"new": 199}


def test_what_is_hard_for_the_known_tiers_is_learned_to_be_hard_for_the_new_one() -> None:
    found, rng = new_tiers(), random.Random(2)
    for number in range(400):
        small = rng.choice((0.2, 0.8))
        found.learn(label(number, float(rng.random() < small), 0.9, small))

    easy, hard = (
        found.complete(PlainScore({"small": small, "large": 0.9})) for small in (0.8, 0.2)
    )

    assert easy is not None
    assert hard is not None
    assert easy.quality["new"] - hard.quality["new"] > 0.4


def test_a_judges_level_is_not_the_new_tiers() -> None:
    """A judge that finds everything bad finds the known tier bad, too."""
    found = new_tiers()
    for number in range(100):
        found.learn(label(number, 0.4, 0.45))

    completed = found.complete(PlainScore({"small": 0.6, "large": 0.9}))

    assert completed is not None
    assert completed.quality["new"] == pytest.approx(0.85, abs=0.03)


def test_it_is_looked_at_until_enough_is_known_and_no_longer_new_to_another_predictor() -> None:
    found = new_tiers()
    assert found.to_explore == "new"
    for number in range(ENOUGH):
        found.learn(label(number, 1.0, 1.0))
    assert found.to_explore is None

    found.set_tiers(("new", "small", "large"), ("new", "small", "large"))
    score = PlainScore({"new": 0.1, "small": 0.6, "large": 0.9})
    assert found.complete(score) is score
    assert found.num == 0


@pytest.mark.parametrize("known", [None, (), ("other",)])
def test_where_nothing_is_learned_no_tier_is_new(known: tuple[str, ...] | None) -> None:
    found = NewTiers()
    found.set_tiers(("small", "large"), known)

    assert (found.num, found.to_explore) == (0, None)


@pytest.mark.parametrize(
    ("chosen", "by_dearest", "tier", "beside"),
    [
        ("large", True, "new", None),
        ("small", True, "new", "large"),
        ("small", False, "new", None),
        ("new", True, "large", None),
    ],
)
def test_half_of_the_requests_look_at_it_whoever_answered(
    chosen: str, by_dearest: bool, tier: str, beside: str | None
) -> None:
    rng, gate = random.Random(3), ShadowGate(0.02, lambda tier, exploring: None)
    explored = Explored("new", 0.5, by_dearest)

    draws = [
        draw
        for number in range(2000)
        if (draw := gate.draw(number, rng.random(), chosen, "new", "large", False, explored))
    ]

    assert len(draws) == pytest.approx(1000, rel=0.1)
    assert {(draw.tier, draw.beside, draw.probability) for draw in draws} == {(tier, beside, 0.5)}


def test_a_tier_that_cannot_take_shadows_is_not_looked_at() -> None:
    gate = ShadowGate(0.02, lambda tier, exploring: "it is slow" if tier == "large" else None)

    found = gate.draw(0.0, 0.0, "small", "new", "large", False, Explored("new", 0.5))

    assert found is None
    assert gate.skipped == {"it is slow": 1}
