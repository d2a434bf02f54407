"""What the status says: conditions, columns, the first blocking cause, events."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from objects_table import POLICY
from stored_cluster import BOTH, NOW, SPLIT, Cluster
from tandem_operator.local import store
from tandem_operator.plan.model_status import LinkTest, Measured
from tandem_operator.plan.objects import PEER_SECRET, peer_secret
from tandem_operator.plan.pods import first_blocker
from tandem_operator.plan.router_facts import (
    LatencyFacts,
    TierFacts,
    TrafficFacts,
)
from tandem_operator.reconcile.events import news_in
from tandem_operator.reconcile.rotation import TokenRotation
from tandem_operator.resources import RouterStatus
from tandem_operator.resources.base import Object


async def test_a_router_says_what_its_tiers_cost_and_what_its_predictor_is_worth() -> None:
    cluster = Cluster(BOTH + '  predictor: {artifact: "configmap://p"}\n')
    small = TierFacts(0.75, LatencyFacts(0.0881, 100, 99))
    facts = TrafficFacts("v3", 0.1234, 0.9621, 0.914, {"small": small})

    async def traffic(_: list[Object]) -> TrafficFacts:
        return facts

    cluster.reconciler.traffic = traffic
    await cluster.settle()
    status = cluster.get("Router", "r")["status"]

    assert status["tiers"] == [
        {
            "name": "small",
            "ready": False,
            "tokenPrices": "Nominal",
            "usdPerHour": "0.1",
            "share": "0.75",
            "ttft": "88ms",
        },
        {"name": "large", "ready": False, "tokenPrices": "Nominal", "usdPerHour": "1"},
    ]
    assert status["predictor"] == {
        "version": "v3",
        "threshold": "0.123",
        "qualityRatio": "0.96",
        "baselineQualityRatio": "0.91",
    }
    assert RouterStatus.model_validate(status).predictor is not None


async def test_a_model_becomes_ready_when_each_role_has_a_worker_and_the_link_works() -> None:
    cluster = Cluster()
    await cluster.settle()
    assert cluster.condition("Model", "m", "Ready")["reason"] == "Starting"

    cluster.start_pods()
    await cluster.settle()

    status = cluster.get("Model", "m")["status"]
    assert cluster.condition("Model", "m", "Ready")["status"] == "True"
    assert status["ready"] == "3/3"
    assert status["usdPerHour"] == "1.5"
    assert status["observedGeneration"] == 1
    pool = cluster.get("WorkerPool", "m-decode")["status"]
    assert (pool["replicas"], pool["readyReplicas"]) == (2, 2)
    assert pool["selector"] == "tandem.dev/model=m,tandem.dev/role=decode"


HELD = {"digest": "9f" * 32, "source": "hf://org/name", "commit": "c0ffee" + "0" * 34}


async def test_status_says_which_weights_are_served_and_later_pods_get_the_same() -> None:
    cluster = Cluster(SPLIT.replace("file:///models/m", "hf://org/name"))
    await cluster.settle()
    cluster.start_pods()
    template = cluster.get("Deployment", "m-decode")["spec"]["template"]
    cluster.weights = {"m-decode-0": HELD, "m-prefill-0": HELD}

    await cluster.settle()

    assert cluster.get("Model", "m")["status"]["weights"] == HELD
    pin = json.loads(cluster.get("ConfigMap", "m-weights")["data"]["weights.json"])
    assert pin == {"source": HELD["source"], "commit": HELD["commit"]}
    assert cluster.get("Deployment", "m-decode")["spec"]["template"] == template  # no rollout
    (fetch,) = template["spec"]["initContainers"]
    assert fetch["args"][2:] == ["--pin", "/etc/tandem/pin/weights.json"]
    assert {"name": "pin", "mountPath": "/etc/tandem/pin", "readOnly": True} in fetch[
        "volumeMounts"
    ]

    cluster.weights = {}
    await cluster.settle()
    assert cluster.get("Model", "m")["status"]["weights"] == HELD


async def test_a_new_source_is_not_held_to_the_old_ones_commit() -> None:
    cluster = Cluster(SPLIT.replace("file:///models/m", "hf://org/name"))
    cluster.start_pods()
    await cluster.settle()
    cluster.start_pods()
    cluster.weights = {"m-decode-0": HELD}
    await cluster.settle()
    assert "m-weights" in cluster.names("ConfigMap")

    cluster.apply(SPLIT.replace("file:///models/m", "hf://org/name@v2"))
    await cluster.settle()

    assert "m-weights" not in cluster.names("ConfigMap")


async def test_workers_with_different_weights_are_named() -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.start_pods()
    cluster.weights = {"m-decode-0": {"digest": "9f" * 32}, "m-decode-1": {"digest": "01" * 32}}

    await cluster.settle()

    ready = cluster.condition("Model", "m", "WeightsReady")
    assert (ready["status"], ready["reason"]) == ("False", "WeightsDiffer")
    assert "m-decode-1 010101010101" in ready["message"]


async def test_a_broken_link_blocks_with_its_reason() -> None:
    cluster = Cluster()
    cluster.link = LinkTest(False, "checksums differ")
    await cluster.settle()
    cluster.start_pods()
    await cluster.settle()

    assert cluster.condition("Model", "m", "Ready")["reason"] == "KVLinkFailed"
    assert cluster.condition("Model", "m", "KVLinkReady")["message"] == "checksums differ"


def waiting(reason: str, message: str = "", *, restarts: int = 0, exit_code: int = 0) -> Object:
    state: Object = {"waiting": {"reason": reason, "message": message}}
    last = {"terminated": {"exitCode": exit_code, "message": message}} if exit_code else {}
    entry = {"name": "worker", "state": state, "lastState": last, "restartCount": restarts}
    return {"containerStatuses": [entry]}


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (
            {
                "conditions": [
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.",
                    }
                ]
            },
            "InsufficientGPU",
        ),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "message": "taints"}]},
            "Unschedulable",
        ),
        (waiting("ImagePullBackOff", "no such image"), "ImagePull"),
        (waiting("ErrImagePull"), "ImagePull"),
        (waiting("FailedMount", "/m does not exist"), "VolumeMissing"),
        (waiting("CrashLoopBackOff", "bad config", restarts=3, exit_code=1), "EngineCrash"),
        (waiting("CrashLoopBackOff", "no folder", restarts=3, exit_code=66), "WeightsUnusable"),
        (waiting("ContainerCreating"), "Starting"),
        (
            {
                "initContainerStatuses": [
                    {"name": "fetch-weights", "state": {"running": {}}, "restartCount": 0}
                ]
            },
            "WeightsDownload",
        ),
    ],
)
async def test_the_first_blocking_cause_is_shown(status: Object, reason: str) -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.start_pods(**status)
    await cluster.settle()

    ready = cluster.condition("Model", "m", "Ready")
    assert (ready["status"], ready["reason"]) == ("False", reason)
    assert ready["message"]


def starting(took_s: int, exit_code: int, restarts: int = 1) -> Object:
    """A worker pod with ten minutes to start, whose process ended after so many seconds."""
    at = datetime(2026, 11, 30, tzinfo=UTC)
    times = {"startedAt": at.isoformat(), "finishedAt": (at + timedelta(0, took_s)).isoformat()}
    last = {"terminated": {"exitCode": exit_code, **times}} if restarts else {}
    entry = {
        "name": "worker",
        "state": {"running": {}},
        "lastState": last,
        "restartCount": restarts,
    }
    probe = {"periodSeconds": 2, "failureThreshold": 300}
    return {
        "metadata": {"name": "m-0"},
        "spec": {"containers": [{"name": "worker", "startupProbe": probe}]},
        "status": {"containerStatuses": [entry]},
    }


def test_a_worker_that_compiles_for_minutes_says_how_long_it_may() -> None:
    found = first_blocker([starting(0, 0, restarts=0)])

    assert found is not None
    assert (found.reason, found.message) == (
        "Starting",
        "pod m-0 is starting; it has 600 s for it (rollout.startupTimeout)",
    )


@pytest.mark.parametrize("exit_code", [0, 137, 143])
def test_a_worker_that_its_startup_probe_ended_names_the_field_to_raise(exit_code: int) -> None:
    found = first_blocker([starting(605, exit_code)])

    assert found is not None
    assert found.reason == "Starting"
    assert "was not ready within 600 s and was started again (restarts: 1)" in found.message
    assert "raise rollout.startupTimeout" in found.message


@pytest.mark.parametrize(("took_s", "exit_code"), [(40, 137), (605, 1), (4000, 143)])
def test_a_worker_that_ended_otherwise_is_a_crash(took_s: int, exit_code: int) -> None:
    found = first_blocker([starting(took_s, exit_code)])

    assert found is not None
    assert found.reason == "EngineCrash"


def test_the_most_basic_cause_of_several_is_first() -> None:
    def broken(name: str, status: Object) -> Object:
        return {"metadata": {"name": name}, "spec": {"containers": []}, "status": status}

    found = first_blocker(
        [
            broken("a", waiting("CrashLoopBackOff", exit_code=1)),
            broken("b", waiting("ImagePullBackOff")),
        ]
    )

    assert found is not None
    assert found.reason == "ImagePull"


async def test_transition_times_stay_while_the_status_stays() -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.reconciler.now = lambda: "2026-02-02T00:00:00Z"
    cluster.start_pods()
    await cluster.settle()

    assert cluster.condition("Model", "m", "Accepted")["lastTransitionTime"] == NOW
    assert cluster.condition("Model", "m", "Ready")["lastTransitionTime"] == "2026-02-02T00:00:00Z"


async def test_a_router_is_ready_when_a_pod_and_a_tier_are() -> None:
    cluster = Cluster(BOTH)
    await cluster.settle()
    cluster.start_pods()
    await cluster.settle()

    assert cluster.condition("Router", "r", "Ready")["reason"] == "Serving"
    status = cluster.get("Router", "r")["status"]
    assert status["usdPerHour"] == "1.1"
    assert status["endpoint"] == "http://r-router.default.svc.cluster.local:8000"


@pytest.mark.parametrize(
    ("change", "condition", "reason", "fix"),
    [
        (
            ("modelRef: {name: s}", "modelRef: {name: x}"),
            "ModelsResolved",
            "ModelMissing",
            "create",
        ),
        (('unified: {usdPerHour: "0.1"}', "unified: {}"), "Accepted", "UnpricedRole", "usdPerHour"),
        (('usdPerHour: "2"}', 'usdPerHour: "0.5"}'), "WithinBudget", "OverSpend", "lower replicas"),
        (("{name: r}", "{name: small}"), "Accepted", "InvalidRouter", "ambiguous"),
        (
            ("  slo:", "  scaling: {mode: Managed, policyRef: {name: p}}\n  slo:"),
            "Accepted",
            "PolicyMissing",
            "correct scaling.policyRef",
        ),
    ],
)
async def test_problems_between_objects_are_conditions_with_the_fix(
    change: tuple[str, str], condition: str, reason: str, fix: str
) -> None:
    cluster = Cluster(BOTH.replace(*change))
    await cluster.settle()
    cluster.start_pods()
    await cluster.settle()

    name = "small" if reason == "InvalidRouter" else "r"
    found = cluster.condition("Router", name, condition)
    assert (found["status"], found["reason"]) == ("False", reason)
    assert fix in found["message"]


async def test_a_missing_policy_is_told_while_the_router_serves_and_is_found_later() -> None:
    managed = "  scaling: {mode: Managed, policyRef: {name: p}}\n"
    cluster = Cluster(BOTH + managed)
    await cluster.settle()
    cluster.start_pods()
    await cluster.settle()
    without = cluster.condition("Router", "r", "Ready")
    router = cluster.get("Router", "r")
    told = news_in({**router, "status": {}}, router["status"])

    cluster.apply(POLICY)
    await cluster.settle()

    assert (without["status"], without["reason"]) == ("True", "PolicyMissing")
    assert "built-in values hold; create it" in without["message"]
    assert [(n.type, n.reason) for n in told] == [("Warning", "PolicyMissing")]
    assert cluster.condition("Router", "r", "Accepted")["status"] == "True"
    assert cluster.condition("Router", "r", "Ready")["reason"] == "Serving"


async def test_two_managed_routers_on_one_model_are_told() -> None:
    managed = BOTH + "  scaling: {mode: Managed}\n"
    cluster = Cluster(managed)
    cluster.apply(managed.split("---")[2].replace("{name: r}", "{name: r2}"))
    await cluster.settle()

    found = cluster.condition("Router", "r", "Accepted")
    assert found["reason"] == "TwoManagers"
    assert "r2" in found["message"]


async def test_a_field_that_slipped_past_the_schema_is_reported_on_the_object(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster()
    await cluster.settle()
    read = cluster.store.read

    def unpruned(kind: str, namespace: str, name: str) -> Object | None:
        """As an apiserver that prunes nothing."""
        obj = read(kind, namespace, name)
        if obj is not None and kind == "Model":
            obj["spec"]["zebra"] = 1
        return obj

    monkeypatch.setattr(cluster.store, "read", unpruned)
    before = cluster.get("Deployment", "m-decode")

    await cluster.reconcile()

    assert "spec.zebra: unknown field" in cluster.condition("Model", "m", "Accepted")["message"]
    assert cluster.get("Deployment", "m-decode") == before


async def test_a_change_of_ready_is_an_event() -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.start_pods()
    await cluster.settle()

    reasons = [e["reason"] for e in cluster.store.find("Event")]
    assert reasons == ["Starting", "Serving"]


async def test_a_tier_whose_model_was_deleted_leaves_the_router_serving() -> None:
    cluster = Cluster(BOTH)
    await cluster.settle()
    cluster.start_pods()
    await cluster.settle()
    assert cluster.condition("Router", "r", "Ready")["reason"] == "Serving"

    cluster.store.remove("Model", "default", "l")
    await cluster.settle()

    ready = cluster.condition("Router", "r", "Ready")
    assert (ready["status"], ready["reason"]) == ("True", "Degraded")
    assert "tier large is not ready, its share goes to the others; no Model l" in ready["message"]
    assert cluster.condition("Router", "r", "ModelsResolved")["reason"] == "ModelMissing"
    cluster.store.remove("Model", "default", "s")
    await cluster.settle()
    assert cluster.condition("Router", "r", "Ready")["reason"] == "ModelMissing"


EXACT = Measured("exact", "the checkpoint's own type")
WITHIN = Measured("within_loss", "int8 KV blocks: +0.10%")
UNMEASURED = Measured("not_measured", "awq weights: not measured")


@pytest.mark.parametrize(
    ("said", "status", "reason"),
    [
        ([EXACT, EXACT], "True", "Exact"),
        ([EXACT, WITHIN], "True", "WithinLoss"),
        ([WITHIN, UNMEASURED], "Unknown", "NotMeasured"),
        ([], "Unknown", "NotLoaded"),
    ],
)
async def test_a_model_is_qualified_once_its_workers_measured_what_its_settings_cost(
    said: list[Measured], status: str, reason: str
) -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.start_pods()
    cluster.measured = {f"m-decode-{i}": worker for i, worker in enumerate(said)}

    await cluster.settle()

    qualified = cluster.condition("Model", "m", "Qualified")
    assert (qualified["status"], qualified["reason"]) == (status, reason)
    assert cluster.condition("Model", "m", "Ready")["status"] == "True"


async def test_a_worker_that_loses_too_much_is_the_first_blocking_cause() -> None:
    said = "tandem-worker: fp8 KV blocks: the perplexity of 12 exact answers changes by +9.00%"
    ended = {"exitCode": 65, "message": said}
    cluster = Cluster()
    await cluster.settle()
    cluster.start_pods(
        containerStatuses=[
            {"name": "worker", "restartCount": 1, "state": {"waiting": {}}}
            | {"lastState": {"terminated": ended}}
        ]
    )

    await cluster.settle()

    for condition in ("Qualified", "Ready"):
        found = cluster.condition("Model", "m", condition)
        assert (found["status"], found["reason"]) == ("False", "QualityLoss")
        assert said in found["message"]


async def test_what_was_stored_before_a_rule_and_changes_nothing_goes_on_and_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An upgrade brings rules for fields that had no effect: nothing stands still for them."""
    cluster = Cluster(BOTH)
    await cluster.settle()
    cluster.start_pods()
    no_core = {"resources": {"cpu": "0"}}
    model = {"kvTransfer": {"maxInflight": "1Gi"}, "unified": no_core}
    with monkeypatch.context() as earlier:
        earlier.setattr(store, "violations", lambda *_: [])
        cluster.store.change("Model", "default", "s", {"spec": model})
        cluster.store.change("Router", "default", "r", {"spec": no_core})
    await cluster.settle()

    cluster.store.change("WorkerPool", "default", "s-unified", {"spec": {"replicas": 3}})
    await cluster.settle()

    assert cluster.get("Deployment", "s-unified")["spec"]["replicas"] == 3
    assert cluster.condition("Model", "s", "Accepted")["status"] == "True"
    ready = cluster.condition("Model", "s", "Ready")
    assert (ready["status"], ready["reason"]) == ("True", "Serving")
    assert "; spec.kvTransfer: kvTransfer is between prefill and decode" in ready["message"]
    assert "; spec.unified.resources.cpu: cpu of 0 asks for no core" in ready["message"]
    assert cluster.condition("Router", "r", "ModelsResolved")["status"] == "True"
    serving = cluster.condition("Router", "r", "Ready")
    assert (serving["status"], serving["reason"]) == ("True", "Serving")
    assert "; spec.resources.cpu: cpu of 0 asks for no core" in serving["message"]


