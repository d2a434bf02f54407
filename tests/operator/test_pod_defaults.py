"""What an installation gives all pods, and how it lies under what a resource asks for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from stored_cluster import BOTH, Cluster
from tandem_operator.kube.operator import build_parser
from tandem_operator.plan import Settings
from tandem_operator.resources.pod_defaults import PodDefaults

Object = dict[str, Any]

DEFAULTS = PodDefaults.model_validate(
    {
        "worker": {
            "metadata": {"annotations": {"sidecar.istio.io/inject": "false"}},
            "spec": {
                "nodeSelector": {"pool": "gpu"},
                "containers": [{"name": "worker", "env": [{"name": "A", "value": "all"}]}],
            },
        },
        "router": {"spec": {"nodeSelector": {"pool": "cpu"}}},
        "pullSecrets": ["registry"],
        "workerAnnotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/weights"},
    }
)


async def settled(patch: str = "") -> Cluster:
    text = BOTH.replace("  unified: {", f"  unified: {{{patch}")
    cluster = Cluster(text, Settings(pods=DEFAULTS))
    await cluster.settle()
    return cluster


def template(cluster: Cluster, name: str) -> Object:
    found: Object = cluster.get("Deployment", name)["spec"]["template"]
    return found


async def test_pods_of_each_kind_get_the_installations_patch_and_pull_secrets() -> None:
    cluster = await settled()
    worker, router = template(cluster, "s-unified"), template(cluster, "r-router")

    assert worker["spec"]["nodeSelector"] == {"pool": "gpu"}
    assert worker["metadata"]["annotations"] == {"sidecar.istio.io/inject": "false"}
    assert {"name": "A", "value": "all"} in worker["spec"]["containers"][0]["env"]
    assert router["spec"]["nodeSelector"] == {"pool": "cpu"}
    pulled = [t["spec"]["imagePullSecrets"] for t in (worker, router)]
    assert pulled == 2 * [[{"name": "registry"}]]


async def test_a_default_for_a_container_that_a_pod_has_not_leaves_that_pod_alone() -> None:
    # Only pods that download have `fetch-weights`; one with an image is to be added everywhere.
    inits = [
        {"name": "fetch-weights", "resources": {"requests": {"memory": "2Gi"}}},
        {"name": "tuned", "image": "registry.example/tune"},
    ]
    pods = PodDefaults.model_validate({"worker": {"spec": {"initContainers": inits}}})
    cluster = Cluster(BOTH, Settings(pods=pods))
    await cluster.settle()

    assert template(cluster, "s-unified")["spec"]["initContainers"] == inits[1:]


async def test_a_roles_own_patch_and_fields_win_where_both_say_something() -> None:
    cluster = await settled(
        "podPatch: {spec: {nodeSelector: {pool: h100}, imagePullSecrets: [{name: mine}], "
        "containers: [{name: worker, env: [{name: A, value: own}]}]}}, "
    )
    spec = template(cluster, "s-unified")["spec"]

    assert spec["nodeSelector"] == {"pool": "h100"}
    assert spec["imagePullSecrets"] == [{"name": "registry"}, {"name": "mine"}]
    assert {"name": "A", "value": "own"} in spec["containers"][0]["env"]
    assert template(cluster, "l-decode")["spec"]["nodeSelector"] == {"pool": "gpu"}


async def test_service_accounts_carry_the_cloud_identity_of_their_kind() -> None:
    cluster = await settled()

    marks = cluster.get("ServiceAccount", "s-worker")["metadata"]["annotations"]
    assert marks["eks.amazonaws.com/role-arn"] == "arn:aws:iam::1:role/weights"
    routers = cluster.get("ServiceAccount", "r-router")["metadata"].get("annotations", {})
    assert "eks.amazonaws.com/role-arn" not in routers


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"worker": {"spec": {"nodeSelectr": {}}}}, "spec.nodeSelectr"),
        ({"worker": {"spec": {"tolerations": {}}}}, "spec.tolerations must be a list"),
        (
            {"router": {"metadata": {"labels": {"tandem.dev/model": "x"}}}},
            "metadata.labels.tandem.dev/model is by what pods are found",
        ),
        ({"workers": {}}, "workers"),
    ],
)
def test_defaults_that_no_pod_can_have_are_refused_at_the_start(
    given: Object, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValidationError, match=said):
        PodDefaults.model_validate(given)
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--pod-defaults", json.dumps(given)])
    assert said in capsys.readouterr().err
