"""Clients stream without a break while what they stream from is replaced, drained and killed.

The chart is installed and the example applied, with two of what may be lost: prefill and decode
workers of the large model, routers where a node is drained. One client inside the cluster's network
keeps asking; it sends nothing twice.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import pod_processes
from eventually import eventually_in_another_process

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "tandem-system"
ROUTER = "tandem.dev/router=chat"
LARGE = "tandem.dev/model=large"
POOLS = ("large-decode", "large-prefill")
BROKEN = re.compile(r'tandem_\w*upstream_errors\w*\{.*="(broken|unreachable|timed-out)".*\} ')

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
        # Right after the apiserver was restarted the garbage collector's watches are down, and what
        # is deleted and made again under the same name meanwhile leaves its old children for ever.
        left = cluster.left()
        cluster.run("helm", "uninstall", "tandem", "--namespace", NAMESPACE)
        assert left == []


def nodes_of(cluster: Any) -> list[str]:
    return [n["metadata"]["name"] for n in cluster.get("nodes")["items"]]


def stays(pod: Any) -> bool:
    return not pod["metadata"].get("deletionTimestamp")


def true(obj: Any, condition: str) -> bool:
    found = obj.get("status", {}).get("conditions", [])
    return any(c["type"] == condition and c["status"] == "True" for c in found)


def pods(cluster: Any, selector: str) -> list[Any]:
    """The pods that are there to stay."""
    return [p for p in cluster.get("pods", "-l", selector)["items"] if stays(p)]


def until(cluster: Any, what: str, condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    def told() -> str:
        state = cluster.kubectl("get", "models,routers,workerpools,pods,nodes", "-o", "wide")
        of_operator = ("-l", "app.kubernetes.io/name=tandem-operator", "-n", NAMESPACE)
        log = cluster.run("kubectl", "logs", *of_operator, "--tail=20")
        return f"{what}\n{state}\n{log.stdout}"

    eventually_in_another_process(condition, timeout_s, 1.0, told)


def settle(cluster: Any) -> None:
    """Wait until all Models are Ready and there are as many ready routers and workers as wanted."""

    def settled() -> bool:
        objects = cluster.get("models,workerpools,routers,pods")["items"]
        staying = [o for o in objects if o["kind"] == "Pod" and stays(o)]
        models = [o for o in objects if o["kind"] == "Model"]
        if not all(true(o, "Ready") for o in [*staying, *models]):
            return False
        wanted = [o["spec"]["replicas"] for o in objects if o["kind"] in ("WorkerPool", "Router")]
        return len(staying) == sum(wanted)

    until(cluster, "as many ready routers and workers as wanted", settled)


def workers(cluster: Any, count: int) -> None:
    """Have as many workers of each role of the large model."""
    for pool in POOLS:
        cluster.kubectl("scale", "workerpool", pool, f"--replicas={count}")
    settle(cluster)


def routers(cluster: Any, count: int) -> None:
    """Have as many routers."""
    spec = json.dumps({"spec": {"replicas": count}})
    cluster.kubectl("patch", "router", "chat", "--type=merge", "-p", spec)
    settle(cluster)


def restarts(cluster: Any, pod: Any) -> int:
    """How often a pod's container was started again."""
    found = cluster.get("pod", pod["metadata"]["name"])
    return sum(int(c["restartCount"]) for c in found["status"]["containerStatuses"])


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


def unharmed(found: dict[str, Any]) -> None:
    assert found["asked"] > 4
    assert [brief(answer) for answer in found["broken"]] == []
    assert found["unequal"] == []


def of_router(cluster: Any, router: Any, path: str) -> str:
    """What a router pod answers to a GET, through the apiserver."""
    raw = f"/api/v1/namespaces/default/pods/{router['metadata']['name']}:8000/proxy{path}"
    return str(cluster.kubectl("get", "--raw", raw))


def decisions(cluster: Any, since: float) -> list[dict[str, Any]]:
    """What the routers remember of the requests since then (seconds since 1970)."""
    found = []
    for router in pods(cluster, ROUTER):
        reply = of_router(cluster, router, "/admin/decisions?limit=1000")
        found += [d for d in json.loads(reply)["decisions"] if d["time"] >= since]
    return found


def num_inflight(cluster: Any, node: str) -> int:
    """Requests that the routers have in the large model's decode workers of a node."""
    hosts = {p["status"]["podIP"] for p in on(cluster, node, f"{LARGE},tandem.dev/role=decode")}
    count = 0
    for router in pods(cluster, ROUTER):
        known = json.loads(of_router(cluster, router, "/admin/state"))["workers"]
        count += sum(w["num_inflight"] for w in known if httpx.URL(w["url"]).host in hosts)
    return count


