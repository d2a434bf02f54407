"""Pools: where workers run, what they ask of a node, and how they come to their weights."""

from __future__ import annotations

import pytest

from objects_table import model
from stored_cluster import Cluster
from tandem_operator.plan import Settings, plan_model
from tandem_operator.plan.model_status import LinkTest
from tandem_operator.plan.pods import first_blocker
from tandem_operator.plan.scheduling import GPU_ANNOTATION, gpus_of_pod
from tandem_operator.resources import Model
from tandem_operator.resources.base import Object

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
        ("pod has unbound immediate PersistentVolumeClaims.", "VolumeMissing", "describe pvc"),
        (
            'storageclass.storage.k8s.io "fast" not found',
            "VolumeMissing",
            "make StorageClass fast, or name another one",
        ),
        ("0/2 nodes are available: 2 node(s) had untolerated taint.", "Unschedulable", "tolerate"),
        ("0/1 nodes are available: 1 Insufficient cpu.", "Unschedulable", "lower what resources"),
        (
            "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector.",
            "Unschedulable",
            "correct nodeSelector",
        ),
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


async def test_the_models_first_change_of_a_count_is_told_too() -> None:
    text = model("  unified: {replicas: 2}\n")
    cluster = Pools(text)
    await cluster.settle()

    cluster.apply(text.replace("replicas: 2", "replicas: 1"))
    await cluster.settle()

    (scaled,) = [e for e in cluster.store.find("Event") if e["reason"] == "Scaled"]
    assert scaled["message"] == "2 to 1 workers: the Model's replicas changed"
    last = cluster.get("WorkerPool", "m-unified")["status"]["lastScale"]
    assert (last["before"], last["after"]) == (2, 1)


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
    ]
    (serving,) = [e for e in cluster.store.find("Event") if e["reason"] == "Serving"]
    assert serving["count"] == 2  # told once, and counted when it served again


def test_what_the_scheduler_tried_besides_is_left_out() -> None:
    said = (
        "0/2 nodes are available: 2 Insufficient nvidia.com/gpu. no new claims to deallocate, "
        "preemption: 0/2 nodes are available: 2 No preemption victims found for incoming pod."
    )
    status = {"conditions": [{"type": "PodScheduled", "status": "False", "message": said}]}
    found = first_blocker([{"metadata": {"name": "p"}, "spec": {}, "status": status}])

    assert found is not None
    assert found.message == (
        "pod p waits for GPUs: 0/2 nodes are available: 2 Insufficient nvidia.com/gpu; add GPUs "
        "or lower replicas"
    )


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("fast", "claim m-weights waits for StorageClass fast, which must exist and offer RWX"),
        (None, "claim m-weights names no StorageClass and the cluster has no default one"),
    ],
)
def test_a_claim_without_a_volume_is_named_with_its_storage_class(
    kind: str | None, said: str
) -> None:
    unbound = "pod has unbound immediate PersistentVolumeClaims"
    volume = {"name": "weights", "persistentVolumeClaim": {"claimName": "m-weights"}}
    pod = {
        "metadata": {"name": "p"},
        "spec": {"volumes": [volume]},
        "status": {"conditions": [{"type": "PodScheduled", "status": "False", "message": unbound}]},
    }
    spec = {"accessModes": ["RWX"], **({"storageClassName": kind} if kind else {})}
    claim = {"spec": spec, "status": {"phase": "Pending"}}

    found = first_blocker([pod], {"m-weights": claim})

    assert found is not None
    assert found.reason == "VolumeMissing"
    assert said in found.message


