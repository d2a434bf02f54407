"""To zero and back on a real control plane: a request waits at the router and is answered."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHART = str(ROOT / "charts" / "tandem")
NAMESPACE = "sleepy"
IN = ("--namespace", NAMESPACE)
OWN = f"operator.replicas=1,operator.watchNamespace={NAMESPACE},allow.ownNamespace=true"
POOL = "workerpool/small-unified"

RESOURCES = """\
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {name: small}
spec:
  weights: {source: "image:///opt/tandem/examples/models/small"}
  engine: {maxNumSeqs: 16, maxBatchedTokens: 512, kvCacheMemory: 64Mi}
  unified: {replicas: 1}
---
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {name: chat}
spec:
  tiers:
  - {name: small, modelRef: {name: small}}
  scaling: {mode: Managed, policyRef: {name: sleepy}}
---
apiVersion: tandem.dev/v1alpha1
kind: AutoscalingPolicy
metadata: {name: sleepy}
spec:
  idle: {scaleToZero: true, after: 2s}
"""

# Runs inside the cluster's network: one question to a ready address of the router's Service.
ASK = """
import json, subprocess, sys, httpx
selector = "kubernetes.io/service-name=chat-router"
command = ["kubectl", "get", "endpointslices", "-n", sys.argv[1], "-l", selector, "-o", "json"]
found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
ready = [
    (address, piece["ports"][0]["port"])
    for piece in found["items"]
    for endpoint in piece.get("endpoints") or []
    if endpoint["conditions"].get("ready")
    for address in endpoint["addresses"]
]
host, port = ready[0]
body = {"model": "small", "messages": [{"role": "user", "content": "What is 2*9?"}]}
url = f"http://{host}:{port}/v1/chat/completions"
reply = httpx.post(url, json=body, timeout=100, trust_env=False)
print(json.dumps([reply.status_code, reply.json()]))
"""


@pytest.fixture(scope="module")
def sleepy(cluster: Any) -> Iterator[Any]:
    """The chart, one Model and a Router that lets it sleep after two seconds."""
    values = ("--set", OWN)
    values = (*values, "--set", "images.pullPolicy=Never")
    options = ("--create-namespace", "--take-ownership", "--wait", "--timeout=60s")
    installed = cluster.run("helm", "install", "tandem", CHART, *IN, *values, *options)
    try:
        assert installed.returncode == 0, installed.stderr
        cluster.kubectl("apply", *IN, "-f", "-", stdin=RESOURCES)
        cluster.kubectl("wait", *IN, "--for=condition=Ready", "model/small", "--timeout=50s")
        yield cluster
    finally:
        cluster.run("kubectl", "delete", "models,routers,autoscalingpolicies", "--all", *IN)
        cluster.run("helm", "uninstall", "tandem", *IN)


def reaches(cluster: Any, ready: int) -> None:
    """Wait until the pool wants and has this many workers."""
    for field in ("spec.replicas", "status.replicas"):
        wanted = f"--for=jsonpath={{.{field}}}={ready}"
        cluster.kubectl("wait", *IN, wanted, POOL, "--timeout=50s")


def asking(cluster: Any) -> subprocess.Popen[str]:
    """A question that is on its way."""
    return subprocess.Popen(
        [*cluster.enter, sys.executable, "-c", ASK, NAMESPACE],
        env=cluster.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(asked: subprocess.Popen[str]) -> str:
    """The text of the answer."""
    out, err = asked.communicate(timeout=110.0)
    assert asked.returncode == 0, err
    status, body = json.loads(out)
    assert status == 200, body
    return str(body["choices"][0]["message"]["content"])


def test_an_idle_pool_sleeps_and_a_request_wakes_it(sleepy: Any) -> None:
    """The router stays ready while nobody works for it, so that the request has where to wait."""
    reaches(sleepy, 0)
    model = sleepy.get("model", "small", *IN)["status"]

    text = answer(asking(sleepy))

    ready = next(c for c in model["conditions"] if c["type"] == "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "ScaledToZero")
    assert text
    decisions = sleepy.get("router", "chat", *IN)["status"]["decisions"]
    assert any(d["after"] == "0" and "nobody asks" in d["reason"] for d in decisions)
    assert any(d["before"] == "0" and d["after"] == "1" for d in decisions)


def test_scaled_to_zero_by_hand_a_request_waits_until_it_is_scaled_back(sleepy: Any) -> None:
    by_hand = '{"spec": {"scaling": {"mode": "External", "policyRef": null}}}'
    sleepy.kubectl("patch", "router", "chat", *IN, "--type=merge", "-p", by_hand)
    sleepy.kubectl("scale", *IN, POOL, "--replicas=0")
    reaches(sleepy, 0)

    asked = asking(sleepy)
    with pytest.raises(subprocess.TimeoutExpired):
        asked.wait(timeout=4.0)
    pods = sleepy.get("pods", *IN, "-l", "tandem.dev/model=small")["items"]
    serving = [p for p in pods if "deletionTimestamp" not in p["metadata"]]
    sleepy.kubectl("scale", *IN, POOL, "--replicas=1")

    assert serving == []
    assert answer(asked)
