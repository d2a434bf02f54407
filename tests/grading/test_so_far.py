"""The verdict so far, and about how many more prompts it needs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tandem_router.grading.so_far import PairSoFar, verdicts

Write = Callable[..., Path]
Grades = Sequence[tuple[float, float]]


def of(write: Write, grades: Grades, prompts: Sequence[str] | None = None) -> PairSoFar:
    rows: list[dict[str, Any]] = [
        {
            "prompt": prompts[i] if prompts else f"question {i}",
            "quality": {"small": small, "large": large},
            "cost_usd": {"small": 0.001, "large": 0.01},
        }
        for i, (small, large) in enumerate(grades)
    ]
    (found,) = verdicts(write(rows), lambda message: None)
    return found


def test_a_handful_of_prompts_says_nothing_but_how_many_more(write: Write) -> None:
    found = of(write, [(0, 1)] * 19)

    assert found.decision is None
    assert found.more_prompts == 81
    assert (
        "19 prompts are graded for both, too few to say anything; grade 81 more" in found.sentence
    )


def test_prompts_asked_twice_are_one_piece_of_evidence(write: Write) -> None:
    found = of(write, [(0, 1)] * 60, [f"question {i % 15}" for i in range(60)])

    assert found.num_prompts == 15
    assert found.decision is None


def test_tiers_that_are_not_told_apart_name_the_cheaper_and_what_would_tell(write: Write) -> None:
    found = of(write, [(1, 1), (0, 0), (1, 1), (1, 0), (0, 1), (0, 1)] * 10)

    assert found.decision == "all to the cheaper tier"
    assert found.sentence.startswith("send all to small")
    assert found.more_prompts
    assert found.more_prompts < 1000
    assert found.sentence.endswith("more prompts would say whether the two differ")


def test_tiers_that_always_agree_need_no_more(write: Write) -> None:
    found = of(write, [(1, 1), (0, 0)] * 30)

    assert found.decision == "all to the cheaper tier"


def test_a_clear_gap_on_few_prompts_asks_for_enough_to_judge_routing(write: Write) -> None:
    found = of(write, [(0, 1), (1, 1)] * 20)

    assert found.decision == "all to the dearer tier"
    assert found.more_prompts == 60
    assert "60 more prompts would say whether routing pays" in found.sentence


@pytest.mark.parametrize("predictable", [True, False])
def test_whether_the_prompt_tells_who_is_needed_decides(write: Write, predictable: bool) -> None:
    rng = random.Random(1)
    hard = [rng.random() < 0.5 for _ in range(120)]
    shown = hard if predictable else [rng.random() < 0.5 for _ in hard]
    words = ["apple", "river", "stone", "cloud", "green", "seven", "paper", "light"]
    prompts = [
        ("prove that " if tells else "name the ") + " ".join(rng.choices(words, k=6))
        for tells in shown
    ]

    # The large tier alone can do what is hard, and errs on some of the easy prompts.
    grades = [(0.0, 1.0) if each else (1.0, float(rng.random() > 0.16)) for each in hard]

    found = of(write, grades, prompts)

    assert found.decision == ("route" if predictable else "all to the dearer tier")
    assert found.sentence.startswith("route: saves" if predictable else "send all to large")
