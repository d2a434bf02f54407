"""A rollout on a cluster without room: seen, said, and taken on one worker at a time."""

from __future__ import annotations

from typing import Any

import pytest

from objects_table import model as model_text
from stored_cluster import Cluster
from tandem_operator.plan.objects import REVISION_LABEL

Object = dict[str, Any]
FULL = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu. preemption: no victims."


def text(replicas: int, rollout: str = "{}", dtype: str = "float32") -> str:
    return model_text(
        f"  unified: {{replicas: {replicas}, gpus: 1}}\n  rollout: {rollout}\n"
        f"  engine: {{dtype: {dtype}}}\n"
    )


class Full(Cluster):
    """Every GPU is held by the workers that run: a new one waits until one of them goes."""

    def pods(self) -> list[Object]:
        return self.store.find("Pod")

    def surge(self) -> None:
        """The pod of the new revision that the Deployment makes first, and its scheduler's word."""
        template = self.get("Deployment", "m-unified")["spec"]["template"]
        no = {"type": "PodScheduled", "status": "False", "message": FULL}
        self._write("new", template, {"phase": "Pending", "conditions": [no]}, None)

    def run(self) -> None:
        template = self.get("Deployment", "m-unified")["spec"]["template"]
        for number in range(self.get("Deployment", "m-unified")["spec"]["replicas"]):
            ready = {"type": "Ready", "status": "True"}
            status = {"podIP": f"127.9.0.{number + 2}", "conditions": [ready]}
            self._write(f"old-{number}", template, status, "node")

    def _write(self, name: str, template: Object, status: Object, node: str | None) -> None:
        metadata = {**template["metadata"], "name": name, "namespace": "default"}
        spec = {**template["spec"], **({"nodeName": node} if node else {})}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}
        self.store.write({**pod, "spec": spec, "status": status}, manager="kubelet")

    @property
    def missing(self) -> int:
        spec = self.get("Deployment", "m-unified")["spec"]
        found: int = spec["strategy"]["rollingUpdate"]["maxUnavailable"]
        return found

    @property
    def progress(self) -> Object:
        return self.condition("Model", "m", "Progressing")


async def rolling(replicas: int, rollout: str = "{}") -> Full:
    cluster = Full(text(replicas, rollout))
    await cluster.settle()
    cluster.run()
    await cluster.settle()
    assert cluster.progress["status"] == "False"
    cluster.apply(text(replicas, rollout, "float16"))
    await cluster.settle()
    cluster.surge()
    await cluster.settle()
    return cluster


async def test_one_goes_first_where_the_new_worker_finds_no_room() -> None:
    cluster = await rolling(2)

    assert cluster.missing == 1
    assert cluster.progress["reason"] == "WaitingForRoom"
    assert cluster.progress["message"].endswith(
        "the new unified worker new waits for a GPU that an old one holds; one of the old ones "
        "goes first"
    )
    ready = cluster.condition("Model", "m", "Ready")
    assert (ready["status"], ready["reason"]) == ("True", "Serving")
    assert "one of the old ones goes first" in ready["message"]
    told = [e["reason"] for e in cluster.store.find("Event")]
    assert told.count("WaitingForRoom") == 1


async def test_it_stays_so_until_all_are_new_and_then_ends() -> None:
    cluster = await rolling(2)
    cluster.store.drop("Pod", "default", "old-0")
    new = next(p for p in cluster.pods() if p["metadata"]["name"] == "new")
    ready = {"podIP": "127.9.0.9", "conditions": [{"type": "Ready", "status": "True"}]}
    cluster.store.write({**new, "status": ready}, manager="kubelet")
    await cluster.settle()
    assert cluster.missing == 1

    cluster.store.drop("Pod", "default", "old-1")
    await cluster.settle()
    assert cluster.missing == 0


@pytest.mark.parametrize(
    ("replicas", "rollout", "missing", "said"),
    [
        (1, "{}", 0, "the only ready worker is not taken down: add nodes, or set rollout.maxUn"),
        (1, "{maxUnavailable: 1}", 1, "that an old one holds"),
        (2, "{maxUnavailable: 0}", 0, "rollout.maxUnavailable is 0: add nodes, or set"),
    ],
)
async def test_the_last_worker_and_an_explicit_zero_are_kept(
    replicas: int, rollout: str, missing: int, said: str
) -> None:
    cluster = await rolling(replicas, rollout)

    assert cluster.missing == missing
    assert said in cluster.progress["message"]


async def test_a_worker_that_is_about_to_go_makes_room_enough() -> None:
    cluster = Full(text(2))
    await cluster.settle()
    cluster.run()
    await cluster.settle()
    going = cluster.pods()[0]
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    cluster.store.write(going, manager="kubelet")
    cluster.apply(text(2, dtype="float16"))
    await cluster.settle()
    cluster.surge()
    await cluster.settle()

    assert cluster.missing == 0
    assert cluster.progress["reason"] == "RollingOut"


async def test_workers_without_room_on_their_first_start_are_no_rollout() -> None:
    cluster = Full(text(2))
    await cluster.settle()
    cluster.surge()
    await cluster.settle()

    assert cluster.missing == 0
    assert cluster.progress["reason"] == "RollingOut"
    assert cluster.pods()[0]["metadata"]["labels"][REVISION_LABEL]
