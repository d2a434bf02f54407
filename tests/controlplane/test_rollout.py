"""A rollout on a cluster without a free accelerator, by the real scheduler and controllers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from eventually import eventually_in_another_process
from running_cluster import operating

NAMESPACE = "rollout"
IN = ("--namespace", NAMESPACE)
# Of this test alone, so that no other one's pods hold any.
SLICES = "example.com/slice"
NODES = ("node-0", "node-1")

# What a server of another engine is asked for, and nothing more.
SERVE = """
import http.server, os
class Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"data": [{"id": "m"}]}'
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
http.server.HTTPServer((os.environ["POD_IP"], 8100), Models).serve_forever()
"""
CLAIM = {
    "apiVersion": "v1",
    "kind": "PersistentVolumeClaim",
    "metadata": {"name": "weights", "namespace": NAMESPACE},
    "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}},
}
MODEL = {
    "apiVersion": "tandem.dev/v1alpha1",
    "kind": "Model",
    "metadata": {"name": "m", "namespace": NAMESPACE},
    "spec": {
        "engine": {"type": "OpenAI"},
        "image": "python",
        "weights": {"source": "pvc://weights/m"},
        "drain": {"timeout": "1s"},
        "rollout": {"maxUnavailable": 0},
        "unified": {
            "replicas": 2,
            "gpus": 1,
            "gpuResource": SLICES,
            "podPatch": {
                "spec": {
                    "containers": [{"name": "worker", "command": ["python", "-c", SERVE]}],
                }
            },
        },
    },
}


@pytest.fixture(scope="module")
def full(crds: Any) -> Iterator[Any]:
    """Two nodes with one slice each, and a Model whose two workers hold both."""
    cluster = crds
    offer = json.dumps({"status": {"capacity": {SLICES: "1"}, "allocatable": {SLICES: "1"}}})
    for node in NODES:
        cluster.kubectl("patch", "node", node, "--subresource=status", "-p", offer)
    allow = json.dumps({"images": ["python"], "podFields": ["command"]})
    with operating(cluster, NAMESPACE, "--allow", allow):
        for obj in (CLAIM, MODEL):
            cluster.kubectl("apply", "-f", "-", stdin=json.dumps(obj))
        cluster.kubectl(
            "wait", *IN, "--for=jsonpath={.status.ready}=2/2", "model/m", "--timeout=50s"
        )
        yield cluster


SPLIT_NAMESPACE = "stand-in-rollout"
SPLIT = {
    "apiVersion": "tandem.dev/v1alpha1",
    "kind": "Model",
    "metadata": {"name": "m", "namespace": SPLIT_NAMESPACE},
    "spec": {
        "weights": {"source": "image:///opt/tandem/m"},
        "drain": {"timeout": "1s"},
        "prefill": {"gpus": 1, "gpuResource": SLICES},
        "decode": {"gpus": 1, "gpuResource": SLICES},
    },
}


def progress(cluster: Any, namespace: str = NAMESPACE) -> dict[str, Any]:
    conditions = cluster.get("model", "m", "-n", namespace)["status"]["conditions"]
    return next(c for c in conditions if c["type"] == "Progressing")


def test_a_rollout_without_room_is_said_and_goes_on_when_one_may_go(full: Any) -> None:
    """An explicit 0 keeps both and says so; without it one goes first, and one always serves."""
    change = json.dumps({"spec": {"rollout": {"startupTimeout": "5m"}}})
    full.kubectl("patch", *IN, "model", "m", "--type=merge", "-p", change)
    stuck = '--for=jsonpath={.status.conditions[?(@.type=="Progressing")].reason}=WaitingForRoom'
    full.kubectl("wait", *IN, stuck, "model/m", "--timeout=50s")

    assert "rollout.maxUnavailable is 0: add nodes, or set" in progress(full)["message"]
    assert full.get("model", "m", *IN)["status"]["ready"] == "2/2"
    events = [e["reason"] for e in full.get("events", *IN)["items"]]
    assert events.count("WaitingForRoom") == 1

    free = json.dumps({"spec": {"rollout": {"maxUnavailable": None}}})
    full.kubectl("patch", *IN, "model", "m", "--type=merge", "-p", free)
    least, deadline = 2, time.monotonic() + 90.0
    while progress(full)["status"] == "True":
        assert time.monotonic() < deadline, progress(full)
        ready = full.get("deployment", "m-unified", *IN)["status"].get("readyReplicas", 0)
        least = min(least, ready)

    assert least == 1
    status = full.get("model", "m", *IN)["status"]
    assert (status["ready"], status["roles"][0]["updated"], status["gpus"]) == ("2/2", 2, 2)
    settled = "--for=jsonpath={.spec.strategy.rollingUpdate.maxUnavailable}=0"
    full.kubectl("wait", *IN, settled, "deployment/m-unified", "--timeout=30s")


def test_the_only_workers_of_two_roles_stay_until_the_model_allows_the_outage(full: Any) -> None:
    """Each role's pair of old and new is told of; allowed to, both give way and the pair is new."""
    full.kubectl("delete", "model", "m", *IN, "--wait=true")
    full.kubectl("wait", "--for=delete", "pod", *IN, "-l", "tandem.dev/model=m", "--timeout=60s")
    there = ("-n", SPLIT_NAMESPACE)
    with operating(full, SPLIT_NAMESPACE):
        full.kubectl("apply", "-f", "-", stdin=json.dumps(SPLIT))
        full.kubectl(
            "wait", *there, "--for=jsonpath={.status.ready}=2/2", "model/m", "--timeout=50s"
        )
        change = json.dumps({"spec": {"rollout": {"startupTimeout": "5m"}}})
        full.kubectl("patch", *there, "model", "m", "--type=merge", "-p", change)
        both = [f"the new {role} worker" for role in ("prefill", "decode")]
        eventually_in_another_process(
            lambda: all(text in progress(full, SPLIT_NAMESPACE)["message"] for text in both), 60.0
        )

        said = progress(full, SPLIT_NAMESPACE)["message"]
        assert said.count("the only ready worker is not taken down: add nodes, or set") == 2
        assert full.get("model", "m", *there)["status"]["ready"] == "2/2"

        allow = json.dumps({"spec": {"rollout": {"maxUnavailable": 1}}})
        full.kubectl("patch", *there, "model", "m", "--type=merge", "-p", allow)
        done = '--for=jsonpath={.status.conditions[?(@.type=="Progressing")].status}=False'
        full.kubectl("wait", *there, done, "model/m", "--timeout=60s")
        roles = full.get("model", "m", *there)["status"]["roles"]
        assert [(role["ready"], role["updated"]) for role in roles] == [(1, 1), (1, 1)]
