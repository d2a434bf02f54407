"""Who sets a pool's replicas: a person, an HPA or the operator, one at a time and never against
each other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem_operator.resources.base import Object

HERE = Path(__file__).resolve().parent
CHART = str(HERE.parents[1] / "charts" / "tandem")
NAMESPACE = "scaling"
IN = ("-n", NAMESPACE)
OWN = f"operator.replicas=1,operator.watchNamespace={NAMESPACE},allow.ownNamespace=true"
POOL = "workerpool/m-unified"
METRICS_ADDRESS, METRICS_PORT = "10.77.0.200", 6444
NOWHERE = {"no-node": "has-this"}


def _object(kind: str, name: str, **spec: Any) -> Object:
    metadata = {"name": name, "namespace": NAMESPACE}
    return {"apiVersion": "tandem.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}


# No node takes the pods: that there are so many of them is all that scaling looks at here.
RESOURCES = [
    _object(
        "Model",
        "m",
        weights={"source": "image:///m"},
        unified={"nodeSelector": NOWHERE, "maxReplicas": 8},
    ),
    _object(
        "Router",
        "r",
        tiers=[{"name": "m", "modelRef": {"name": "m"}}],
        scaling={"mode": "External"},
        podPatch={"spec": {"nodeSelector": NOWHERE}},
    ),
]

RECIPE = HERE.parents[1] / "examples" / "13-keda" / "scaledobject.yaml"
KEDAS_METRIC = "s0-prometheus"  # of a ScaledObject's first trigger


def kedas_hpa(recipe: Object, pool: str) -> Object:
    """The HorizontalPodAutoscaler that KEDA makes of a ScaledObject, on another pool."""
    spec = recipe["spec"]
    (trigger,) = spec["triggers"]
    target = trigger["metadata"]["threshold"]
    metric = {
        "metric": {
            "name": KEDAS_METRIC,
            "selector": {"matchLabels": {"scaledobject.keda.sh/name": recipe["metadata"]["name"]}},
        },
        "target": {"type": trigger["metricType"], "averageValue": target},
    }
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "m"},
        "spec": {
            "scaleTargetRef": {**spec["scaleTargetRef"], "name": pool},
            "minReplicas": spec["minReplicaCount"],
            "maxReplicas": spec["maxReplicaCount"],
            "metrics": [{"type": "External", "external": metric}],
            # Down at once; the default waits five minutes.
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 0}},
        },
    }


METRICS_API: list[Object] = [
    {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "external-metrics", "namespace": NAMESPACE},
        "spec": {"ports": [{"name": "https", "port": 443}]},
    },
    {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "external-metrics",
            "namespace": NAMESPACE,
            "labels": {"kubernetes.io/service-name": "external-metrics"},
        },
        "addressType": "IPv4",
        "ports": [{"name": "https", "port": METRICS_PORT}],
        "endpoints": [{"addresses": [METRICS_ADDRESS], "conditions": {"ready": True}}],
    },
    {
        "apiVersion": "apiregistration.k8s.io/v1",
        "kind": "APIService",
        "metadata": {"name": "v1beta1.external.metrics.k8s.io"},
        "spec": {
            "group": "external.metrics.k8s.io",
            "version": "v1beta1",
            "groupPriorityMinimum": 100,
            "versionPriority": 100,
            "insecureSkipTLSVerify": True,
            "service": {"name": "external-metrics", "namespace": NAMESPACE},
        },
    },
]


@pytest.fixture(scope="module")
def scaled(cluster: Any) -> Iterator[Any]:
    """The chart, a Model without a place to run, and a Router that leaves scaling to others."""
    # None is there, unless tests of other files ran between those of this one.
    cluster.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--timeout=60s")
    values = ("--set", OWN)
    options = ("--create-namespace", "--take-ownership", "--wait", "--timeout=60s")
    installed = cluster.run("helm", "install", "tandem", CHART, *IN, *values, *options)
    try:
        assert installed.returncode == 0, installed.stderr
        cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(RESOURCES))
        cluster.kubectl("wait", *IN, "--for=create", "deployment/m-unified", "--timeout=30s")
        yield cluster
    finally:
        cluster.run("kubectl", "delete", "models,routers,hpa", "--all", *IN)
        cluster.run("helm", "uninstall", "tandem", *IN)
        cluster.run("kubectl", "delete", "namespace", NAMESPACE, "--wait=false")


@contextmanager
def metric(cluster: Any, value: int) -> Iterator[Path]:
    """An external-metrics API in the cluster; write to the path to change the value."""
    file: Path = cluster.run_dir / "queue"
    file.write_text(str(value))
    pki = cluster.run_dir / "pki"
    script, listen = str(HERE / "external_metrics.py"), (METRICS_ADDRESS, str(METRICS_PORT))
    certificate = (str(pki / "node-0-serving.crt"), str(pki / "node-0-serving.key"))
    server = subprocess.Popen(
        [*cluster.enter, sys.executable, script, *listen, *certificate, str(file)]
    )
    try:
        cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(METRICS_API))
        available = ("--for=condition=Available", "apiservice/v1beta1.external.metrics.k8s.io")
        cluster.kubectl("wait", *available, "--timeout=30s")
        yield file
    finally:
        cluster.run("kubectl", "delete", "-f", "-", stdin=yaml.safe_dump_all(METRICS_API))
        server.terminate()
        server.wait(timeout=10)


def reaches(cluster: Any, replicas: int) -> None:
    """Wait until the pool asks for this many and its Deployment follows."""
    for what in (POOL, "deployment/m-unified"):
        wanted = f"--for=jsonpath={{.spec.replicas}}={replicas}"
        cluster.kubectl("wait", *IN, wanted, what, "--timeout=30s")
    held = f"--for=jsonpath={{.status.replicas}}={replicas}"
    cluster.kubectl("wait", *IN, held, POOL, "--timeout=30s")


def owner(cluster: Any) -> tuple[str, str]:
    """Which field manager owns the pool's replicas, and through which subresource."""
    pool = json.loads(cluster.kubectl("get", *IN, POOL, "-o", "json", "--show-managed-fields"))
    owners = [
        (entry["manager"], entry.get("subresource", ""))
        for entry in pool["metadata"]["managedFields"]
        if "f:replicas" in entry["fieldsV1"].get("f:spec", {})
    ]
    assert len(owners) == 1
    return owners[0]


