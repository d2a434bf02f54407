"""A changed setting reaches the router pods that run, and the ones that start; a changed image
makes new pods. Where a Router keeps what outlives its pods."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tandem_operator.local.store import Store
from tandem_operator.manifests import ManifestError, load_text
from tandem_operator.plan import Settings
from tandem_operator.plan.router import plan_router
from tandem_operator.plan.router_facts import StoreFacts, TrafficFacts
from tandem_operator.reconcile import router_pods
from tandem_operator.reconcile.router_pods import RouterPods
from tandem_operator.resources import Router
from tandem_operator.resources.base import Object

TIER = {
    "name": "big",
    "external": {"url": "https://p.example/v1", "model": "m", "usdPer1MOutputTokens": "15"},
}
KUBERNETES = Settings()
LOCAL = replace(Settings(), endpoints="file")


def planned(settings: Settings = KUBERNETES, generation: int = 1, **spec: Any) -> Any:
    router = Router.model_validate(
        {
            "metadata": {"name": "r", "namespace": "n", "generation": generation},
            "spec": {"tiers": [TIER], **spec},
        }
    )
    return plan_router(router, {}, [], settings, "token")


def of_kind(plan: Any, kind: str) -> Object:
    return next(obj for obj in plan.apply if obj["kind"] == kind)


def config(plan: Any) -> Object:
    found: Object = json.loads(of_kind(plan, "ConfigMap")["data"]["config.json"])
    return found


TENANT = {"name": "team", "usdPerHour": "2"}


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": "0.3"},
        {"budget": {"usdPerHour": "9"}},
        {"slo": {"ttft": {"target": "300ms"}}},
        {"tenants": [TENANT]},
        {"routing": "Advise"},
        {"tiers": [{**TIER, "maxShare": "0.5"}]},
        {"tiers": [{**TIER, "external": {**TIER["external"], "usdPer1MOutputTokens": "9"}}]},
        {"tiers": [{**TIER, "external": {**TIER["external"], "model": "other"}}]},
        {"cache": {"enabled": True}},
        {"access": {"allowedHosts": ["ai.example.com"]}},
        {"predictor": {"type": "Fixed"}},
    ],
)
def test_settings_change_the_configuration_and_no_pod(change: Object) -> None:
    before, after = planned(), planned(generation=2, **change)

    assert of_kind(after, "Deployment") == of_kind(before, "Deployment")
    assert of_kind(after, "ConfigMap")["metadata"] == of_kind(before, "ConfigMap")["metadata"]
    assert config(after) != config(before)
    assert after.revision == before.revision
    assert after.live != before.live


@pytest.mark.parametrize(
    "change",
    [
        {"image": "other:1"},
        {"resources": {"cpu": "2"}},
        {"store": {"sqlite": {}}},
    ],
)
def test_what_pods_are_made_of_makes_new_ones(change: Object) -> None:
    before, after = planned(), planned(**change)

    assert after.revision != before.revision
    assert of_kind(after, "Deployment") != of_kind(before, "Deployment")


# The store.


def test_a_file_has_a_claim_and_one_writer() -> None:
    plan = planned(store={"sqlite": {"size": "5Gi", "storageClassName": "fast"}})

    claim = of_kind(plan, "PersistentVolumeClaim")["spec"]
    deployment = of_kind(plan, "Deployment")["spec"]
    args = deployment["template"]["spec"]["containers"][0]["args"]
    assert claim["resources"] == {"requests": {"storage": "5Gi"}}
    assert claim["storageClassName"] == "fast"
    assert deployment["strategy"] == {"type": "Recreate"}
    assert args[args.index("--store-file") + 1] == "/var/lib/tandem/store/router.db"
    assert config(plan)["store"] == {"type": "sqlite"}


def test_a_database_is_named_by_a_secret_and_shared() -> None:
    secret = {"secretRef": {"name": "pg", "key": "url"}}
    plan = planned(store={"postgres": secret}, replicas=3)

    deployment = of_kind(plan, "Deployment")["spec"]
    assert deployment["strategy"]["type"] == "RollingUpdate"
    assert "/etc/tandem/store/url" in deployment["template"]["spec"]["containers"][0]["args"]
    assert config(plan)["store"] == {"type": "postgres"}


def test_without_a_store_there_is_memory_and_on_one_machine_a_file_of_the_run() -> None:
    assert "store" not in config(planned())
    assert config(planned(LOCAL))["store"] == {"type": "sqlite"}
    assert "store" not in config(planned(LOCAL, replicas=2))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("  replicas: 2\n  store: {sqlite: {}}\n", "keep replicas at 1, or use store.postgres"),
        ("  store: {}\n", "either sqlite or postgres"),
        (
            "  store: {sqlite: {}, postgres: {secretRef: {name: a, key: b}}}\n",
            "either sqlite or postgres",
        ),
    ],
)
def test_a_store_that_cannot_work_is_refused(spec: str, sentence: str) -> None:
    text = f"""\
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {{name: r}}
spec:
  tiers:
  - {{name: big, external: {{url: "https://p.example/v1", model: m}}}}
{spec}"""
    with pytest.raises(ManifestError, match=sentence):
        load_text(text)


@pytest.mark.parametrize(
    ("store", "status", "reason"),
    [
        (StoreFacts("memory", durable=False, ok=True), "False", "NotDurable"),
        (StoreFacts("postgres", durable=True, ok=True), "True", "Kept"),
        (StoreFacts("sqlite", durable=True, ok=False, error="full"), "False", "StoreUnavailable"),
        (None, "Unknown", "NotKnown"),
    ],
)
def test_status_says_whether_anything_outlives_the_pods(
    store: StoreFacts | None, status: str, reason: str
) -> None:
    from tandem_operator.plan.conditions import Conditions
    from tandem_operator.plan.router_status import _durable

    conditions = Conditions([], 1, "now")
    _durable(conditions, TrafficFacts(store=store))

    found = conditions.items[-1]
    assert (found["type"], found["status"], found["reason"]) == ("Durable", status, reason)
    if store is not None and store.error:
        assert store.error in found["message"]


# Pushing.


def pod(name: str, revision: str = "r1", ready: bool = True) -> Object:
    condition = {"type": "Ready", "status": "True" if ready else "False"}
    return {
        "metadata": {
            "name": name,
            "namespace": "n",
            "uid": name,
            "labels": {"tandem.dev/revision": revision},
        },
        "status": {"podIP": name, "conditions": [condition]},
    }


async def test_settings_are_pushed_once_to_each_ready_pod_of_the_revision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    answers: dict[str, Any] = {"b": OSError("gone")}

    async def ask(host: str, port: int, path: str, body: Object, *_: Any) -> tuple[int, Any]:
        asked.append(host)
        answer = answers.get(host)
        if isinstance(answer, Exception):
            raise answer
        return 200, {"changed": ["threshold: 0.1 -> 0.2"]}

    monkeypatch.setattr(router_pods, "ask_json", ask)
    routers = RouterPods(Store(), Settings())
    pods = [pod("a"), pod("b"), pod("old", "r0"), pod("starting", ready=False)]

    first = await routers.push(pods, "r1", {"threshold": 0.2})
    answers.clear()
    second = await routers.push(pods, "r1", {"threshold": 0.2})
    third = await routers.push(pods, "r1", {"threshold": 0.2})
    other = await routers.push(pods, "r1", {"threshold": 0.4})

    assert first == (["threshold: 0.1 -> 0.2"], False)
    assert second == (["threshold: 0.1 -> 0.2"], True)
    assert third == ([], True)
    assert other[1]
    assert asked == ["a", "b", "b", "a", "b"]