def test_gpus_are_asked_for_and_counted_under_the_name_that_nodes_offer_them() -> None:
    model = Model.model_validate(
        {
            "metadata": {"name": "m", "namespace": "default", "uid": "u"},
            "spec": {
                "weights": {"source": "hf://org/name"},
                "prefill": {"gpus": 1, "gpuResource": "amd.com/gpu"},
                "decode": {"gpus": 1, "replicas": 2},
            },
        }
    )
    plan = plan_model(model, [], [], Settings(), "t")
    made = {o["metadata"]["name"]: o["spec"] for o in plan.apply if o["kind"] == "Deployment"}
    limits = {
        name: spec["template"]["spec"]["containers"][0]["resources"]["limits"]
        for name, spec in made.items()
    }
    pods = [spec["template"] for spec in made.values() for _ in range(spec["replicas"])]

    assert limits == {"m-prefill": {"amd.com/gpu": "1"}, "m-decode": {"nvidia.com/gpu": "1"}}
    assert sum(gpus_of_pod(pod) for pod in pods) == 3


def test_missing_gpus_of_another_name_are_a_first_cause() -> None:
    why = "0/3 nodes are available: 3 Insufficient amd.com/gpu."
    pod = {
        "metadata": {"name": "p", "annotations": {GPU_ANNOTATION: "amd.com/gpu"}},
        "spec": {"containers": [{"name": "worker", "resources": {"limits": {"amd.com/gpu": "1"}}}]},
        "status": {"conditions": [{"type": "PodScheduled", "status": "False", "message": why}]},
    }

    found = first_blocker([pod])

    assert found is not None
    assert found.reason == "InsufficientGPU"


def cached(reclaim: str | None) -> Model:
    cache = {"size": "1Gi", **({"reclaim": reclaim} if reclaim else {})}
    return Model.model_validate(
        {
            "metadata": {"name": "m", "namespace": "default", "uid": "u"},
            "spec": {"weights": {"source": "hf://org/name", "cache": cache}, "unified": {}},
        }
    )


@pytest.mark.parametrize(("reclaim", "owned"), [(None, False), ("Retain", False), ("Delete", True)])
def test_cached_weights_outlive_their_model_unless_it_says_otherwise(
    reclaim: str | None, owned: bool
) -> None:
    plan = plan_model(cached(reclaim), [], [], Settings(), "t")
    claim = next(o for o in plan.apply if o["kind"] == "PersistentVolumeClaim")

    assert ("ownerReferences" in claim["metadata"]) is owned
    assert claim["metadata"]["labels"]["tandem.dev/model"] == "m"


async def test_a_model_of_the_same_name_takes_its_kept_weights_up_again() -> None:
    cluster = await placed('"hf://org/name"')
    before = cluster.get("PersistentVolumeClaim", "m-weights")["metadata"]["uid"]

    cluster.store.remove("Model", "default", "m")
    assert cluster.names("PersistentVolumeClaim") == ["m-weights"]
    assert cluster.names("Deployment") == []
    cluster.apply(PLACED.replace("SOURCE", "hf://org/name"))
    await cluster.settle()

    assert cluster.get("PersistentVolumeClaim", "m-weights")["metadata"]["uid"] == before
    assert cluster.condition("Model", "m", "Accepted")["status"] == "True"


async def test_a_claim_of_somebody_else_is_not_taken_up() -> None:
    cluster = Pools(PLACED.replace("SOURCE", "hf://org/name"))
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "spec": {}}
    cluster.store.write(
        {**claim, "metadata": {"name": "m-weights", "namespace": "default"}}, manager="user"
    )
    await cluster.settle()

    assert cluster.condition("Model", "m", "Accepted")["reason"] == "NameTaken"


async def test_a_pod_that_waits_for_a_secret_says_so_and_what_to_do() -> None:
    """A kubelet leaves it at ContainerCreating."""
    cluster = await placed('"hf://org/name"')
    waiting = {"name": "fetch-weights", "state": {"waiting": {"reason": "ContainerCreating"}}}
    cluster.start_pods(phase="Pending", initContainerStatuses=[waiting])
    for pod in cluster.store.find("Pod"):
        body = {**pod, "spec": {**pod["spec"], "nodeName": "n"}}
        cluster.store.write(body, manager="kubelet")
    await cluster.settle()

    ready = cluster.condition("Model", "m", "Ready")
    assert ready["reason"] == "VolumeMissing"
    assert "waits for Secret hub-token, which does not exist; create it" in ready["message"]
