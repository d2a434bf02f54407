"""From the chart of the first release to this one: nothing that people made or set is lost."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import yaml

from eventually import eventually_in_another_process

ROOT = Path(__file__).resolve().parents[2]
# `git archive 61162d4 charts/tandem`, so that a clone without the history can be tested, too.
FIRST_RELEASE = Path(__file__).with_name("first-release-chart.tar.gz")
NAMESPACE = "upgrade"
IN = ("--namespace", NAMESPACE)
# As a user of that release wrote them.
VALUES = {
    "operator": {
        "replicas": 1,
        "logLevel": "debug",
        "watchNamespace": NAMESPACE,
        "leaseSeconds": 20,
        "resources": {"requests": {"cpu": "50m"}},
        "podAnnotations": {"team": "ai"},
    },
    "images": {"pullPolicy": "Never"},
    "metrics": {"intervalSeconds": 30},
}
MODEL = {
    "apiVersion": "tandem.dev/v1alpha1",
    "kind": "Model",
    "metadata": {"name": "m", "namespace": NAMESPACE},
    "spec": {
        "weights": {"source": "hf://org/name", "cache": {"size": "1Mi"}},
        "unified": {"nodeSelector": {"no-node": "has-this"}, "replicas": 2},
        # Without effect, and refused by now.
        "kvTransfer": {"maxInflight": "1Gi"},
    },
}


def first_chart(folder: Path) -> Path:
    """The chart as it was."""
    with tarfile.open(FIRST_RELEASE) as files:
        files.extractall(folder, filter="data")
    return folder / "charts" / "tandem"


def test_an_upgrade_from_the_first_release_keeps_everything(cluster: Any, tmp_path: Path) -> None:
    def helm(*arguments: str) -> str:
        result = cluster.run("helm", *arguments, *IN, timeout_s=120.0)
        assert result.returncode == 0, f"{arguments}: {result.stderr}"
        return str(result.stdout)

    def uid(*arguments: str) -> str:
        return str(cluster.get(*arguments, *IN)["metadata"]["uid"])

    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(VALUES))
    old = first_chart(tmp_path)
    # Its operator is of its own image, which is not here: what it made is made by hand below.
    start = ("--create-namespace", "--take-ownership", "-f", str(values))
    helm("install", "tandem", str(old), *start, "--set", "operator.replicas=0")
    model = json.loads(cluster.kubectl("create", "-o", "json", "-f", "-", stdin=json.dumps(MODEL)))
    before = uid("model", "m")
    owner = {
        "apiVersion": MODEL["apiVersion"],
        "kind": "Model",
        "name": "m",
        "uid": model["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
    labels = {"app.kubernetes.io/managed-by": "tandem", "tandem.dev/model": "m"}
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "m-weights", "labels": labels, "ownerReferences": [owner]},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": "1Mi"}},
        },
    }
    pool = {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "WorkerPool",
        "metadata": {
            "name": "m-unified",
            "labels": {**labels, "tandem.dev/role": "unified"},
            "annotations": {"tandem.dev/seeded-replicas": "2"},
            "ownerReferences": [owner],
        },
        "spec": {"modelRef": {"name": "m"}, "role": "unified", "replicas": 2},
    }
    apply = ("apply", *IN, "--server-side", "--field-manager=tandem-operator", "-f", "-")
    for child in (claim, pool):
        cluster.kubectl(*apply, stdin=json.dumps(child))
    cluster.kubectl("scale", *IN, "workerpool/m-unified", "--replicas=3")
    kept = {kind: uid(kind, name) for kind, name in (("pvc", "m-weights"), ("wp", "m-unified"))}

    try:
        # As people upgrade: what they had set, and nothing else, since no value of later releases
        # is there then.
        helm("upgrade", "tandem", str(ROOT / "charts" / "tandem"), "--reuse-values", *RUNS, *WAIT)
        cluster.kubectl("wait", *IN, "--for=create", "deployment/m-unified", "--timeout=40s")
        # Weights were the Model's and would have gone with it; now they stay.
        eventually_in_another_process(
            lambda: "ownerReferences" not in cluster.get("pvc", "m-weights", *IN)["metadata"],
            told=lambda: cluster.get("model", "m", *IN)["status"]["message"],
        )

        assert uid("model", "m") == before
        assert {k: uid(k, n) for k, n in (("pvc", "m-weights"), ("wp", "m-unified"))} == kept
        conditions = cluster.get("model", "m", *IN)["status"]["conditions"]
        accepted = next(c for c in conditions if c["type"] == "Accepted")
        assert accepted["status"] == "True", accepted
        deployment = cluster.get("deployment", "m-unified", *IN)
        assert deployment["spec"]["replicas"] == 3
        operator = cluster.get("deployment", "tandem-operator", *IN)["spec"]["template"]
        arguments = operator["spec"]["containers"][0]["args"]
        assert {"--log-level=debug", f"--namespace={NAMESPACE}", "--lease-seconds=20"} <= {
            *arguments
        }
        assert operator["metadata"]["annotations"] == {"team": "ai"}
        found = yaml.safe_load(helm("get", "values", "tandem", "-o", "yaml"))
        assert found == {**VALUES, "allow": {"ownNamespace": True}}

        # Or their own values again: the same objects.
        manifest = helm("get", "manifest", "tandem")
        helm("upgrade", "tandem", str(ROOT / "charts" / "tandem"), "-f", str(values), *WAIT)
        assert helm("get", "manifest", "tandem") == manifest

        cluster.kubectl("delete", *IN, "model/m", "--timeout=30s")
        cluster.kubectl("wait", *IN, "--for=delete", "deployment/m-unified", "--timeout=60s")
        assert uid("pvc", "m-weights") == kept["pvc"]
    finally:
        cluster.run("kubectl", "delete", *IN, "model", "--all", "--timeout=30s")
        cluster.run("helm", "uninstall", "tandem", *IN)
        cluster.run("kubectl", "delete", "namespace", NAMESPACE, "--wait=false")


RUNS = ("--set", "operator.replicas=1")
WAIT = ("--wait", "--timeout=90s", "--set", "allow.ownNamespace=true")
