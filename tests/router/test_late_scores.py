"""A score that is late, and a load report that cannot be read: both are told and got over."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tandem_router.balancing.endpoint_picker import Picker
from tandem_router.balancing.health_check import poll_loads
from tandem_router.config import PickingConfig, PredictorConfig, TierConfig
from tandem_router.policy import PlainScore, ScoreStatus
from tandem_router.routing.recent_scores import LEAST, RecentScores
from tandem_router.routing.scorer import ESTIMATED, Scorer
from tandem_router.telemetry.metrics import Metrics

LENGTHS = {"small": (10.0, 50.0, 90.0), "large": (20.0, 100.0, 200.0)}
URL = "http://worker:1"


def known(number: int = 100) -> RecentScores:
    """Gains of the large tier from 0 to 0.495, in no order of length."""
    recent = RecentScores()
    for index in range(number):
        gain = (index * 37 % number) / (2 * number)
        recent.saw(10 * index, PlainScore({"small": 0.9 - gain, "large": 0.9}, LENGTHS))
    return recent


def test_nothing_is_estimated_from_too_few_scores() -> None:
    assert known(LEAST - 1).estimate(100) is None
    assert known(LEAST).estimate(100) is not None


@pytest.mark.parametrize(("num_chars", "gain"), [(0, 0), (500, 0.25), (990, 0.495), (5000, 0.495)])
def test_a_length_at_some_rank_gets_the_gain_at_that_rank(num_chars: int, gain: float) -> None:
    score = known().estimate(num_chars)

    assert score is not None
    assert score.quality["large"] == pytest.approx(0.9)
    assert score.quality["large"] - score.quality["small"] == pytest.approx(gain, abs=0.01)
    assert score.output_tokens == {tier: pytest.approx(each) for tier, each in LENGTHS.items()}


def test_a_threshold_sends_as_many_requests_to_the_large_tier_as_before() -> None:
    recent, rng = known(), random.Random(3)

    estimates = [recent.estimate(rng.randrange(0, 1000)) for _ in range(1000)]

    above = sum(e.quality["large"] - e.quality["small"] > 0.35 for e in estimates if e is not None)
    assert above / 1000 == pytest.approx(0.3, abs=0.04)


class Busy:
    """Waits until it may go on; slow when it is probed, so that it runs in a thread."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.probed = 0

    def score(self, prompt: str) -> PlainScore:
        if self.probed < 3:
            self.probed += 1
            threading.Event().wait(0.006)
        self.go.wait(5)
        return PlainScore({"small": 0.9 - len(prompt) / 100, "large": 0.9})


async def test_a_late_score_is_replaced_by_one_of_the_length_and_counted() -> None:
    predictor, metrics = Busy(), Metrics(["small", "large"])
    scorer = Scorer(predictor, PredictorConfig(type="Length", deadline_ms=1000), metrics)
    assert not scorer.inline
    for length in range(1, 21):
        await scorer.score("x" * length)
    predictor.go.clear()
    held_up = asyncio.ensure_future(scorer.score("x"))
    await asyncio.sleep(0)

    short, long = await scorer.score("x"), await scorer.score("x" * 20)
    predictor.go.set()
    await held_up
    scorer.close()

    assert short.status is long.status is ScoreStatus.OK
    assert short.score is not None
    assert long.score is not None
    assert short.score.quality["small"] > long.score.quality["small"] + 0.15
    assert metrics.predictor_outcomes[("late",)].value == 2
    assert metrics.predictor_outcomes[(ESTIMATED,)].value == 2


async def test_a_predictor_that_is_always_late_teaches_all_the_same() -> None:
    predictor, metrics = Busy(), Metrics(["small", "large"])
    scorer = Scorer(predictor, PredictorConfig(type="Length", deadline_ms=1), metrics)
    statuses = []
    for length in range(1, LEAST + 3):
        predictor.go.clear()
        statuses.append((await scorer.score("x" * length)).status)
        predictor.go.set()
        while scorer.is_scoring:  # noqa: ASYNC110 (a thread, without an event)
            await asyncio.sleep(0)
    scorer.close()

    assert statuses[0] is ScoreStatus.LATE
    assert statuses[-1] is ScoreStatus.OK


class Asked:
    """A client whose worker answers as `replies` say, and well after that."""

    def __init__(self, *replies: Exception) -> None:
        self.replies = list(replies)

    async def get(self, url: str, **options: Any) -> tuple[int, bytes]:
        if self.replies:
            raise self.replies.pop(0)
        return 200, json.dumps({"ready": True, "num_running": 3}).encode()

    def abandon(self, url: str, why: str) -> None: ...


async def polled(client: Asked, dead_after_s: Callable[[], float]) -> int | None:
    """Requests of the worker as the first report says that could be read."""
    picker = Picker(PickingConfig(), random.Random(1), asyncio.get_running_loop().time)
    picker.set_table({"small": {"unified": (URL,)}})
    answered = asyncio.Event()
    poll = asyncio.ensure_future(
        poll_loads(
            picker,
            client,  # type: ignore[arg-type]
            poll_s=0.01,
            peer_token=lambda: None,
            pools=lambda: {"small": TierConfig(name="small", served_model="m")},
            dead_after_s=dead_after_s,
            on_change=answered.set,
        )
    )
    async with asyncio.timeout(10):
        await answered.wait()
    poll.cancel()
    worker = picker.worker("small", URL)
    return worker.load.num_requests if worker is not None and worker.load is not None else None


async def test_a_poll_that_meets_a_mistake_goes_on_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = await polled(Asked(RuntimeError("odd"), RuntimeError("odd")), lambda: 10.0)

    assert found == 3
    assert caplog.text.count("its load report cannot be read") == 1


async def test_a_poll_that_ended_begins_again(caplog: pytest.LogCaptureFixture) -> None:
    mistakes = [RuntimeError("no such setting")]

    def dead_after_s() -> float:
        if mistakes:
            raise mistakes.pop()
        return 10.0

    assert await polled(Asked(ValueError("nothing")), dead_after_s) == 3
    assert "it begins again" in caplog.text
