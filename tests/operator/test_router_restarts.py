"""What each field of a Router changes: the settings of pods that run, or the pods."""

from __future__ import annotations

import json
from typing import Any

import pytest

import doors_resources as resources
from doors_kit import doors
from tandem_operator.plan import Settings, plan_router
from tandem_operator.plan.made_of import MADE_OF_ANNOTATION, why_new_pods
from tandem_operator.resources import SPECS, Router
from tandem_operator.resources.base import Object

# Every other field is live; predictor.artifact and predictor.embedding unless they name another
# claim or folder of nodes than they named before. docs/operator.md says the same.
NEW_PODS = {
    "image": "a pod is its image",
    "resources": "what a node sets aside is fixed when a pod is bound",
    "podPatch": "it may change anything of a pod",
    "keySecretRef": "a mount",
    "metricsTokenSecretRef": "a mount",
    "learning.judge.apiKeySecretRef.name": "a mount",
    "tiers.external.apiKeySecretRef.name": "a mount",
    "gateway.tlsSecretName": "a mount",
    "store.postgres": "a mount, and the connections of a process",
    "predictor.training.data": "trained before the router starts, from a mount",
    "predictor.training.fromLabels": "the router mounts what it trains again from",
}


def template(plan: Any) -> bytes:
    deployment = next(o for o in plan.apply if o["kind"] == "Deployment")
    return json.dumps(deployment["spec"]["template"], sort_keys=True).encode()


def templates(door: object) -> set[bytes]:
    """The pod templates under each value of a field."""
    found = set()
    for spec in resources.variants("Router", door, resources.ROWS["Router"]) or []:  # type: ignore[arg-type]
        router = resources.typed("Router", "r", spec)
        if isinstance(router, Router):
            plan = plan_router(router, resources.MODELS, [router], Settings(), "token")
            if plan.apply:
                found.add(template(plan))
    return found


@pytest.mark.parametrize("door", list(doors(SPECS["Router"])), ids=lambda door: door.path)
def test_an_edit_of_a_live_field_leaves_the_pods_as_they_are(door: Any) -> None:
    named = any(door.path == field or door.path.startswith(f"{field}.") for field in NEW_PODS)

    assert (len(templates(door)) > 1) == named


TIER = {"name": "big", "external": {"url": "https://p.example/v1", "model": "m"}}
PLAIN = {"name": "plain", "external": {"url": "https://x.example/v1", "model": "x"}}
KEYED = {"url": "https://q.example/v1", "apiKeySecretRef": {"name": "keys", "key": "q"}}
BOTH = [TIER, {"name": "other", "external": {**KEYED, "model": "a"}}]
THIRD = {"name": "third", "external": {**KEYED, "model": "b"}}


def planned(spec: Object) -> Any:
    router = Router.model_validate({"metadata": {"name": "r", "namespace": "n"}, "spec": spec})
    return plan_router(router, {}, [router], Settings(), "token")


def learned(artifact: str) -> Object:
    return {"tiers": [TIER], "predictor": {"artifact": artifact}}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            {"tiers": [TIER]},
            {
                "tiers": [
                    TIER,
                    {
                        **TIER,
                        "name": "x",
                        "external": {"url": "https://x.example/v1", "model": "x"},
                    },
                ]
            },
        ),
        (
            {"tiers": BOTH},
            {"tiers": [*BOTH, {"name": "third", "external": {**KEYED, "model": "b"}}]},
        ),
        ({"tiers": BOTH}, {"tiers": BOTH[::-1]}),
        (learned("image:///a"), learned("image:///b")),
        (learned("image:///a"), {"tiers": [TIER], "predictor": {"type": "Length"}}),
        ({"tiers": [TIER]}, {"tiers": [TIER], "predictor": {"type": "Fixed"}}),
        (learned("pvc://claim/a"), learned("pvc://claim/b")),
        (learned("configmap://c/a"), learned("configmap://c/b")),
        (learned("configmap://c/a"), learned("configmap://d/b")),
        (learned("image:///a"), learned("configmap://c")),
        ({"tiers": [TIER], "predictor": {"type": "Length"}}, learned("configmap://c")),
    ],
)
def test_what_mounts_nothing_new_is_taken_up_by_running_pods(before: Object, after: Object) -> None:
    old, new = planned(before), planned(after)

    assert template(old) == template(new)
    assert old.live != new.live


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ({"tiers": [TIER]}, {"tiers": [TIER], "image": "x:2"}, "image: tandem/router:0.1.0 -> x:2"),
        ({"tiers": [TIER]}, {"tiers": BOTH}, "mounts: Secret keys"),
        ({"tiers": BOTH}, {"tiers": [TIER]}, "mounts: no longer Secret keys"),
        (
            learned("pvc://one"),
            learned("pvc://two"),
            "mounts: claim two, no longer claim one",
        ),
        (
            {"tiers": [TIER]},
            {"tiers": [TIER], "podPatch": {"spec": {"priorityClassName": "p"}}},
            "other settings of pods",
        ),
    ],
)
def test_an_event_can_say_why_there_are_new_pods(before: Object, after: Object, why: str) -> None:
    old, new = (
        next(o for o in planned(spec).apply if o["kind"] == "Deployment")["metadata"]["annotations"]
        for spec in (before, after)
    )

    assert why_new_pods(old[MADE_OF_ANNOTATION], new[MADE_OF_ANNOTATION]) == why
    assert "another way" in why_new_pods(None, new[MADE_OF_ANNOTATION])
