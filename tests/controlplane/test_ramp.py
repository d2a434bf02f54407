"""llm-d's ramp, small and live: the demo pair on a real control plane, sized by the loop.

A minute stands for its seventy; `TANDEM_RAMP_S=4200` runs it at its own pace.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eventually import eventually_in_another_process

ROOT = Path(__file__).resolve().parents[2]
CHART = str(ROOT / "charts" / "tandem")
CLIENT = str(Path(__file__).resolve().parent / "ramp_client.py")
NAMESPACE = "ramp"
IN = ("--namespace", NAMESPACE)
OWN = f"operator.replicas=1,operator.watchNamespace={NAMESPACE},allow.ownNamespace=true"
SECONDS = float(os.environ.get("TANDEM_RAMP_S", "56"))
MOST = 3  # workers a pool may have

# A worker takes one request at a time, so that ten a second are more than one can serve.
RESOURCES = f"""\
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {{name: small}}
spec:
  weights: {{source: "image:///opt/tandem/examples/models/small"}}
  engine: {{dtype: float32, maxNumSeqs: 1, maxBatchedTokens: 512, kvCacheMemory: 64Mi}}
  unified: {{replicas: 1, maxReplicas: {MOST}, usdPerHour: "0.10"}}
---
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {{name: large}}
spec:
  weights: {{source: "image:///opt/tandem/examples/models/large"}}
  engine: {{dtype: float32, maxNumSeqs: 1, maxBatchedTokens: 512, kvCacheMemory: 64Mi}}
  prefill: {{replicas: 1, maxReplicas: {MOST}, usdPerHour: "0.50"}}
  decode: {{replicas: 1, maxReplicas: {MOST}, usdPerHour: "0.50"}}
---
apiVersion: tandem.dev/v1alpha1
kind: AutoscalingPolicy
metadata: {{name: quick}}
spec:
  unified: &quick
    up: {{window: 0s, maxStep: 2, period: 0s}}
    down: {{window: 10s, maxStep: 2, period: 5s}}
  prefill: *quick
  decode: *quick
---
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {{name: chat}}
spec:
  tiers:
  - {{name: small, modelRef: {{name: small}}}}
  - {{name: large, modelRef: {{name: large}}}}
  fallbackTier: large
  predictor: {{type: Learned, artifact: "image:///opt/tandem/examples/01-hybrid/predictor"}}
  objective: {{qualityFloor: "0.9975"}}
  slo: {{ttft: {{percentile: 95, target: 2s}}, tpot: {{percentile: 95, target: 500ms}}}}
  scaling: {{mode: Managed, policyRef: {{name: quick}}}}
"""


@pytest.fixture(scope="module")
def ramped(cluster: Any) -> Iterator[Any]:
    """The chart and the demo pair, a worker each, under a loop that follows quickly."""
    values = ("--set", OWN, "--set", "images.pullPolicy=Never")
    options = ("--create-namespace", "--take-ownership", "--wait", "--timeout=60s")
    installed = cluster.run("helm", "install", "tandem", CHART, *IN, *values, *options)
    try:
        assert installed.returncode == 0, installed.stderr
        cluster.kubectl("apply", *IN, "-f", "-", stdin=RESOURCES)
        for what in ("model/small", "model/large", "router/chat"):
            cluster.kubectl("wait", *IN, "--for=condition=Ready", what, "--timeout=55s")
        yield cluster
    finally:
        cluster.run("kubectl", "delete", "models,routers,autoscalingpolicies", "--all", *IN)
        cluster.run("helm", "uninstall", "tandem", *IN)
        cluster.run("kubectl", "delete", "namespace", NAMESPACE, "--wait=false")


def wanted(cluster: Any) -> dict[str, int]:
    """Workers that each pool asks for."""
    pools = cluster.get("workerpools", *IN)["items"]
    return {p["metadata"]["name"]: p["spec"]["replicas"] for p in pools}


def described(cluster: Any) -> list[dict[str, str]]:
    """The decisions as `kubectl describe router chat` prints them."""
    text = cluster.kubectl("describe", "router", "chat", *IN)
    section = re.search(r"\n {2}Decisions:\n((?: {4}.*\n)+)", text)
    assert section, text
    rows: list[dict[str, str]] = []
    for line in section[1].splitlines():
        name, _, value = line.strip().partition(":")
        if name == "After" or not rows:
            rows.append({})
        rows[-1][name.lower()] = value.strip()
    return rows


def test_a_live_ramp_moves_the_pools_up_and_down_and_describe_says_why(ramped: Any) -> None:
    command = (sys.executable, CLIENT, NAMESPACE, str(SECONDS))
    asked = ramped.run(*command, timeout_s=SECONDS + 150.0)

    def down() -> bool:
        return max(wanted(ramped).values()) == 1

    assert asked.returncode == 0, asked.stderr
    summary = json.loads(asked.stdout)
    print(summary)
    assert summary["broken"] == []
    assert set(summary["tiers"]) == {"small", "large"}
    eventually_in_another_process(down, 60.0, 0.5, lambda: str(described(ramped)))
    decisions = described(ramped)
    print(*decisions, sep="\n")
    ups = [d for d in decisions if float(d["after"]) > float(d["before"])]
    downs = [d for d in decisions if float(d["after"]) < float(d["before"])]
    assert any("requests/s forecast" in d["reason"] for d in ups)
    assert any("less load for a while" in d["reason"] for d in downs)
    assert all(float(d["after"]) <= MOST for d in decisions if d["pool"] != "threshold")
