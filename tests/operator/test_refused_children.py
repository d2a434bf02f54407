"""Children that an apiserver refuses: said once, in its words, and tried again when it may help."""

from __future__ import annotations

import pytest

from stored_cluster import BOTH, SPLIT, Cluster
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.reconcile.refused_children import REFUSED_RETRY_S
from tandem_operator.reconcile.requeue import Key
from tandem_operator.resources.base import Object

# What an apiserver of 1.36 says, word for word.
TYPED = (
    500,
    "PATCH /apis/apps/v1/namespaces/default/deployments/m-decode: failed to create typed patch "
    "object (default/m-decode; apps/v1, Kind=Deployment): .spec.template.spec.containrs: field not "
    "declared in schema",
    "the cluster refuses Deployment m-decode: .spec.template.spec.containrs: field not declared in "
    "schema; correct podPatch",
)
QUANTITY = (
    500,
    "PATCH /apis/apps/v1/namespaces/default/deployments/m-decode: failed to convert new object "
    "(default/m-decode; apps/v1, Kind=Deployment) to proper version: unable to convert "
    "unstructured object to apps/v1, Kind=Deployment: quantities must match",
    "the cluster refuses Deployment m-decode: quantities must match; correct podPatch",
)
INVALID = (
    422,
    'PATCH /apis/apps/v1/x: Deployment.apps "m-decode" is invalid: spec.template.spec.restartPolicy'
    ': Unsupported value: "Sometimes"',
    'spec.template.spec.restartPolicy: Unsupported value: "Sometimes"; correct podPatch',
)
FORBIDDEN = (
    403,
    "PATCH /apis/apps/v1/x: deployments.apps is forbidden: exceeded quota: q",
    "exceeded quota: q; change the policy or quota",
)


def refuse(cluster: Cluster, kind: str, name: str, error: ApiError) -> None:
    """From now on nobody may write this child."""
    apply = cluster.store.apply

    async def refusing(obj: Object) -> Object:
        if (obj["kind"], obj["metadata"]["name"]) == (kind, name):
            raise error
        return await apply(obj)

    cluster.store.apply = refusing  # type: ignore[method-assign]


@pytest.mark.parametrize(("status", "said", "shown"), [TYPED, QUANTITY, INVALID, FORBIDDEN])
async def test_the_servers_sentence_is_condition_and_event(
    status: int, said: str, shown: str
) -> None:
    cluster = Cluster(SPLIT)
    refuse(cluster, "Deployment", "m-decode", ApiError(status, said))

    result = await cluster.reconcile()
    await cluster.settle()

    accepted = cluster.condition("Model", "m", "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "ChildRefused")
    assert shown in accepted["message"]
    assert cluster.condition("Model", "m", "Ready")["status"] == "False"
    events = [e for e in cluster.store.find("Event") if e["reason"] == "ChildRefused"]
    assert [shown in e["message"] for e in events] == [True]
    assert cluster.names("Deployment") == ["m-prefill"]  # the others are there
    assert result.again_s is not None
    assert result.again_s <= REFUSED_RETRY_S


async def test_what_serves_goes_on_and_a_corrected_model_is_taken() -> None:
    cluster = Cluster(SPLIT)
    await cluster.settle()
    cluster.start_pods()
    await cluster.settle()
    apply = cluster.store.apply
    refuse(cluster, "Deployment", "m-decode", ApiError(422, "no"))

    cluster.apply(SPLIT + "  engine: {maxNumSeqs: 8}\n")
    await cluster.settle()

    status = cluster.get("Model", "m")["status"]
    assert status["observedGeneration"] == 2
    assert all(c["observedGeneration"] == 2 for c in status["conditions"])
    assert status["ready"] == "3/3"
    assert cluster.condition("Model", "m", "Ready")["reason"] == "ChildRefused"

    cluster.store.apply = apply  # type: ignore[method-assign]
    await cluster.settle()

    assert cluster.condition("Model", "m", "Accepted")["status"] == "True"


@pytest.mark.parametrize("status", [0, 409, 429, 500, 503])
async def test_what_may_pass_is_not_called_a_refusal(status: int) -> None:
    cluster = Cluster(SPLIT)
    refuse(cluster, "Service", "m-decode", ApiError(status, "busy"))

    with pytest.raises(ApiError):
        await cluster.reconcile()


TAKEN = [
    (
        SPLIT.replace(
            "decode: {", 'decode: {podPatch: {metadata: {labels: {tandem.dev/role: "x"}}}, '
        ),
        "Model",
        "m",
    ),
    (BOTH + "  podPatch: {metadata: {labels: {tandem.dev/router: x}}}\n", "Router", "r"),
]


@pytest.mark.parametrize(("text", "kind", "name"), TAKEN)
async def test_a_label_that_pods_are_found_by_cannot_be_taken(
    text: str, kind: str, name: str
) -> None:
    cluster = Cluster(text)

    await cluster.settle()

    accepted = cluster.condition(kind, name, "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "LabelTaken")
    assert "podPatch changes the label tandem.dev/" in accepted["message"]


async def test_services_of_names_that_begin_with_a_digit_begin_with_a_letter() -> None:
    cluster = Cluster(SPLIT.replace("name: m", "name: 7b"))

    await cluster.reconciler.reconcile(Key("Model", "default", "7b"))

    assert cluster.names("Service") == ["tandem-7b-decode", "tandem-7b-prefill"]
    assert cluster.names("WorkerPool") == ["7b-decode", "7b-prefill"]
