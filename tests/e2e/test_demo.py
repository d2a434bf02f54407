"""The main job: `tandem demo` routes test questions, keeps quality, saves large calls."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from stack_kit import EXAMPLE, processes_below, tandem_command


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, Path]:
    """Output and data of one run with --once."""
    folder = tmp_path_factory.mktemp("demo")
    env = {**os.environ, "XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    env.pop("XDG_RUNTIME_DIR", None)
    data = folder / "demo.json"

    result = subprocess.run(
        tandem_command("demo", "--once", "--json", str(data)),
        env=env,
        cwd=EXAMPLE.parents[1],
        capture_output=True,
        text=True,
        timeout=900,
    )

    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout, json.loads(data.read_text()), folder


def test_every_question_is_shown_with_its_decision(demo: tuple[str, dict, Path]) -> None:
    _, data, _ = demo

    assert len(data["questions"]) >= 60
    assert {q["tier"] for q in data["questions"]} == {"small", "large"}
    for question in data["questions"]:
        assert question["gain"] is not None
        assert question["reason"]
        assert question["ttft_ms"] > 0
        assert question["cost_usd"] > 0


def test_routing_saves_large_calls_at_the_quality_of_all_large(
    demo: tuple[str, dict, Path],
) -> None:
    _, data, _ = demo
    held_out = data["held_out"]

    assert held_out["num_questions"] >= 500
    assert held_out["large_call_reduction"] >= 0.40
    assert held_out["quality_drop"] <= 0.01


def test_routing_beats_chance_and_prompt_length_at_equal_cost(demo: tuple[str, dict, Path]) -> None:
    _, data, _ = demo

    quality = {summary["strategy"]: summary["quality"] for summary in data["summary"]}
    assert set(quality) == {"all small", "all large", "random", "prompt length", "tandem"}
    assert quality["tandem"] > quality["random"]
    assert quality["tandem"] > quality["prompt length"]


def test_nothing_is_left_running(demo: tuple[str, dict, Path]) -> None:
    output, _, folder = demo

    assert "ready after" in output
    assert processes_below(folder) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--questions", "3"), "--questions 3 is too few; ask for 60 or more"),
        (("--held-out", "10"), "ask for 500 or more"),
        (("--json", "/nowhere/at/all.json"), "its folder does not exist; create it first"),
        (("--example", "/nowhere"), "/nowhere"),
        (("--port", "70000"), "'70000' is no port; use a number from 1 to 65535"),
    ],
)
def test_bad_arguments_get_a_sentence(arguments: tuple[str, str], message: str) -> None:
    result = subprocess.run(
        tandem_command("demo", "--once", *arguments),
        cwd=EXAMPLE.parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
