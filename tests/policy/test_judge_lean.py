"""A judge that errs sees losses too small; gold labels say by how much the floor is corrected."""

from __future__ import annotations

import random

import pytest

from tandem_router.control.floor_limit import FloorLimit
from tandem_router.control.shadow_sampler import ShadowLabel
from tandem_router.quality.measured import Measured
from tandem_router.store.records import Label

ERRS = 0.15


def judged(rng: random.Random, small: float, large: float) -> tuple[float, float]:
    """A verdict on two answers; one that is wrong is one of the other two."""
    lean = (large > small) - (large < small)
    if rng.random() < ERRS:
        lean = rng.choice([one for one in (-1, 0, 1) if one != lean])
    return float(lean <= 0), float(lean >= 0)


def measured(num: int, every_gold: int, errs: bool = True) -> Measured:
    """Requests that the small tier answered, right in 70 of 100 cases; the large one in 95."""
    rng, found = random.Random(3), Measured(("small", "large"), "large")
    predicted = {"small": 0.7, "large": 0.95}
    for number in range(num):
        truth = float(rng.random() < 0.7), float(rng.random() < 0.95)
        said = judged(rng, *truth) if errs else truth
        found.served("t", "small", predicted)
        for source, (small, large) in (("judge", said), ("gold", truth)):
            if source == "gold" and number % every_gold:
                continue
            quality = {"small": small, "large": large}
            probability = 0.5 if source == "judge" else 1.0 / every_gold
            found.learn(
                Label(
                    f"r{number}",
                    "judge" if source == "judge" else "gold",
                    float(number),
                    "t",
                    "small",
                    probability,
                    quality,
                    predicted=predicted,
                )
            )
    return found


def test_the_factor_is_that_by_which_verdicts_draw_answers_together() -> None:
    # A wrong verdict makes a loss nothing, or its opposite: three quarters of it are left.
    assert measured(2000, 4).judge_lean("small", "large") == pytest.approx(
        1.0 / (1.0 - 1.5 * ERRS), rel=0.15
    )


def test_a_judge_that_is_right_and_one_whom_nobody_checked_are_taken_at_their_word() -> None:
    assert measured(2000, 4, errs=False).judge_lean("small", "large") == pytest.approx(1, abs=0.02)
    assert measured(60, 4).judge_lean("small", "large") == 1.0


def limit(lean: float, floor: float = 0.9, num: int = 3000) -> float:
    """Certified from a judge's verdicts on three kinds of prompts, of which gains are known."""
    rng, found = random.Random(5), FloorLimit(floor, -1.0, predicts=False)
    for number in range(num):
        gain = (0.0, 0.25, 0.35)[number % 3]
        truth = float(rng.random() < 0.95 - gain), float(rng.random() < 0.95)
        small, large = judged(rng, *truth)
        found.learn(ShadowLabel(gain, small, large, 1.0), 0.0)
        if number == num // 2:
            found.judge_leans(lean)
    return found.certified.threshold


def test_labels_that_were_learned_before_count_under_the_floor_as_the_judge_sees_it() -> None:
    # With two of the kinds at the small tier .912 is delivered, with all of them .79.
    assert 0.25 <= limit(1.0) < 0.35
    assert 0.0 <= limit(1.3) < 0.35
    # As far as a judge sees three quarters of a loss, .925 and more has to be seen.
    assert limit(2.5) < 0.25


def test_a_factor_that_hardly_moved_changes_nothing() -> None:
    found = FloorLimit(0.9, 0.1)

    assert not found.judge_leans(1.03)
    assert found.judge_leans(1.2)
    assert not found.judge_leans(1.22)
