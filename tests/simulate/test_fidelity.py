"""How far the simulator is from machines and from splitwise-sim, as benchmarks/simulator.py says.

Every percentile of splitwise-sim within 2 %; of real vLLM, mean TPOT within 2 %, mean TTFT within
5 % and its 99th percentile within 10 %, with nothing fitted to the run that is predicted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(
    not (DATA / "splitwise_ref").is_dir(),
    reason="../shared/data is absent: no measured runs to compare with",
)


def fidelity(out: Path, *args: str) -> dict[str, Any]:
    """What the script writes."""
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "simulator.py"), *args, "--json", str(out)],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@needs_data
def test_splitwise_sims_runs_are_met_in_compatibility_mode(tmp_path: Path) -> None:
    runs = ("conv_baseH4_6", "conv_HH3-1_6", "code_HH35-5_70")

    found = fidelity(tmp_path / "out.json", "splitwise", "--runs", *runs)["splitwise"]

    assert sorted(found) == sorted(runs)
    for run, metrics in found.items():
        for metric, percentiles in metrics.items():
            for percentile, error in percentiles.items():
                assert abs(error) <= 0.02, (run, metric, percentile, error)


@needs_data
def test_disaggregated_deployments_are_predicted_from_other_ones(tmp_path: Path) -> None:
    found = fidelity(tmp_path / "out.json", "deployments")["deployments"]

    assert found["rows"] >= 140
    assert found["tpot_median"] < 0.15


@needs_data
def test_two_real_runs_of_vllm_are_met_without_fitting_them(tmp_path: Path) -> None:
    found = fidelity(tmp_path / "out.json", "vllm")["vllm"]

    assert sorted(found) == ["RTX4090", "RTXPRO6000"]
    for device, metrics in found.items():
        assert abs(metrics["tpot"]["mean"]) <= 0.02, (device, metrics["tpot"])
        assert abs(metrics["ttft"]["mean"]) <= 0.05, (device, metrics["ttft"])
        assert abs(metrics["ttft"]["p99"]) <= 0.10, (device, metrics["ttft"])
        assert abs(metrics["e2e"]["mean"]) <= 0.08, (device, metrics["e2e"])
