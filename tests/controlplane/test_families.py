"""Clusters other than the usual one: IPv6 alone, and the oldest Kubernetes with both families."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import binaries
import network
from running_cluster import run_cluster

ROOT = Path(__file__).resolve().parents[2]
CHART = str(ROOT / "charts" / "tandem")
RESOURCES = """\
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {name: large}
spec:
  weights: {source: "image:///opt/tandem/examples/models/large"}
  engine: {maxNumSeqs: 16, maxBatchedTokens: 512, kvCacheMemory: 64Mi}
  kvTransfer: {localPrefillMaxTokens: 0}
  prefill: {replicas: 1}
  decode: {replicas: 1}
---
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {name: chat}
spec:
  tiers: [{name: large, modelRef: {name: large}}]
"""
WRONG = """\
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {name: wrong}
spec:
  tiers: [{name: large, modelRef: {name: large}}]
  fallbackTier: none
"""
# Asks each address of the router's endpoints, inside the cluster's network.
ASK = """
import json, sys, httpx
found = []
for number, base in enumerate(sys.argv[1:]):
    text = f"What is {number}*9?"
    body = {"model": "chat", "messages": [{"role": "user", "content": text}], "max_tokens": 4}
    reply = httpx.post(f"{base}/v1/chat/completions", json=body, timeout=60, trust_env=False)
    found.append([reply.status_code, reply.headers.get("x-tandem-tier")])
print(json.dumps(found))
"""


@pytest.fixture(
    scope="module",
    params=[("ipv6", binaries.NEWEST), ("dual", binaries.OLDEST)],
    ids=lambda param: f"{param[0]}-{param[1].minor}",
)
def serving(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The chart, a Model split in two and its Router, ready."""
    family, release = request.param
    if not network.has_ipv6():
        pytest.skip("this kernel has no IPv6")
    run_dir = tmp_path_factory.mktemp(family)
    options = ("--family", family, "--nodes", "1")
    with run_cluster(run_dir, *options, release=release) as cluster:
        values = ("--set", "operator.replicas=1,images.pullPolicy=Never")
        policy = "PreferDualStack" if family == "dual" else ""
        values = (*values, "--set", f"routers.ipFamilyPolicy={policy}")
        into = ("--namespace", "tandem-system", "--create-namespace", "--wait", "--timeout=90s")
        installed = cluster.run("helm", "install", "tandem", CHART, *values, *into, timeout_s=120)
        assert installed.returncode == 0, installed.stderr
        cluster.kubectl("apply", "-f", "-", stdin=RESOURCES)
        for what, kind in (("Ready", "model/large"), ("Ready", "router/chat")):
            done = cluster.run(
                "kubectl", "wait", f"--for=condition={what}", kind, "--timeout=150s", timeout_s=180
            )
            assert done.returncode == 0, cluster.kubectl("describe", "model,router,pods")
        yield cluster, family, release


def bases(cluster: Any) -> dict[str, list[str]]:
    """Base URLs of the router's endpoints by family."""
    slices = cluster.get("endpointslices", "-l", "kubernetes.io/service-name=chat-router")
    return {
        piece["addressType"]: [
            f"http://{network.url_host(address)}:{piece['ports'][0]['port']}"
            for endpoint in piece["endpoints"]
            for address in endpoint["addresses"]
        ]
        for piece in slices["items"]
    }


def test_a_router_answers_at_every_address_of_its_service(serving: Any) -> None:
    cluster, family, release = serving
    found = bases(cluster)
    urls = [url for each in found.values() for url in each]
    asked = cluster.run(sys.executable, "-c", ASK, *urls)

    assert f"Server Version: {release.version}" in cluster.kubectl("version")
    assert set(found) == ({"IPv6"} if family == "ipv6" else {"IPv4", "IPv6"})
    assert json.loads(asked.stdout) == [[200, "large"]] * len(urls), asked.stderr


def test_blocks_of_a_prefill_worker_reach_a_decode_worker(serving: Any) -> None:
    cluster, family, _ = serving
    model = cluster.get("model", "large")
    link = next(c for c in model["status"]["conditions"] if c["type"] == "KVLinkReady")
    pods = cluster.get("pods", "-l", "tandem.dev/model=large")["items"]

    assert link["status"] == "True", link
    assert "arrived unchanged" in link["message"]
    assert all(len(p["status"]["podIPs"]) == (2 if family == "dual" else 1) for p in pods)


def test_what_a_rule_forbids_is_refused_and_the_release_has_all_its_rights(serving: Any) -> None:
    cluster, _, _ = serving
    refused = cluster.run("kubectl", "apply", "-f", "-", stdin=WRONG)
    logs = cluster.kubectl("logs", "-n", "tandem-system", "deployment/tandem-operator")
    warnings = cluster.kubectl("get", "events", "-A", "--field-selector=type=Warning")

    assert refused.returncode != 0
    assert "fallbackTier" in refused.stderr
    assert "forbidden" not in logs.lower()
    assert "Failed" not in warnings, warnings
