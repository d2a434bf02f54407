"""A Job trains a Router's predictor from labels where its pods share a store and ask for one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from stored_cluster import Cluster
from tandem_operator.plan import Settings
from tandem_operator.plan.router import plan_router
from tandem_operator.plan.router_facts import RetrainingFacts, TrafficFacts
from tandem_operator.reconcile.quality_report import retraining_facts
from tandem_operator.resources import Router
from tandem_operator.resources.base import Object
from tandem_operator.resources.network_rules import NetworkRules

ROUTER = """\
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {name: r, namespace: default}
spec:
  replicas: 2
  tiers:
  - {name: a, external: {url: "https://a.example/v1", model: ma}}
  - {name: b, external: {url: "https://b.example/v1", model: mb}}
  store: {postgres: {secretRef: {name: db, key: url}}}
  predictor: {training: {data: "configmap://graded/rows.jsonl", fromLabels: true}}
  learning:
    {shadowShare: "0.1", capture: Prompts, judge: {url: "https://j.example/v1", model: j}}
"""


def facts(run: str, **more: str) -> TrafficFacts:
    return TrafficFacts(retraining=RetrainingFacts(run=run, **more))


class Told(Cluster):
    """A cluster whose router pods report what a test says."""

    def __init__(self, text: str = ROUTER, settings: Settings | None = None) -> None:
        super().__init__(text, settings or Settings(network=NetworkRules()))
        self.told: TrafficFacts | None = None
        self.reconciler.traffic = self._traffic

    async def _traffic(self, _: list[Object]) -> TrafficFacts | None:
        return self.told

    async def jobs(self, told: TrafficFacts | None) -> list[Object]:
        self.told = told
        await self.reconcile("Router", "r")
        return self.store.find("Job")


async def test_a_job_is_there_for_as_long_as_the_pods_ask_for_it() -> None:
    cluster = Told()
    await cluster.settle()

    none = await cluster.jobs(facts(""))
    (job,) = await cluster.jobs(facts("68a1"))
    again = await cluster.jobs(facts("68a1"))
    unknown = await cluster.jobs(None)
    (other,) = await cluster.jobs(facts("68b2"))
    last = await cluster.jobs(facts(""))

    assert none == last == []
    assert [one["metadata"]["uid"] for one in again] == [job["metadata"]["uid"]]
    assert unknown == again  # no pod said that it is not wanted any more
    assert other["metadata"]["name"] != job["metadata"]["name"]
    assert job["metadata"]["ownerReferences"][0]["name"] == "r"


async def test_the_job_trains_in_the_routers_image_without_rights_or_listeners() -> None:
    cluster = Told()
    await cluster.settle()

    (job,) = await cluster.jobs(facts("68a1"))

    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["command"] == ["python", "-m", "tandem_router.quality.retraining.job"]
    assert container["args"] == [
        *("--store-url-file", "/etc/tandem/store/url"),
        *("--run", "68a1"),
        *("--training-data", "/var/lib/tandem/training/rows.jsonl"),
    ]
    assert spec["automountServiceAccountToken"] is False
    assert spec["restartPolicy"] == "Never"
    labels = job["spec"]["template"]["metadata"]["labels"]
    # With a router's label it would be among the pods of the Service.
    assert "tandem.dev/router" not in labels
    policies = {o["metadata"]["name"]: o["spec"] for o in cluster.store.find("NetworkPolicy")}
    closed = policies["r-router-training"]
    assert closed["podSelector"]["matchLabels"].items() <= labels.items()
    assert closed["ingress"] == []


def planned(settings: Settings, **spec: Any) -> Any:
    training = {"data": "configmap://graded/rows.jsonl", "fromLabels": True}
    judge = {"url": "https://j.example/v1", "model": "j"}
    whole = {
        "tiers": [
            {"name": name, "external": {"url": f"https://{name}.example/v1", "model": name}}
            for name in "ab"
        ],
        "predictor": {"training": training},
        "learning": {"shadowShare": "0.1", "capture": "Prompts", "judge": judge},
        **spec,
    }
    router = Router.model_validate(
        {"metadata": {"name": "r", "namespace": "n", "generation": 1}, "spec": whole}
    )
    return plan_router(router, {}, [], settings, "token", training_run="68a1")


POSTGRES = {"postgres": {"secretRef": {"name": "db", "key": "url"}}}


@pytest.mark.parametrize(
    ("settings", "store", "by"),
    [
        (Settings(), POSTGRES, "Job"),
        (Settings(), {"sqlite": {}}, "Process"),
        (Settings(), None, "Process"),
        (replace(Settings(), endpoints="file"), POSTGRES, "Process"),
    ],
    ids=["postgres", "a file of one pod", "no store", "one machine"],
)
def test_who_trains_follows_from_where_labels_are(
    settings: Settings, store: Object | None, by: str
) -> None:
    plan = planned(settings, **({"store": store} if store else {}))

    text = next(o for o in plan.apply if o["kind"] == "ConfigMap")["data"]["config.json"]
    assert json.loads(text)["predictor"]["retraining"].get("by", "Process") == by
    assert any(o["kind"] == "Job" for o in plan.apply) == (by == "Job")


def test_a_pod_patch_says_where_the_training_runs_and_nothing_else_of_it() -> None:
    patch = {
        "metadata": {"annotations": {"a": "b"}},
        "spec": {
            "nodeSelector": {"disk": "fast"},
            "containers": [{"name": "sidecar", "image": "x"}],
            "hostNetwork": True,
        },
    }

    plan = planned(Settings(), store=POSTGRES, podPatch=patch)

    (job,) = [o for o in plan.apply if o["kind"] == "Job"]
    spec = job["spec"]["template"]["spec"]
    assert spec["nodeSelector"] == {"disk": "fast"}
    assert [c["name"] for c in spec["containers"]] == ["train"]
    assert "hostNetwork" not in spec


async def test_a_job_that_failed_is_told_with_where_to_look() -> None:
    cluster = Told()
    await cluster.settle()
    (job,) = await cluster.jobs(facts("68a1"))
    failed = {"type": "Failed", "status": "True", "reason": "DeadlineExceeded"}
    cluster.store.change(
        "Job", "default", job["metadata"]["name"], {"status": {"conditions": [failed]}}
    )

    await cluster.jobs(facts("68a1"))

    said = cluster.get("Router", "r")["status"]["predictor"]["comparison"]
    name = job["metadata"]["name"]
    assert said == f"training failed: DeadlineExceeded; see `kubectl logs job/{name}`"


def test_the_pod_that_decides_is_the_one_that_is_believed() -> None:
    follows = {"retraining": {"candidate": None, "run": "", "leads": False, "steps": []}}
    leads = {"retraining": {"candidate": "v2", "run": "68a1", "leads": True, "steps": []}}

    found = retraining_facts([follows, {}, leads])

    assert found is not None
    assert (found.candidate, found.run) == ("v2", "68a1")