def num_broken(cluster: Any) -> float:
    """Replies of workers that broke off, or never came, since the routers started."""
    count = 0.0
    for router in pods(cluster, ROUTER):
        lines = of_router(cluster, router, "/metrics").splitlines()
        count += sum(float(line.split()[-1]) for line in lines if BROKEN.match(line))
    return count


def brief(answer: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in answer.items() if k not in ("text", "question")}


def num_failovers(cluster: Any, since: float) -> int:
    """How often a reply broke off and was carried on by another worker."""
    return sum(d["num_failovers"] for d in decisions(cluster, since))


def test_a_drained_node_costs_no_request(served: Any) -> None:
    """Workers and a router move; the apiserver honours disruption budgets."""
    workers(served, 2)
    served.kubectl("patch", "router", "chat", "--type=merge", "-p", '{"spec": {"replicas": 2}}')
    settle(served)
    victim = pods(served, ROUTER)[0]["spec"]["nodeName"]
    started = time.time()

    with served.asking(ROUTER, "large", "chat") as found:
        drain = ("drain", victim, "--ignore-daemonsets", "--delete-emptydir-data")
        result = served.run("kubectl", *drain, "--timeout=90s", timeout_s=100.0)
        left = [p for p in served.get("pods", "-A")["items"] if p["spec"]["nodeName"] == victim]
    served.kubectl("uncordon", victim)

    assert result.returncode == 0, result.stderr
    assert left == []
    unharmed(found)
    assert num_failovers(served, started) == 0


def test_shrinking_pools_cut_no_stream(served: Any) -> None:
    """What a worker has begun it ends: no stream has to be carried on by another."""
    workers(served, 2)
    started = time.time()

    with served.asking(ROUTER, "large") as found:
        for pool in POOLS:
            served.kubectl("scale", "workerpool", pool, "--replicas=1")
        until(
            served,
            "one worker of each role",
            lambda: len(served.get("pods", "-l", LARGE)["items"]) == 2,
        )

    unharmed(found)
    assert num_failovers(served, started) == 0


def test_a_rollout_pairs_revisions_and_costs_no_request(served: Any) -> None:
    """Prefill and decode of one request are of one revision, before, during and after."""
    workers(served, 1)
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
    (newest,) = seen()
    pairs = {
        (revisions[httpx.URL(d["decode_worker"]).host], revisions[httpx.URL(prefill).host])
        for d in decisions(served, started)
        if (prefill := d["prefill_worker"]) is not None
    }

    unharmed(found)
    assert num_failovers(served, started) == 0
    assert pairs == {(*before, *before), (newest, newest)}


def test_a_killed_router_loses_the_requests_in_its_hands_and_no_other(served: Any) -> None:
    """Those are their clients' to send again (docs/router.md): three ask, so it holds three.

    Who finds its port closed, until the Service knows, has lost nothing: nobody took the request.
    """
    routers(served, 2)
    with served.asking(ROUTER, "small", "chat", concurrency=3) as found:
        victim = pods(served, ROUTER)[0]
        address = victim["status"]["podIP"]
        (process,) = pod_processes.of(served, [address], b"tandem_router")
        os.kill(process, signal.SIGKILL)
        until(served, "it has started again", lambda: restarts(served, victim) > 0)
        settle(served)

    broken = [brief(answer) for answer in found["broken"]]
    taken = [answer for answer in broken if "ConnectError" not in answer["error"]]
    assert found["asked"] > 8
    assert len(taken) <= 3, taken
    assert {httpx.URL(answer["router"]).host for answer in broken} <= {address}
    assert found["unequal"] == []


def test_a_lost_node_costs_no_request(served: Any) -> None:
    """SIGKILL to a node with all its containers, nothing told to the apiserver.

    The node that is lost holds no router: a stream whose own router dies is broken for any
    client, and a Service would not mend that either.
    """
    workers(served, 2)
    spread(served)
    victim = next(n for n in nodes_of(served) if not on(served, n, ROUTER))
    before = num_broken(served)

    with served.asking(ROUTER, "large", concurrency=4) as found:
        until(served, "the node has requests", lambda: num_inflight(served, victim) > 0)
        served.kill(victim)
        until(served, "nothing expected of the lost node", lambda: not on(served, victim, LARGE))
        settle(served)
    served.start(victim)
    served.kubectl("wait", "--for=condition=Ready", f"node/{victim}", "--timeout=60s")

    unharmed(found)
    assert num_broken(served) > before


def test_a_restarted_apiserver_costs_no_request_and_the_operator_goes_on(served: Any) -> None:
    with served.asking(ROUTER, "large", "chat") as found:
        served.kill("kube-apiserver")
        time.sleep(1.0)
        served.start("kube-apiserver")
        served.kubectl("delete", "service", "chat-router", "--wait=false")
        # A leader that was cut off for long has to be followed by the other replica.
        until(
            served,
            "the deleted Service is back",
            lambda: served.run("kubectl", "get", "service", "chat-router").returncode == 0,
        )

    unharmed(found)
