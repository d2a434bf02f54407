"""Clients stream without a break while what they stream from is replaced, drained and killed.

The chart is installed and the example applied, with two of what may be lost: prefill and decode
workers of the large model, routers where a node is drained. One client inside the cluster's network
keeps asking; it sends nothing twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "tandem-system"
ROUTER = "tandem.dev/router=chat"
LARGE = "tandem.dev/model=large"

pytestmark = pytest.mark.controlplane


def manifest() -> str:
    """The example with two workers of each role of the large model."""
    text = (ROOT / "examples" / "01-hybrid" / "hybrid.yaml").read_text()
    objects = list(yaml.safe_load_all(text))
    large = next(o for o in objects if o["metadata"]["name"] == "large")
    for role in ("prefill", "decode"):
        large["spec"][role]["replicas"] = 2
    return yaml.safe_dump_all(objects)


@pytest.fixture(scope="module")
def served(cluster: Any) -> Iterator[Any]:
    chart = str(ROOT / "charts" / "tandem")
    options = ("--namespace", NAMESPACE, "--create-namespace", "--take-ownership")
    installed = cluster.run("helm", "install", "tandem", chart, *options)
    assert installed.returncode == 0, installed.stderr
    cluster.kubectl("apply", "-f", "-", stdin=manifest())
    try:
        settle(cluster)
        yield cluster
    finally:
        for name in list(cluster.down):
            cluster.start(name)
        cluster.run("kubectl", "delete", "-f", "-", stdin=manifest(), timeout_s=120.0)
        cluster.run("helm", "uninstall", "tandem", "--namespace", NAMESPACE)


def nodes_of(cluster: Any) -> list[str]:
    return [n["metadata"]["name"] for n in cluster.get("nodes")["items"]]


def pods(cluster: Any, selector: str) -> list[Any]:
    """The pods that are there to stay."""
    found = cluster.get("pods", "-l", selector)["items"]
    return [p for p in found if not p["metadata"].get("deletionTimestamp")]


def ready(pod: Any) -> bool:
    conditions = pod["status"].get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def until(cluster: Any, what: str, condition: Callable[[], bool], timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            state = cluster.kubectl("get", "models,routers,workerpools,pods,nodes", "-o", "wide")
            log = cluster.run(
                "kubectl",
                "logs",
                "-l",
                "app.kubernetes.io/name=tandem-operator",
                "-n",
                NAMESPACE,
                "--tail=20",
            )
            pytest.fail(f"not in {timeout_s:g} s: {what}\n{state}\n{log.stdout}")
        time.sleep(0.5)


def settle(cluster: Any) -> None:
    """Wait until all Models are Ready and there are as many ready routers and workers as wanted."""

    def settled() -> bool:
        for item in cluster.get("models,workerpools,routers")["items"]:
            if item["kind"] == "Model":
                conditions = item.get("status", {}).get("conditions", [])
                if not any(c["type"] == "Ready" and c["status"] == "True" for c in conditions):
                    return False
                continue
            selector = ROUTER
            if item["kind"] == "WorkerPool":
                model, role = item["spec"]["modelRef"]["name"], item["spec"]["role"]
                selector = f"tandem.dev/model={model},tandem.dev/role={role}"
            own = pods(cluster, selector)
            if len(own) != item["spec"]["replicas"] or not all(ready(p) for p in own):
                return False
        return True

    until(cluster, "as many ready routers and workers as wanted", settled)


def unharmed(found: dict[str, Any]) -> None:
    assert found["asked"] > 4
    assert found["broken"] == []
    assert found["unequal"] == []


def decisions(cluster: Any) -> list[dict[str, Any]]:
    """What the routers remember of the last requests."""
    found = []
    for router in pods(cluster, ROUTER):
        raw = f"/api/v1/namespaces/default/pods/{router['metadata']['name']}:8000/proxy"
        reply = cluster.kubectl("get", "--raw", f"{raw}/admin/decisions?limit=1000")
        found += json.loads(reply)["decisions"]
    return found


def test_a_lost_node_costs_no_request(served: Any) -> None:
    """SIGKILL to a node with all its containers, nothing told to the apiserver.

    The node that is lost holds no router: a stream whose own router dies is broken for any
    client, and a Service would not mend that either.
    """
    spread(served)
    victim = next(n for n in nodes_of(served) if not on(served, n, ROUTER))
    before = sum(d["num_failovers"] for d in decisions(served))

    with served.asking(ROUTER, "large") as found:
        served.kill(victim)
        until(served, "nothing expected of the lost node", lambda: not on(served, victim, LARGE))
        settle(served)
    served.start(victim)
    served.kubectl("wait", "--for=condition=Ready", f"node/{victim}", "--timeout=60s")

    unharmed(found)
    assert sum(d["num_failovers"] for d in decisions(served)) > before


def on(cluster: Any, node: str, selector: str) -> list[Any]:
    return [p for p in pods(cluster, selector) if p["spec"].get("nodeName") == node]


def spread(cluster: Any) -> None:
    """Every pool of the large model has a worker on both nodes; made so where it has not."""
    for role in ("prefill", "decode"):
        own = pods(cluster, f"{LARGE},tandem.dev/role={role}")
        names = {p["spec"]["nodeName"] for p in own}
        if len(names) == 1:
            (crowded,) = names
            cluster.kubectl("cordon", crowded)
            cluster.kubectl("delete", "pod", own[0]["metadata"]["name"])
            cluster.kubectl("uncordon", crowded)
    settle(cluster)


def test_a_drained_node_costs_no_request(served: Any) -> None:
    """Everything leaves the fuller node, a router too; the apiserver honours disruption budgets."""
    served.kubectl("patch", "router", "chat", "--type=merge", "-p", '{"spec": {"replicas": 2}}')
    settle(served)
    victim = max(nodes_of(served), key=lambda node: len(on(served, node, LARGE)))

    with served.asking(ROUTER, "large", "chat") as found:
        drain = ("drain", victim, "--ignore-daemonsets", "--delete-emptydir-data")
        result = served.run("kubectl", *drain, "--timeout=90s", timeout_s=100.0)
        left = [p for p in served.get("pods", "-A")["items"] if p["spec"]["nodeName"] == victim]
    served.kubectl("uncordon", victim)

    assert result.returncode == 0, result.stderr
    assert left == []
    unharmed(found)


def test_a_restarted_apiserver_costs_no_request_and_the_operator_goes_on(served: Any) -> None:
    with served.asking(ROUTER, "large", "chat") as found:
        served.kill("kube-apiserver")
        time.sleep(1.0)
        served.start("kube-apiserver")
        served.kubectl("delete", "service", "chat-router", "--wait=false")
        served.kubectl("wait", "--for=create", "service/chat-router", "--timeout=60s")

    unharmed(found)


def test_shrinking_pools_cut_no_stream(served: Any) -> None:
    with served.asking(ROUTER, "large") as found:
        for pool in ("large-decode", "large-prefill"):
            served.kubectl("scale", "workerpool", pool, "--replicas=1")
        until(
            served,
            "one worker of each role",
            lambda: len(served.get("pods", "-l", LARGE)["items"]) == 2,
        )

    unharmed(found)


def test_a_rollout_pairs_revisions_and_costs_no_request(served: Any) -> None:
    """Prefill and decode of one request are of one revision, before, during and after."""
    revisions: dict[str, str] = {}

    def seen() -> set[str]:
        own = served.get("pods", "-l", LARGE)["items"]
        for pod in own:
            if ip := pod["status"].get("podIP"):
                revisions[ip] = pod["metadata"]["labels"]["tandem.dev/revision"]
        return {pod["metadata"]["labels"]["tandem.dev/revision"] for pod in own}

    before = seen()
    started = time.time()
    patch = json.dumps({"spec": {"engine": {"maxNumSeqs": 12}}})
    with served.asking(ROUTER, "large") as found:
        served.kubectl("patch", "model", "large", "--type=merge", "-p", patch)
        until(served, "only pods of the new revision", lambda: not seen() & before)
    pairs = set()
    for decision in decisions(served):
        if decision["time"] > started and decision["prefill_worker"] is not None:
            urls = (decision["decode_worker"], decision["prefill_worker"])
            pairs.add(tuple(revisions[httpx.URL(url).host] for url in urls))

    unharmed(found)
    assert len(pairs) == 2
    assert all(decode == prefill for decode, prefill in pairs)