async def test_a_model_that_is_there_and_wrong_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster(BOTH)
    await cluster.settle()
    cluster.start_pods()
    with monkeypatch.context() as earlier:
        earlier.setattr(store, "violations", lambda *_: [])
        cluster.store.change("Model", "default", "s", {"spec": {"unified": {"gpus": 2}}})
    await cluster.settle()

    found = cluster.condition("Router", "r", "ModelsResolved")

    assert (found["status"], found["reason"]) == ("False", "ModelInvalid")
    assert found["message"].startswith("Model s is not accepted, and this Router stays as it is")
    assert "spec.unified.gpus: a worker computes on tensorParallel GPUs" in found["message"]


async def test_a_shared_secret_that_was_deleted_is_told_while_all_pods_run() -> None:
    cluster = Cluster(BOTH)

    async def ready() -> list[Object]:
        """Of a Model and its Router, once a minute has passed."""
        cluster.reconciler.rotate = TokenRotation(cluster.store, lambda: 1e6).step
        await cluster.settle()
        return [cluster.condition(*of, "Ready") for of in (("Model", "s"), ("Router", "r"))]

    await ready()
    cluster.start_pods()
    before = await ready()
    cluster.store.remove("Secret", "default", PEER_SECRET)
    gone = await ready()
    cluster.store.add(peer_secret("default", "written back"))
    again = await ready()

    assert again == before
    for was, said in zip(before, gone, strict=True):
        assert (said["status"], said["reason"]) == (was["status"], was["reason"])
        added = said["message"].removeprefix(was["message"])
        assert added.startswith("; Secret tandem-peer-token is gone: ")
        assert "write the Secret back, or delete a pod" in added
