"""Where workers run, decided by the real scheduler, and what people read when they cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from running_cluster import operating

NAMESPACE = "pools"
IN = ("--namespace", NAMESPACE)


def model(name: str, role: str, source: str = "image:///opt/m") -> str:
    return (
        "apiVersion: tandem.dev/v1alpha1\nkind: Model\n"
        f"metadata: {{name: {name}}}\nspec:\n"
        f"  weights: {{source: {source!r}}}\n  unified: {role}\n"
    )


def router(name: str, model: str, more: str = "") -> str:
    return (
        "apiVersion: tandem.dev/v1alpha1\nkind: Router\n"
        f"metadata: {{name: {name}}}\nspec:\n"
        f"  tiers: [{{name: only, modelRef: {{name: {model}}}}}]\n{more}"
    )


def patched(container: str) -> str:
    """A role whose podPatch sets this of its container."""
    return f"{{podPatch: {{spec: {{containers: [{{name: worker, {container}}}]}}}}}}"


SIXTEEN = (
    '{name: worker, resources: {limits: {nvidia.com/gpu: "16"}, requests: {nvidia.com/gpu: "16"}}}'
)

# Each asks one thing of the scheduler; images that no table knows never start a process.
RESOURCES = "---\n".join(
    [
        # A node has 8 GPUs, the Model wants 16 on one.
        model("huge", f"{{podPatch: {{spec: {{containers: [{SIXTEEN}]}}}}}}"),
        model("nowhere", '{nodeSelector: {zone: "none"}}'),
        model("unclaimed", "{}", "pvc://missing/weights"),
        model(
            "placed",
            "{gpus: 1, nodeSelector: {kubernetes.io/hostname: node-1}, "
            "priorityClassName: pools-high, tolerations: [{key: gpu, operator: Exists}], "
            "podPatch: {spec: {affinity: {podAntiAffinity: "
            "{requiredDuringSchedulingIgnoredDuringExecution: "
            "[{topologyKey: kubernetes.io/hostname, "
            "labelSelector: {matchLabels: {tandem.dev/model: placed}}}]}}}}, replicas: 2}",
        ),
        model("ranked", "{priorityClassName: nobodys-class}"),
        model("unmounted", patched("volumeMounts: [{name: nosuch, mountPath: /mnt/x}]")),
        model("numbered", patched("env: [{name: A, value: 1}]")),
        router("lonely", "nobody"),
        router("unruled", "placed", "  scaling: {mode: Managed, policyRef: {name: nosuch}}\n"),
        router("keyless", "placed", "  metricsTokenSecretRef: {name: nosuch}\n"),
        "apiVersion: tandem.dev/v1alpha1\nkind: WorkerPool\nmetadata: {name: ghost-unified}\n"
        "spec: {modelRef: {name: ghost}, role: unified}\n",
        "apiVersion: scheduling.k8s.io/v1\nkind: PriorityClass\n"
        "metadata: {name: pools-high}\nvalue: 1000\n",
    ]
)


@pytest.fixture(scope="module")
def pools(crds: Any) -> Iterator[Any]:
    """An operator of the namespace, and what cannot run there."""
    cluster = crds
    with operating(cluster, NAMESPACE, "--worker-image", "none:1"):
        cluster.kubectl("apply", *IN, "-f", "-", stdin=RESOURCES)
        yield cluster
    cluster.run("kubectl", "delete", "priorityclass", "pools-high")


@pytest.mark.parametrize(
    ("name", "reason", "text"),
    [
        ("model/huge", "InsufficientGPU", "Insufficient nvidia.com/gpu"),
        ("model/nowhere", "Unschedulable", "didn't match Pod's node affinity/selector"),
        ("model/unclaimed", "VolumeMissing", 'persistentvolumeclaim "missing" not found'),
        ("model/ranked", "PodsRefused", "make PriorityClass nobodys-class, or name another one"),
        ("model/unmounted", "ChildRefused", 'Not found: "nosuch"'),
        ("model/numbered", "ChildRefused", "correct podPatch"),
        ("router/lonely", "ModelMissing", "create it or correct modelRef"),
        ("router/keyless", "SecretMissing", "allow its use: kubectl label secret nosuch"),
        ("workerpool/ghost-unified", "MadeByHand", "delete it, and scale the pools of Model ghost"),
    ],
)
def test_what_keeps_a_model_from_running_is_in_kubectl_get(
    pools: Any, name: str, reason: str, text: str
) -> None:
    ready = '--for=jsonpath={.status.conditions[?(@.type=="Ready")].reason}=' + reason
    pools.kubectl("wait", *IN, ready, name, "--timeout=50s")

    row = pools.kubectl("get", *IN, name, "--no-headers")
    events = pools.get("events", *IN)["items"]

    assert reason in row.split() or name.startswith("workerpool/")
    told = [e["message"] for e in events if e["reason"] == reason]
    assert any(text in message for message in told), told


def test_a_policy_that_is_missing_is_told_and_is_not_why_a_router_is_not_ready(pools: Any) -> None:
    told = '--for=jsonpath={.status.conditions[?(@.type=="Accepted")].reason}=PolicyMissing'
    pools.kubectl("wait", *IN, told, "router/unruled", "--timeout=50s")

    conditions = pools.get("router", "unruled", *IN)["status"]["conditions"]

    ready = next(c for c in conditions if c["type"] == "Ready")
    assert ready["reason"] != "PolicyMissing"


def test_pods_go_where_the_role_says(pools: Any) -> None:
    """Node, GPUs, priority and toleration from the schema, anti-affinity through podPatch."""
    chosen = "tandem.dev/model=placed"
    pools.kubectl("wait", *IN, "--for=create", "pod", "-l", chosen, "--timeout=50s")
    scheduled = ("wait", *IN, "--for=condition=PodScheduled", "--timeout=5s", "pod", "-l", chosen)
    pools.run("kubectl", *scheduled)  # one of the two never is

    pods = pools.get("pods", *IN, "-l", chosen)["items"]

    where = sorted(str(p["spec"].get("nodeName")) for p in pods)
    assert where == ["None", "node-1"]
    for pod in pods:
        spec = pod["spec"]
        assert spec["priority"] == 1000
        assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert any(t.get("key") == "gpu" for t in spec["tolerations"])
