"""Pools: where workers run, what they ask of a node, and how they come to their weights."""

from __future__ import annotations

from typing import Any

import pytest

from stored_cluster import Cluster
from tandem_operator.plan.model_status import LinkTest
from tandem_operator.plan.pods import first_blocker

Object = dict[str, Any]

PLACED = """\
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {name: m}
spec:
  weights:
    source: SOURCE
    secretRef: {name: hub-token}
    cache: {size: 80Gi, storageClassName: shared}
  prefill:
    gpus: 1
    nodeSelector: {gpu: h100}
    tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
    priorityClassName: serving
    resources: {cpu: "8", memory: 64Gi}
    podPatch: {spec: {affinity: {podAntiAffinity: {}}, containers: [{name: worker, stdin: true}]}}
  decode: {gpus: 0}
"""


class Pools(Cluster):
    """A Model `m` whose link nobody tested yet."""

    def pod_spec(self, role: str) -> Object:
        spec: Object = self.get("Deployment", f"m-{role}")["spec"]["template"]["spec"]
        return spec

    def events(self) -> list[tuple[str, str, str]]:
        found = self.store.find("Event")
        return [(e["involvedObject"]["kind"], e["type"], e["reason"]) for e in found]


async def placed(source: str = '"hf://org/name@v1"') -> Pools:
    cluster = Pools(PLACED.replace("SOURCE", source))
    cluster.link = LinkTest(None)
    await cluster.settle()
    return cluster


async def test_each_role_asks_for_its_own_gpus_and_place() -> None:
    cluster = await placed()
    prefill, decode = cluster.pod_spec("prefill"), cluster.pod_spec("decode")

    asked = [spec["containers"][0]["resources"] for spec in (prefill, decode)]
    assert [(r.get("limits") or {}).get("nvidia.com/gpu") for r in asked] == ["1", None]
    assert asked[0]["requests"] == {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "1"}
    assert prefill["nodeSelector"] == {"gpu": "h100"}
    toleration = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert prefill["tolerations"] == [toleration]
    assert prefill["priorityClassName"] == "serving"
    assert not {"nodeSelector", "tolerations", "priorityClassName"} & set(decode)


async def test_a_pod_patch_brings_what_the_schema_leaves_out() -> None:
    cluster = await placed()
    prefill, decode = cluster.pod_spec("prefill"), cluster.pod_spec("decode")

    assert prefill["affinity"] == {"podAntiAffinity": {}}
    assert prefill["containers"][0]["stdin"] is True
    assert prefill["containers"][0]["args"][0] == "--config"
    assert "affinity" not in decode


@pytest.mark.parametrize("source", ["hf://org/name@v1", "s3://bucket/prefix"])
async def test_downloads_run_first_with_the_secret_into_the_shared_claim(source: str) -> None:
    cluster = await placed(f'"{source}"')

    folders = set()
    for role in ("prefill", "decode"):
        spec = cluster.pod_spec(role)
        (fetch,) = spec["initContainers"]
        assert fetch["command"] == ["python", "-m", "tandem_worker.models.download"]
        assert fetch["args"][0] == source
        assert fetch["envFrom"] == [{"secretRef": {"name": "hub-token"}}]
        volume = next(v for v in spec["volumes"] if v["name"] == "weights")
        assert volume["persistentVolumeClaim"] == {"claimName": "m-weights"}
        assert {m["name"]: m.get("readOnly", False) for m in fetch["volumeMounts"]}["weights"] is (
            False
        )
        args = spec["containers"][0]["args"]
        assert args[args.index("--weights") + 1] == fetch["args"][1]
        folders.add(fetch["args"][1])
    claim = cluster.store.read("PersistentVolumeClaim", "default", "m-weights")
    assert claim is not None
    assert len(folders) == 1
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["spec"]["storageClassName"] == "shared"


async def test_a_claim_for_one_node_is_asked_for_where_the_model_says_so() -> None:
    once = PLACED.replace("storageClassName: shared", "accessMode: ReadWriteOnce")
    cluster = Pools(once.replace("SOURCE", "hf://org/name"))
    await cluster.settle()

    claim = cluster.get("PersistentVolumeClaim", "m-weights")
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]


async def test_a_container_that_fails_says_why_in_the_status() -> None:
    """Without this a kubelet reports the exit code alone."""
    cluster = await placed()
    for role in ("prefill", "decode"):
        spec = cluster.pod_spec(role)
        for container in [*spec["initContainers"], *spec["containers"]]:
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


@pytest.mark.parametrize(
    ("message", "reason", "fix"),
    [
        ("0/2 nodes are available: 2 Insufficient nvidia.com/gpu.", "InsufficientGPU", "add GPUs"),
        ('persistentvolumeclaim "c" not found.', "VolumeMissing", "create the claim"),
        ("pod has unbound immediate PersistentVolumeClaims.", "VolumeMissing", "create the claim"),
        ("0/2 nodes are available: 2 node(s) had untolerated taint.", "Unschedulable", "no node"),
    ],
)
def test_what_the_scheduler_says_becomes_a_cause_with_the_next_step(
    message: str, reason: str, fix: str
) -> None:
    status = {"conditions": [{"type": "PodScheduled", "status": "False", "message": message}]}
    found = first_blocker([{"metadata": {"name": "p"}, "spec": {}, "status": status}])

    assert found is not None
    assert found.reason == reason
    assert fix in found.message


def test_a_failed_download_shows_what_the_downloader_said() -> None:
    said = "hf://org/name: HTTP 401; give a token in weights.secretRef"
    ended = {"exitCode": 1, "message": said}
    entry = {
        "name": "fetch-weights",
        "restartCount": 2,
        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        "lastState": {"terminated": ended},
    }
    pod = {"metadata": {"name": "p"}, "spec": {}, "status": {"initContainerStatuses": [entry]}}

    found = first_blocker([pod])

    assert found is not None
    assert found.reason == "WeightsDownload"
    assert said in found.message


async def test_a_person_is_told_when_a_pool_changes_its_size() -> None:
    cluster = await placed()
    cluster.store.change("WorkerPool", "default", "m-decode", {"spec": {"replicas": 3}})
    await cluster.settle()
    await cluster.settle()

    scaled = [e for e in cluster.store.find("Event") if e["reason"] == "Scaled"]
    assert [e["message"] for e in scaled] == ["1 to 3 workers: set through /scale"]
    assert scaled[0]["involvedObject"]["name"] == "m-decode"


async def test_a_person_is_told_when_a_link_that_worked_breaks_and_when_it_works_again() -> None:
    cluster = await placed()
    for name in ("prefill", "decode"):
        deployment = cluster.store.read("Deployment", "default", f"m-{name}")
        assert deployment is not None
        cluster.store.add(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": name,
                    "namespace": "default",
                    "labels": deployment["spec"]["template"]["metadata"]["labels"],
                },
                "spec": {"containers": []},
                "status": {"conditions": [{"type": "Ready", "status": "True"}]},
            }
        )
    for ok in (True, False, False, True):
        cluster.link = LinkTest(ok, "tested")
        await cluster.settle()

    told = [e for e in cluster.events() if e[2] in ("KVLinkFailed", "BlockTransferred", "Serving")]
    assert told == [
        ("Model", "Normal", "Serving"),
        ("Model", "Warning", "KVLinkFailed"),
        ("Model", "Normal", "BlockTransferred"),
        ("Model", "Normal", "Serving"),
    ]
