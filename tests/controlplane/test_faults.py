"""The operator as a process on a real apiserver, through a proxy that injects faults."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCENARIO = str(Path(__file__).resolve().parent / "faults_scenario.py")
SEED = 3


@pytest.fixture(scope="module")
def found(crds: Any) -> dict[str, Any]:
    """One bad day: dozens of faults, damaged children, three kills and a change of a Model."""
    command = (sys.executable, SCENARIO, "converge", str(crds.run_dir / "pki"), str(SEED))
    result = crds.run(*command, timeout_s=150.0)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_day_was_bad(found: dict[str, Any]) -> None:
    """Most kinds of faults hit, and each life of the operator saw some."""
    kinds = {"409", "410", "422", "429", "500", "503", "reset", "lost", "slow"}
    events = {"gone event", "cut", "repeat", "drop", "late"}

    assert found["num_kills"] == 3
    assert found["num_writes"] > 10
    assert sum(found["faults"].values()) >= 36
    assert len((kinds | events) & set(found["faults"])) >= 10


def test_once_faults_stop_everything_is_as_planned(found: dict[str, Any]) -> None:
    """No child lost, none doubled, each with its one owner, replicas as the pools say."""
    assert found["differences"] == [], found["log"]


def test_then_nothing_is_written_any_more(found: dict[str, Any]) -> None:
    assert found["late_writes"] == []


def test_what_is_deleted_while_no_operator_runs_leaves_nothing(found: dict[str, Any]) -> None:
    assert found["remaining"] == []
