"""A quality floor becomes the threshold that saves most within it."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.control.predicted_floor import PredictedFloor, threshold_for_floor
from tandem_router.policy import PlainScore
from tandem_router.routing.predictor_source import ArtifactPredictor
from tandem_router.testing.two_tiers import both

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


class Learned(ArtifactPredictor):
    """A learned predictor: even gains up to 1 in training, and a gain of 0.3 for every prompt."""

    def __init__(self) -> None:
        super().__init__(Path("none"), ("small", "large"))
        self.highest = 100

    def training_gains(self, dearest: str, cheapest: str) -> list[tuple[float, float]]:
        return [(gain / 100.0, 0.9) for gain in range(self.highest)]

    def score(self, prompt: str) -> PlainScore:
        return PlainScore({"small": 0.6, "large": 0.9})


FLOOR = {"objective": {"quality_floor": 0.95}}
PEER = {"x-tandem-peer-token": "t", "content-type": "application/json"}


async def test_a_threshold_over_the_floors_limit_is_clipped_and_the_clip_is_named(
    run_router: Any, make_worker: Any
) -> None:
    table = await both(make_worker)
    async with run_router(table, predictor=Learned(), peer_token="t", **FLOOR) as (client, _):

        async def asked(threshold: float) -> tuple[Any, Any]:
            reply = await client.request(
                "PUT", "/admin/set-points", {"gain_threshold": threshold}, PEER
            )
            return reply.json, (await client.get("/admin/state")).json

        before = (await client.get("/admin/state")).json
        limit = before["set_points"]["gain_threshold"]
        high, state = await asked(0.9)
        answer = await client.chat()
        low, _ = await asked(0.01)

    assert 0.2 < limit < 0.3
    assert before["threshold"] == {
        "asked": None,
        "limit": limit,
        "basis": "Predicted",
        "num_labels": 0,
        "judge_lean": 1.0,
        "in_force": limit,
    }
    assert high["gain_threshold"] == limit
    assert high["threshold"] == state["threshold"]
    assert state["threshold"] == {**before["threshold"], "asked": 0.9}
    assert answer.headers["x-tandem-tier"] == "large"
    assert low["threshold"] == {**before["threshold"], "asked": 0.01, "in_force": 0.01}


async def test_a_changed_threshold_does_not_switch_the_floor_off_and_its_limit_goes_on_moving(
    run_router: Any,
) -> None:
    predictor = Learned()
    async with run_router({}, predictor=predictor, background=False, **FLOOR) as (_, app):
        steering = app.services.steering
        limit = steering.threshold_limit["limit"]
        app.settings.apply({**FLOOR, "threshold": 0.8})
        pushed = steering.threshold_limit
        app.settings.apply({"objective": {"quality_floor": 0.99}, "threshold": 0.8})
        stricter = steering.threshold_limit
        predictor.highest = 10
        steering.predictor_changed(predictor)
        retrained = steering.threshold_limit
        app.settings.apply({"objective": {}, "threshold": 0.8})
        without = steering.threshold_limit
        app.settings.apply({**FLOOR, "threshold": None})
        again = steering.threshold_limit

    assert (pushed["asked"], pushed["limit"], pushed["in_force"]) == (0.8, limit, limit)
    assert stricter["in_force"] == stricter["limit"] < limit
    assert retrained["in_force"] == retrained["limit"] != stricter["limit"]
    assert (without["asked"], without["limit"], without["in_force"]) == (0.8, None, 0.8)
    assert again["asked"] is None
    assert again["in_force"] == again["limit"]


async def test_a_largest_share_still_comes_before_the_floor(run_router: Any) -> None:
    tiers = [
        {"name": "small", "served_model": "qwen-1b"},
        {"name": "large", "served_model": "qwen-32b", "max_share": 0.1},
    ]
    async with run_router({}, predictor=Learned(), background=False, tiers=tiers, **FLOOR) as (
        _,
        app,
    ):
        steering = app.services.steering
        for _ in range(200):
            steering.control.share.observe(0.3, True)
        held = steering.threshold_limit

    assert held["in_force"] > held["limit"]


class HalfOdd(Learned):
    """Of odd prompts it says what it says of anything, and that it is not to be believed."""

    def score(self, prompt: str) -> PlainScore:
        ease = int(prompt.split()[-1]) / 100.0
        return PlainScore({"small": 0.9 - ease, "large": 0.9}, None, "odd" in prompt)


@pytest.mark.parametrize("model", ["chat", "large"])
async def test_ordinary_requests_go_small_as_often_beside_others_that_no_threshold_decides(
    run_router: Any, make_worker: Any, model: str
) -> None:
    """Odd prompts go to the fallback tier, named tiers are taken; neither loses any quality."""
    table = await both(make_worker)

    async def share(others: bool) -> float:
        small = 0
        async with run_router(table, predictor=HalfOdd(), **FLOOR) as (client, _):
            for number in range(200):
                ease = (7 * number) % 100
                if others:
                    await client.chat("odd 10", model=model)
                reply = await client.chat(f"ordinary {ease}")
                small += reply.headers["x-tandem-tier"] == "small"
        return small / 200

    assert await share(True) == pytest.approx(await share(False), abs=0.03)


def test_a_margin_is_kept_back_until_labels_have_come() -> None:
    rng = random.Random(1)
    training = [(rng.random() * 0.3, 0.9) for _ in range(400)]
    plain = PredictedFloor(0.95, 0.1, training)
    cautious = PredictedFloor(0.95, 0.1, training, margin=0.4)
    at_first = cautious.threshold

    for count in (50, 2000):
        cautious.correct([(rng.random() * 0.3, 0.0, 0.0) for _ in range(count)])
        cautious.set_floor(0.95)
        assert at_first < cautious.threshold <= plain.threshold
        at_first = cautious.threshold - 1e-12

    assert cautious.threshold == pytest.approx(plain.threshold, rel=0.1)
