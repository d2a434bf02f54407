"""A quality floor becomes the threshold that saves most within it."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.control.predicted_floor import PredictedFloor, threshold_for_floor
from tandem_router.policy import PlainScore

PAIRS = st.lists(
    st.tuples(st.floats(-1, 1, allow_nan=False), st.floats(0, 1, allow_nan=False)),
    min_size=1,
    max_size=60,
)


def expected_quality(pairs: list[tuple[float, float]], threshold: float) -> float:
    """Mean quality when gains at or below the threshold go to the small tier."""
    return sum(q - (gain if gain <= threshold else 0.0) for gain, q in pairs) / len(pairs)


@given(PAIRS, st.floats(0, 1))
def test_the_floor_holds_and_a_higher_floor_never_saves_more(
    pairs: list[tuple[float, float]], floor: float
) -> None:
    threshold = threshold_for_floor(pairs, floor)
    all_large = sum(quality for _, quality in pairs) / len(pairs)

    assert expected_quality(pairs, threshold) >= floor * all_large - 1e-6
    assert threshold_for_floor(pairs, min(1.0, floor + 0.1)) <= threshold


@given(PAIRS, st.floats(0, 1))
def test_no_larger_threshold_among_the_gains_would_hold_the_floor(
    pairs: list[tuple[float, float]], floor: float
) -> None:
    threshold = threshold_for_floor(pairs, floor)
    all_large = sum(quality for _, quality in pairs) / len(pairs)

    for gain, _ in pairs:
        if gain > threshold:
            assert expected_quality(pairs, gain) < floor * all_large + 1e-6


def test_the_threshold_follows_the_traffic() -> None:
    rng = random.Random(1)
    floor = PredictedFloor(0.98, 0.1)
    assert floor.threshold == 0.1

    for _ in range(600):
        floor.observe(rng.uniform(0.0, 0.02), 0.9)
    easy = floor.threshold
    for _ in range(600):
        floor.observe(rng.uniform(0.3, 0.9), 0.9)
    hard = floor.threshold

    # Easy traffic may all go to the small tier; of hard traffic only a sliver may.
    assert easy == pytest.approx(0.02, abs=0.001)
    assert 0.3 <= hard < 0.4


def test_training_gains_stand_in_at_the_start_and_senseless_numbers_are_ignored() -> None:
    floor = PredictedFloor(0.9, 0.1, training=[(0.05, 1.0), (0.15, 1.0), (0.5, 1.0)])

    assert floor.threshold == pytest.approx(0.15)
    assert not floor.observe(math.nan, 0.5)
    assert not floor.observe(0.1, math.inf)


class Alternating:
    """Easy and hard prompts in turn, as a predictor sees them."""

    def score(self, prompt: str) -> PlainScore:
        return PlainScore({"small": 0.9 if "easy" in prompt else 0.3, "large": 0.92})


async def test_expected_quality_is_shown_beside_the_floor(
    run_router: Any, make_worker: Any
) -> None:
    table = {
        "small": {"unified": [await make_worker()]},
        "large": {"decode": [await make_worker()]},
    }

    async with run_router(table, predictor=Alternating(), threshold=0.1) as (client, _):
        before = (await client.get("/admin/state")).json
        for number in range(4):
            await client.chat("easy" if number % 2 else "hard")
        after = (await client.get("/admin/state")).json
        metrics = (await client.get("/metrics")).body.decode()

    assert before["expected_quality_ratio"] is before["content_blind_quality_ratio"] is None
    assert after["expected_quality_ratio"] == pytest.approx((0.9 + 0.92) / (2 * 0.92))
    # Half to each tier, whatever was asked: the small one is right about 0.6 on average.
    assert after["content_blind_quality_ratio"] == pytest.approx((0.6 + 0.92) / (2 * 0.92))
    assert "tandem_expected_quality_ratio 0.98" in metrics