def pool_writes(cluster: Any) -> int:
    """How often the operator has written the pool itself, its status aside."""
    done = cluster.requests(NAMESPACE, "tandem-operator")
    return sum(r.writes and r.resource == "workerpools" for r in done)


def look_again(cluster: Any, surge: int) -> None:
    """A change of the Model that concerns neither count nor pods makes the operator plan anew."""
    change = json.dumps({"spec": {"rollout": {"maxSurge": surge}}})
    cluster.kubectl("patch", *IN, "model/m", "--type=merge", "-p", change)
    generation = cluster.get("model/m", *IN)["metadata"]["generation"]
    seen = f"--for=jsonpath={{.status.observedGeneration}}={generation}"
    cluster.kubectl("wait", *IN, seen, "model/m", "--timeout=30s")


def test_kubectl_scale_holds_while_the_model_changes_otherwise(scaled: Any) -> None:
    before = pool_writes(scaled)

    scaled.kubectl("scale", *IN, POOL, "--replicas=3")
    reaches(scaled, 3)
    look_again(scaled, 2)
    look_again(scaled, 3)

    reaches(scaled, 3)
    assert owner(scaled) == ("kubectl", "scale")
    assert pool_writes(scaled) == before


def test_more_than_the_model_allows_is_asked_for_and_not_given(scaled: Any) -> None:
    scaled.kubectl("scale", *IN, POOL, "--replicas=50")
    eight = "--for=jsonpath={.spec.replicas}=8"
    scaled.kubectl("wait", *IN, eight, "deployment/m-unified", "--timeout=30s")
    said = "--for=jsonpath={.status.conditions[0].message}=0 of 8 workers are ready; 50 were asked "
    said += "for, maxReplicas of unified in Model m is 8"
    scaled.kubectl("wait", *IN, said, POOL, "--timeout=30s")
    scaled.kubectl("scale", *IN, POOL, "--replicas=2")
    reaches(scaled, 2)


def test_kedas_hpa_scales_a_pool_up_and_down_and_the_operator_only_follows(scaled: Any) -> None:
    """The recipe of docs/autoscaling.md, as an HPA reads /scale and an external metric."""
    before = pool_writes(scaled)
    recipe = yaml.safe_load(RECIPE.read_text())
    assert recipe["spec"]["scaleTargetRef"]["kind"] == "WorkerPool"
    hpa = yaml.safe_dump(kedas_hpa(recipe, "m-unified"))

    with metric(scaled, 42) as file:
        scaled.kubectl("apply", *IN, "-f", "-", stdin=hpa)
        reaches(scaled, 5)
        assert owner(scaled) == ("kube-controller-manager", "scale")
        look_again(scaled, 4)
        reaches(scaled, 5)

        file.write_text("11")
        reaches(scaled, 2)
        look_again(scaled, 5)
        reaches(scaled, 2)
        status = scaled.get("hpa/m", *IN)["status"]
        scaled.kubectl("delete", *IN, "-f", "-", stdin=hpa)

    active = {c["type"]: c["status"] for c in status["conditions"]}
    assert active["ScalingActive"] == "True"
    assert owner(scaled) == ("kube-controller-manager", "scale")
    assert pool_writes(scaled) == before


def test_the_models_own_count_takes_over_when_it_changes(scaled: Any) -> None:
    """Once; afterwards the pool is anybody's again."""
    scaled.kubectl("scale", *IN, POOL, "--replicas=2")
    reaches(scaled, 2)
    before = pool_writes(scaled)

    count = json.dumps({"spec": {"unified": {"replicas": 4}}})
    scaled.kubectl("patch", *IN, "model/m", "--type=merge", "-p", count)
    reaches(scaled, 4)
    said = scaled.get(POOL, *IN)["status"]["lastScale"]
    scaled.kubectl("scale", *IN, POOL, "--replicas=1")
    look_again(scaled, 6)
    reaches(scaled, 1)

    assert (said["before"], said["after"]) == (2, 4)
    assert 1 <= pool_writes(scaled) - before <= 2
