"""Two replicas on a Lease: every write of each is recorded, and no two lead at the same time."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCENARIO = str(Path(__file__).resolve().parent / "faults_scenario.py")
CRDS = Path(__file__).resolve().parents[2] / "charts" / "tandem" / "files" / "crds"


@pytest.fixture(scope="module")
def found(cluster: Any) -> Iterator[dict[str, Any]]:
    """Steady work; the leader is killed, then stopped for longer than its lease, then ended."""
    ours = cluster.run("kubectl", "get", "crd", "models.tandem.dev").returncode != 0
    if ours:
        cluster.kubectl("apply", "--server-side", "-f", str(CRDS))
        cluster.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
    command = (sys.executable, SCENARIO, "leader", str(cluster.run_dir / "pki"), "1")
    result = cluster.run(*command, timeout_s=150.0)
    assert result.returncode == 0, result.stderr
    yield json.loads(result.stdout)
    if ours:
        cluster.kubectl("delete", "-f", str(CRDS), "--timeout=60s")


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
