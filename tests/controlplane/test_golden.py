"""What a person reads from kubectl, compared with committed text.

    TANDEM_GOLDEN=write .venv/bin/python -m pytest -n0 tests/controlplane/test_golden.py

writes the files of golden/ anew. The statuses are those of the operator's own reconcile, at a fixed
time and with pods that a table describes; the apiserver and kubectl are real. Ages and ids, which
differ from run to run, are masked.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem_operator.local.store import Store
from tandem_operator.manifests import load_paths
from tandem_operator.plan import Settings
from tandem_operator.plan.model_status import LinkTest
from tandem_operator.plan.router_facts import (
    LatencyFacts,
    PredictorFacts,
    TierFacts,
    TrafficFacts,
)
from tandem_operator.reconcile.reconciler import Reconciler
from tandem_operator.reconcile.requeue import Key
from tandem_operator.resources.base import Object

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).resolve().parent / "golden"
OBJECTS = GOLDEN / "objects.yaml"
NAMESPACE = "reading"
NOW = "2026-01-01T00:00:00Z"
KINDS = ("Model", "Router", "AutoscalingPolicy", "WorkerPool")
READY = {"podIP": "10.77.9.9", "conditions": [{"type": "Ready", "status": "True"}]}
UNSCHEDULABLE = {
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.",
        }
    ]
}


class Observed:
    """A store in which the operator has seen the objects through to where they stand."""

    def __init__(self) -> None:
        self.store = Store()
        self.reconciler = Reconciler(
            api=self.store,
            settings=Settings(),
            now=lambda: NOW,
            link_tester=self._link,
            traffic=self._traffic,
            scaling=self._scaling,
        )
        for manifest in load_paths([OBJECTS]):
            metadata = {**manifest.obj["metadata"], "namespace": NAMESPACE}
            self.store.write({**manifest.obj, "metadata": metadata}, manager="user")
        metadata = {"name": "chat-difficulty", "namespace": NAMESPACE}
        artifact = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}
        self.store.write({**artifact, "data": {"artifact": "learned"}}, manager="user")

    async def settle(self) -> None:
        """Reconcile until nothing changes, with the pods that the Deployments ask for."""
        writes = 1
        while writes:
            writes = 0
            for kind in KINDS[:3]:
                for obj in self.store.find(kind):
                    key = Key(kind, NAMESPACE, obj["metadata"]["name"])
                    writes += (await self.reconciler.reconcile(key)).writes
            self._start_pods()

    def _start_pods(self) -> None:
        for deployment in self.store.find("Deployment"):
            name, template = deployment["metadata"]["name"], deployment["spec"]["template"]
            status = UNSCHEDULABLE if name.startswith("huge") else READY
            for i in range(deployment["spec"]["replicas"]):
                pod = {"apiVersion": "v1", "kind": "Pod", "spec": template["spec"]}
                metadata = {
                    "name": f"{name}-{i}",
                    "namespace": NAMESPACE,
                    "labels": template["metadata"]["labels"],
                }
                self.store.write({**pod, "metadata": metadata, "status": status}, manager="node")

    async def _link(self, pods: list[Object]) -> LinkTest:
        roles = {p["metadata"]["labels"]["tandem.dev/role"] for p in pods}
        if "decode" not in roles:
            return LinkTest(None, "needs a ready worker of both roles")
        text = "large-prefill-0 to large-decode-0: a block of 262144 bytes arrived unchanged"
        return LinkTest(True, text)

    async def _traffic(self, pods: list[Object]) -> TrafficFacts | None:
        if not pods or pods[0]["metadata"]["labels"]["tandem.dev/router"] != "chat":
            return None
        tiers = {
            "small": TierFacts(0.71, LatencyFacts(0.088, 710, 708), LatencyFacts(0.012, 710, 710)),
            "large": TierFacts(0.29, LatencyFacts(0.31, 290, 284), LatencyFacts(0.031, 290, 289)),
        }
        predictor = PredictorFacts("chat-difficulty-3", ("small", "large"))
        predictors = {pod["metadata"]["name"]: predictor for pod in pods}
        return TrafficFacts("chat-difficulty-3", 0.124, 0.962, 0.914, tiers, predictors)

    async def _scaling(self, router: Any, *_: Any) -> list[dict[str, str]]:
        if router.metadata.name != "chat":
            return []
        reason = "TTFT p95 with queue wait is 430ms at 2 workers and 620ms at 1"
        return [
            {"time": NOW, "pool": "large-decode", "before": "1", "after": "2", "reason": reason}
        ]


async def observed() -> Store:
    found = Observed()
    await found.settle()
    found.store.change("WorkerPool", NAMESPACE, "large-decode", {"spec": {"replicas": 3}})
    await found.settle()
    return found.store


@pytest.fixture(scope="module")
def shown(crds: Any) -> Iterator[Any]:
    """The objects with their statuses on the real apiserver, and nobody who changes them."""
    cluster = crds
    # None is there, unless tests of other files ran between those of this one.
    cluster.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--timeout=60s")
    cluster.kubectl("create", "namespace", NAMESPACE)
    store = asyncio.run(observed())
    custom = [o for kind in KINDS for o in store.find(kind)]
    cluster.kubectl("create", "-f", "-", stdin=yaml.safe_dump_all(map(_bare, custom)))
    statuses = yaml.safe_dump_all([{**_bare(o, spec=False), "status": o["status"]} for o in custom])
    manager = ("--field-manager=tandem-operator", "--subresource=status")
    cluster.kubectl("apply", "--server-side", *manager, "-f", "-", stdin=statuses)
    live = cluster.get("tandem", "-n", NAMESPACE)["items"]
    uids = {(o["kind"], o["metadata"]["name"]): o["metadata"]["uid"] for o in live}
    events = store.find("Event")
    for number, event in enumerate(events):
        about = event["involvedObject"]
        about["uid"] = uids[about["kind"], about["name"]]
        event["metadata"] = {"name": f"event-{number}", "namespace": NAMESPACE}
        event["firstTimestamp"] = event["lastTimestamp"] = NOW.replace("00Z", f"{number:02}Z")
    cluster.kubectl("create", "-f", "-", stdin=yaml.safe_dump_all(events))
    yield cluster
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def _bare(obj: Object, spec: bool = True) -> Object:
    """The object as somebody would write it."""
    keys = ("apiVersion", "kind", "spec") if spec else ("apiVersion", "kind")
    metadata = {
        k: obj["metadata"][k] for k in ("name", "namespace", "labels") if k in obj["metadata"]
    }
    return {**{k: obj[k] for k in keys}, "metadata": metadata}


OUTPUTS: dict[str, list[str]] = {
    "get.txt": ["kubectl get mdl,rtr,asp,wp", "kubectl get tandem"],
    "get-wide.txt": ["kubectl get mdl,rtr,asp,wp -o wide"],
    "describe-model.txt": ["kubectl describe model huge", "kubectl describe mdl large"],
    "describe-router.txt": ["kubectl describe router chat", "kubectl describe rtr draft"],
    "describe-rest.txt": ["kubectl describe asp default", "kubectl describe wp large-decode"],
    "explain-model.txt": [
        "kubectl explain mdl",
        "kubectl explain mdl.spec",
        "kubectl explain mdl.spec.weights.source",
        "kubectl explain mdl.spec.decode",
        "kubectl explain mdl.status",
    ],
    "explain-router.txt": [
        "kubectl explain rtr",
        "kubectl explain rtr.spec",
        "kubectl explain rtr.spec.tiers",
        "kubectl explain rtr.spec.budget",
        "kubectl explain rtr.status",
    ],
    "explain-rest.txt": [
        "kubectl explain asp",
        "kubectl explain asp.spec",
        "kubectl explain asp.spec.decode",
        "kubectl explain wp.spec",
        "kubectl explain wp.status",
    ],
    "unknown-fields.txt": [
        "kubectl apply -f tests/controlplane/golden/misspelt.yaml",
        "kubectl apply --validate=warn -f tests/controlplane/golden/misspelt.yaml",
        "kubectl apply --validate=ignore -f tests/controlplane/golden/misspelt.yaml",
        "kubectl get model misspelt -o jsonpath={.spec.unified}",
        "kubectl delete model misspelt",
    ],
    "wait-and-scale.txt": [
        "kubectl wait --for=condition=Ready model/small model/large router/chat --timeout=5s",
        "kubectl wait --for=condition=Ready model/huge --timeout=1s",
        "kubectl wait --for=condition=Ready=False model/huge --timeout=5s",
        "kubectl scale workerpool small-unified --replicas=2",
        "kubectl get wp small-unified",
        "kubectl scale workerpool small-unified --replicas=1001",
        "kubectl scale workerpool small-unified --replicas=1",
        "kubectl scale model small --replicas=2",
    ],
}

# Of tables: in the last column, or in another one since the fixed time, which is long ago.
AGES = re.compile(r"(?<=\s)\d+[ydhms](?:\d+[dhms])?(?=\s*$)|\b\d{2,}d(?=\s)", re.M)
MASKS = (
    # A hash over the pods of a Model, which changes whenever they do.
    (re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{10}\b"), "<revision>"),
    (re.compile(r"(?<=Creation Timestamp:  )\S+"), "<time>"),
    (re.compile(r"(?<=UID:                 )\S+"), "<uid>"),
    (re.compile(r"(?<=Resource Version:    )\d+"), "<version>"),
    (re.compile(r"^(  (?:Normal|Warning)\s+\S+\s+)\S+", re.M), r"\1<age>"),
)


KLOG = re.compile(r"[EWI]\d{4} \d\d:\d\d:\d\d")


def read(cluster: Any, command: str) -> str:
    """A command and what it prints, ready to be compared."""
    result = cluster.run("sh", "-c", f"cd '{ROOT}' && {command} -n {NAMESPACE}")
    text = result.stdout + result.stderr
    if " get " in command:
        text = AGES.sub("<age>", text)
    for pattern, mask in MASKS:
        text = pattern.sub(mask, text)
    # kubectl tells itself in its log's form that it ended a watch, now and then.
    lines = [line.rstrip() for line in text.splitlines() if not KLOG.match(line)]
    return "\n".join([f"$ {command}", *lines]) + "\n"


@pytest.mark.parametrize("name", OUTPUTS)
def test_kubectl_reads_as_committed(shown: Any, name: str) -> None:
    found = "\n".join(read(shown, command) for command in OUTPUTS[name])
    path = GOLDEN / name
    if os.environ.get("TANDEM_GOLDEN") == "write":
        path.write_text(found)

    assert found == path.read_text(), "see this file's docstring for how to write it anew"


def test_ready_is_the_first_thing_to_read_and_the_reason_the_next(shown: Any) -> None:
    """The golden files show what is wanted, not only what is."""
    text = (GOLDEN / "get.txt").read_text()

    assert re.search(r"model\S*/huge +False +InsufficientGPU +0/1 ", text)
    assert re.search(r"router\S*/draft +False +ModelMissing ", text)
    assert re.search(r"router\S*/chat +True +Serving +Met +OverGPUs +25.2 +5 +http://", text)
