"""A lossy change of a Model on a real control plane: measured by the new worker, or not served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from running_cluster import operating

NAMESPACE = "qualified"
IN = ("--namespace", NAMESPACE)
MODEL = """\
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {name: m}
spec:
  weights: {source: "image:///opt/tandem/examples/models/small"}
  engine: {dtype: float32, maxNumSeqs: 4, kvCacheMemory: 16Mi}
  drain: {timeout: 1s}
  unified: {replicas: 1}
"""


@pytest.fixture(scope="module")
def exact(crds: Any) -> Iterator[Any]:
    """A Model with exact settings, which serves."""
    with operating(crds, NAMESPACE):
        crds.kubectl("apply", *IN, "-f", "-", stdin=MODEL)
        qualified(crds, "Exact")
        yield crds


def qualified(cluster: Any, reason: str) -> dict[str, Any]:
    """The Model's condition once it has this reason, and its address is served."""
    path = '{.status.conditions[?(@.type=="Qualified")].reason}'
    cluster.kubectl("wait", *IN, f"--for=jsonpath={path}={reason}", "model/m", "--timeout=80s")
    conditions = cluster.get("model", "m", *IN)["status"]["conditions"]
    found = {c["type"]: c for c in conditions}
    assert found["Ready"]["status"] == "True", found["Ready"]
    qualified: dict[str, Any] = found["Qualified"]
    return qualified


def served(cluster: Any) -> set[str]:
    """Names of the pods that routers send to."""
    slices = cluster.get("endpointslices", *IN, "-l", "tandem.dev/model=m")["items"]
    return {
        endpoint["targetRef"]["name"]
        for piece in slices
        for endpoint in piece.get("endpoints") or []
        if endpoint["conditions"].get("ready")
    }


def change(cluster: Any, **engine: Any) -> None:
    body = json.dumps({"spec": {"engine": engine}})
    cluster.kubectl("patch", *IN, "model", "m", "--type=merge", "-p", body)


def test_a_lossy_worker_takes_over_only_within_the_stated_loss(exact: Any) -> None:
    before = served(exact)
    change(exact, kvCacheDtype="fp8", args={"max-loss": "0"})

    refused = qualified(exact, "QualityLoss")

    assert refused["status"] == "False"
    assert "fp8 KV blocks: the perplexity of 12 exact answers changes by +" in refused["message"]
    assert "(at most +0.00%)" in refused["message"]
    assert served(exact) == before != set()

    change(exact, args={"max-loss": "0.5"})
    within = qualified(exact, "WithinLoss")

    assert within["status"] == "True"
    exact.kubectl("wait", *IN, "--for=jsonpath={.status.roles[0].updated}=1", "model/m")
    assert served(exact).isdisjoint(before)
