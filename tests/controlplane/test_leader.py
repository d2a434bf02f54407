"""Two replicas on a Lease: every write of each is recorded, and no two lead at the same time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCENARIO = str(Path(__file__).resolve().parent / "faults_scenario.py")


@pytest.fixture(scope="module")
def found(crds: Any) -> dict[str, Any]:
    """Steady work; the leader is killed, then stopped for longer than its lease, then ended."""
    command = (sys.executable, SCENARIO, "leader", str(crds.run_dir / "pki"), "1")
    result = crds.run(*command, timeout_s=150.0)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_writes_of_two_holders_never_interleave(found: dict[str, Any]) -> None:
    """Three times the lead goes to the other one, and never back in between."""
    first, second = found["holders"][:2]

    assert found["num_writes"] > 60
    assert set(found["handovers_s"]) == {"killed", "stopped", "ended"}
    assert found["holders"] == [first, second, first, second], found["logs"]


def test_a_process_that_lost_the_lead_ends_and_stands_by_when_it_starts_again(
    found: dict[str, Any],
) -> None:
    """The one that was stopped finds out when it goes on; the last one was told to end."""
    assert found["ended"] == [True, True, True]
