"""What a Router's status may promise: a predictor that is in use, a floor that is held, an SLO."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from stored_cluster import BOTH, Cluster
from tandem_operator.plan.router_facts import (
    CascadeFacts,
    LatencyFacts,
    PredictorFacts,
    TierFacts,
    TrafficFacts,
)
from tandem_operator.resources.base import Object

LEARNED = BOTH + '  predictor: {artifact: "configmap://p"}\n'


P = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: p}\ndata: {predictor.json: '{}'}\n"


async def running(text: str, facts: TrafficFacts | None = None) -> Cluster:
    """Router `r` with a ready pod that reports these facts, and ConfigMap `p`."""
    cluster = Cluster(text)
    (source,) = yaml.safe_load_all(P)
    source["metadata"]["namespace"] = "default"
    cluster.store.write(source, manager="user")

    async def traffic(_: list[Object]) -> TrafficFacts | None:
        return facts

    cluster.reconciler.traffic = traffic
    await cluster.settle()
    cluster.start_pods()
    await cluster.settle()
    return cluster


def reporting(*tiers: str, version: str = "v1", problem: str = "") -> TrafficFacts:
    return TrafficFacts(predictors={"r-router-0": PredictorFacts(version, tiers, problem)})


def config_of(cluster: Cluster) -> str:
    """What the pods of `r` are told."""
    (name,) = [
        n
        for n in cluster.names("ConfigMap")
        if n.startswith("r-router-") and n != "r-router-predictor"
    ]
    text: str = cluster.get("ConfigMap", name)["data"]["config.json"]
    return text


def types(cluster: Cluster) -> set[str]:
    return {c["type"] for c in cluster.get("Router", "r")["status"]["conditions"]}


async def test_an_artifact_alone_means_learned() -> None:
    cluster = await running(LEARNED, reporting("small", "large"))

    assert '"type": "Learned"' in config_of(cluster)
    assert '"quality_floor": 0.95' in config_of(cluster)
    ready = cluster.condition("Router", "r", "PredictorReady")
    assert (ready["status"], ready["reason"]) == ("True", "Loaded")


async def test_learned_with_nothing_learned_yet_ranks_by_length_while_labels_gather() -> None:
    learning = (
        "  predictor: {type: Learned}\n"
        '  learning: {shadowShare: "0.05", dailyUsd: "1", judge: {type: Exact}}\n'
        '  objective: {qualityFloor: "0.9"}\n'
    )
    facts = replace(reporting(problem="NoLabels: there is no artifact"), quality_ratio=0.8)
    cluster = await running(BOTH + learning, facts)

    ready = cluster.condition("Router", "r", "PredictorReady")
    assert (ready["status"], ready["reason"]) == ("False", "NoLabels")
    assert "ranked by prompt length" in ready["message"]
    assert "tandem labels export FILE" in ready["message"]
    assert cluster.condition("Router", "r", "Ready")["status"] == "True"
    assert '"artifact"' not in config_of(cluster)
    assert '"quality_floor": 0.9' in config_of(cluster)
    assert "FloorNotHeld" not in types(cluster)
    assert "qualityRatio" not in cluster.get("Router", "r")["status"]["predictor"]


async def test_status_repeats_what_training_said_to_do() -> None:
    verdict = "small -> large: send all to small: within .003 (-.004 to .010) of large"
    report = PredictorFacts("v1", ("small", "large"), verdicts=(verdict,))
    cluster = await running(LEARNED, TrafficFacts(predictors={"r-router-0": report}))

    ready = cluster.condition("Router", "r", "PredictorReady")
    assert ready["reason"] == "Loaded"
    assert ready["message"].endswith(f"; its training said: {verdict}")


@pytest.mark.parametrize(
    ("facts", "status", "reason", "said"),
    [
        (None, "Unknown", "NotLoaded", "has reported"),
        (reporting(problem="p: no such file"), "False", "NotLoaded", "p: no such file"),
        (
            reporting("cheap", "dear"),
            "False",
            "TierMismatch",
            "v1 was trained on tiers cheap, dear, the Router has small, large",
        ),
        (
            reporting("small", "large", problem="not JSON"),
            "True",
            "Loaded",
            "newer file is not used: not JSON",
        ),
    ],
)
async def test_loaded_is_what_the_pods_report(
    facts: TrafficFacts | None, status: str, reason: str, said: str
) -> None:
    cluster = await running(LEARNED, facts)

    found = cluster.condition("Router", "r", "PredictorReady")

    assert (found["status"], found["reason"]) == (status, reason)
    assert said in found["message"]


async def test_loaded_is_not_said_while_there_is_nothing_to_load() -> None:
    cluster = await running(LEARNED, reporting("small", "large"))
    pods = cluster.get("Deployment", "r-router")["spec"]["template"]

    cluster.apply(LEARNED.replace("configmap://p", "configmap://missing"))
    await cluster.settle()

    found = cluster.condition("Router", "r", "PredictorReady")
    assert (found["status"], found["reason"]) == ("False", "VolumeMissing")
    assert "ConfigMap missing does not exist; create it" in found["message"]
    assert found["message"].endswith("; predictor v1 stays in use")
    assert cluster.get("ConfigMap", "r-router-predictor")["data"] == {"predictor.json": "{}"}
    assert cluster.get("Deployment", "r-router")["spec"]["template"] == pods


async def test_loaded_is_not_said_while_the_new_pod_waits_for_its_claim() -> None:
    cluster = await running(LEARNED, reporting("small", "large"))

    cluster.apply(LEARNED.replace("configmap://p", "pvc://missing"))
    await cluster.settle()
    new = cluster.get("Deployment", "r-router")["spec"]["template"]
    state = {"waiting": {"reason": "FailedMount", "message": 'claim "missing" not found'}}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "new", "namespace": "default", "labels": new["metadata"]["labels"]},
        "spec": new["spec"],
        "status": {"containerStatuses": [{"name": "router", "state": state}]},
    }
    cluster.store.write(pod, manager="kubelet")
    await cluster.settle()

    found = cluster.condition("Router", "r", "PredictorReady")
    assert (found["status"], found["reason"]) == ("False", "VolumeMissing")
    assert "not found" in found["message"]


@pytest.mark.parametrize("kind", ["Length", "Fixed"])
async def test_a_floor_that_nothing_measures_is_told_and_no_ratio_is_invented(kind: str) -> None:
    text = f"{BOTH}  predictor: {{type: {kind}}}\n"
    facts = TrafficFacts(quality_ratio=0.83, content_blind_quality_ratio=0.8)
    plain = await running(text, facts)
    asked = await running(text + '  objective: {qualityFloor: "0.9"}\n', facts)

    assert "FloorNotHeld" not in types(plain)
    told = asked.condition("Router", "r", "FloorNotHeld")
    assert told["status"] == "True"
    assert "measures no quality" in told["message"]
    for cluster in (plain, asked):
        assert not {"qualityRatio", "baselineQualityRatio"} & set(
            cluster.get("Router", "r")["status"]["predictor"]
        )
        assert "quality_floor" not in config_of(cluster)


READING = LEARNED + "  cascade: {streams: true, deadline: 100ms}\n"


@pytest.mark.parametrize(
    ("facts", "status", "reason", "said"),
    [
        (None, "Unknown", "NotKnown", "no router pod has told"),
        (CascadeFacts(problem="it holds no verifier"), "False", "NoVerifier", "no verifier"),
        (CascadeFacts(), "True", "Reading", "are read before they are sent"),
        (
            CascadeFacts({"small": 50, "verify": 50}, {"escalated": 10, "verified": 40}),
            "True",
            "Reading",
            "50% of requests so far, 20% of these answers were replaced",
        ),
        (
            CascadeFacts(judge_problem="the judge gives no verdicts: status 500"),
            "True",
            "Reading",
            "before they are sent; the judge gives no verdicts: status 500",
        ),
    ],
)
async def test_whether_answers_are_read_is_a_condition_where_it_was_asked_for(
    facts: CascadeFacts | None, status: str, reason: str, said: str
) -> None:
    cluster = await running(READING, TrafficFacts(cascade=facts))
    plain = await running(LEARNED, TrafficFacts(cascade=facts))

    found = cluster.condition("Router", "r", "CascadeReady")
    assert (found["status"], found["reason"]) == (status, reason)
    assert said in found["message"]
    assert "CascadeReady" not in types(plain)
    told = json.loads(config_of(cluster))
    assert told["cascade"] == {"streams": True, "deadline_ms": 100.0}


JUDGE = "url: https://judge.example/v1, model: m"


@pytest.mark.parametrize(
    ("kind", "deadline", "waits_s"),
    [
        ("External", "250ms", None),
        ("ExternalInCascade", "250ms", 3.0),
        ("ExternalInCascade", "5s", 5.0),
    ],
)
async def test_a_judge_reads_answers_of_the_cascade_only_where_its_type_says_so(
    kind: str, deadline: str, waits_s: float | None
) -> None:
    text = LEARNED + f"  cascade: {{deadline: {deadline}}}\n"
    cluster = await running(text + f"  learning: {{judge: {{type: {kind}, {JUDGE}}}}}\n")

    told = json.loads(config_of(cluster))
    assert told["cascade"].get("judge_timeout_s") == waits_s
    assert told["learning"]["judge"]["type"] == "External"


@pytest.mark.parametrize(("percentile", "status"), [(99, "False"), (90, "True")])
async def test_an_slo_is_met_by_the_share_of_requests_that_it_states(
    percentile: int, status: str
) -> None:
    """Ninety-five of a hundred in time: enough for p90, not for p99, whatever the mean is."""
    slo = f"slo: {{ttft: {{percentile: {percentile}, target: 500ms}}}}"
    tiers = {"small": TierFacts(1.0, LatencyFacts(0.7, 100, 95))}

    text = BOTH.replace("slo: {ttft: {target: 500ms}}", slo)
    cluster = await running(text, TrafficFacts(tiers=tiers))

    found = cluster.condition("Router", "r", "SLOMet")
    assert found["status"] == status
    if status == "False":
        assert "TTFT p99 is 700ms over the last 100 requests, target 500ms" in found["message"]


@pytest.mark.parametrize(
    ("worker", "scaling", "said"),
    [
        ("unified: {", "External", "; add workers"),
        (
            "unified: {maxReplicas: 1, ",
            "External",
            "its 1 unified workers, no more are allowed",
        ),
        ("unified: {maxReplicas: 1, ", "Managed", "raise maxReplicas, or the target"),
        ("unified: {maxReplicas: 5, ", "Managed", "status.decisions say what it does"),
    ],
)
async def test_workers_are_asked_for_only_where_there_may_be_more(
    worker: str, scaling: str, said: str
) -> None:
    late = TrafficFacts(tiers={"small": TierFacts(1.0, LatencyFacts(0.7, 100, 5))})
    text = BOTH.replace("unified: {", worker) + f"  scaling: {{mode: {scaling}}}\n"

    cluster = await running(text, late)

    message = cluster.condition("Router", "r", "SLOMet")["message"]
    assert said in message
    assert ("add workers" in message) == (said == "; add workers")


async def test_without_traffic_nobody_says_that_an_slo_is_missed() -> None:
    for facts in (None, TrafficFacts(), TrafficFacts(tiers={"small": TierFacts()})):
        cluster = await running(BOTH, facts)

        found = cluster.condition("Router", "r", "SLOMet")
        assert (found["status"], found["reason"]) == ("Unknown", "NoTraffic")


async def test_a_policy_that_cannot_be_read_is_told_on_policy_and_router() -> None:
    managed = "  scaling: {mode: Managed, policyRef: {name: p}}\n"
    cluster = Cluster(BOTH + managed)
    policy = {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "AutoscalingPolicy",
        "metadata": {"name": "p", "namespace": "default"},
        "spec": {
            "schedules": [
                {"name": "day", "cron": "99 99 99 99 99", "duration": "1h", "minReplicas": 1}
            ]
        },
    }
    get = cluster.store.get

    async def taken(kind: str, namespace: str, name: str) -> Object | None:
        """An apiserver takes what CEL cannot know; the store of local mode does not."""
        if kind != "AutoscalingPolicy":
            return await get(kind, namespace, name)
        return {**policy, "status": statuses[-1]} if statuses else policy

    async def told(obj: Object) -> Object:
        if obj["kind"] != "AutoscalingPolicy":
            return await apply_status(obj)
        statuses.append(obj["status"])
        return obj

    statuses: list[Object] = []
    apply_status = cluster.store.apply_status
    cluster.store.get, cluster.store.apply_status = taken, told  # type: ignore[method-assign]
    await cluster.settle()
    await cluster.reconcile("AutoscalingPolicy", "p")

    for accepted, reason in (
        (statuses[-1]["conditions"][0], "Invalid"),
        (cluster.condition("Router", "r", "Accepted"), "PolicyInvalid"),
    ):
        assert (accepted["type"], accepted["status"]) == ("Accepted", "False")
        assert accepted["reason"] == reason
        assert "spec.schedules[0].cron: '99 99 99 99 99': bad minute" in accepted["message"]
