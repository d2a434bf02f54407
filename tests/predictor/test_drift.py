"""Traffic that leaves the training data behind is noticed; the same traffic is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tandem_router.predictor import Predictor
from tandem_router.predictor.evaluation import drift

Make = Callable[..., list[dict[str, Any]]]


def test_the_same_traffic_is_stable(predictor: Predictor, make_outcomes: Make) -> None:
    found = drift.compare(predictor, [row["prompt"] for row in make_outcomes(400, seed=3)])

    assert found is not None
    assert found.shifted == []


def test_other_traffic_is_named_by_its_signals(predictor: Predictor) -> None:
    prompts = [f"Write a poem about the sea, number {i}, in a quiet tone." for i in range(120)]

    found = drift.compare(predictor, prompts)

    assert found is not None
    assert "num_digits" in found.shifted


def test_a_handful_of_prompts_says_nothing(predictor: Predictor) -> None:
    assert drift.compare(predictor, ["What is 1 + 1?"] * 99) is None


@pytest.mark.parametrize("values", [np.zeros(500), np.random.default_rng(0).random(500)])
def test_the_index_of_a_sample_with_itself_is_nearly_zero(values: np.ndarray) -> None:
    edges, shares = drift.reference(values[:, None])

    assert drift.stability(edges[:, 0], shares[:, 0], values) == 0.0


def test_nine_in_ten_grades_lie_in_the_interval(predictor: Predictor, make_outcomes: Make) -> None:
    rows = make_outcomes(500, seed=4)
    misses = [
        abs(row["quality"]["small"] - predictor.score(row["prompt"]).quality["small"])
        for row in rows
    ]

    # 400 calibration rows: the coverage itself has a standard deviation of 0.015
    assert 0.84 <= np.mean(np.array(misses) <= predictor.intervals["small"]) <= 1.0
