"""A Router's status says whether its floor holds, on what that rests, and what is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stored_cluster import NOW, Cluster, pair
from tandem_operator.plan.quality_status import quality_status
from tandem_operator.plan.router_facts import QualityFacts, TrafficFacts
from tandem_operator.reconcile.events import news_in
from tandem_operator.reconcile.quality_report import quality_facts, retraining_facts
from tandem_operator.resources.base import Object

PLAIN = pair("  unified: {}\n", "  unified: {}\n")
LEARNED = PLAIN + '  predictor: {artifact: "configmap://p"}\n  objective: {qualityFloor: "0.95"}\n'
LEARNING = LEARNED + (
    '  learning: {shadowShare: "0.1", judge: {url: "http://judge.test/v1", model: j}}\n'
)


async def status_of(text: str, facts: TrafficFacts | None) -> tuple[dict[str, Any], Object]:
    cluster = Cluster(text)

    async def traffic(_: list[Object]) -> TrafficFacts | None:
        return facts

    cluster.reconciler.traffic = traffic
    await cluster.settle()
    cluster.start_pods()
    await cluster.settle()
    status = cluster.get("Router", "r")["status"]
    return {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}, status


def measured(ratio: float, low: float, high: float, **more: Any) -> QualityFacts:
    return QualityFacts(ratio, low, high, 400, 1_800_000_000.0, 0.25, **more)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (None, ("Unknown", "NoTraffic")),
        (TrafficFacts(quality_ratio=0.96), ("True", "Predicted")),
        (TrafficFacts(quality_ratio=0.81), ("False", "BelowFloor")),
        (TrafficFacts(quality_ratio=0.81, lambda_per_usd=9.0), ("False", "BudgetOverrides")),
        (
            TrafficFacts(quality_ratio=0.81, threshold=0.5, threshold_limit=0.1),
            ("False", "ShareOverrides"),
        ),
        (
            TrafficFacts(quality_ratio=0.99, quality=measured(0.9, 0.88, 0.92)),
            ("False", "BelowFloor"),
        ),
        (
            TrafficFacts(quality_ratio=0.8, quality=measured(0.96, 0.94, 0.98)),
            ("True", "Measured"),
        ),
    ],
)
async def test_a_floor_that_does_not_hold_is_told_with_what_overrides_it(
    facts: TrafficFacts | None, said: tuple[str, str]
) -> None:
    conditions, _ = await status_of(LEARNED, facts)

    assert conditions["FloorHeld"] == said
    assert "QualityProven" not in conditions


async def test_an_slo_that_sends_requests_elsewhere_is_named() -> None:
    text = LEARNED + "  slo: {ttft: {target: 500ms}}\n"

    conditions, _ = await status_of(text, TrafficFacts(quality_ratio=0.81))

    assert conditions["FloorHeld"] == ("False", "SloOverrides")


@pytest.mark.parametrize(
    ("quality", "said"),
    [
        (QualityFacts(num_labels=7), ("Unknown", "TooFewLabels")),
        (measured(0.97, 0.951, 0.99), ("True", "Proven")),
        (measured(0.97, 0.93, 1.01), ("Unknown", "TooFewLabels")),
        (measured(0.90, 0.86, 0.94), ("False", "BelowFloor")),
    ],
)
async def test_quality_is_proven_by_its_interval_alone(
    quality: QualityFacts, said: tuple[str, str]
) -> None:
    conditions, status = await status_of(LEARNING, TrafficFacts(quality=quality))

    assert conditions["QualityProven"] == said
    assert conditions["Learning"] == ("True", "Learning")
    assert status["quality"]["labels"] == quality.num_labels


def of_pod(ratio: float, low: float, high: float, labels: int, **more: Any) -> Object:
    said = {"measured": ratio, "low": low, "high": high, "num_labels": labels, **more}
    return {**REPORT, "quality": {**REPORT["quality"], **said}}


@pytest.mark.parametrize(
    ("other", "proven"),
    [
        ((0.98, 0.96, 0.99, 300), ("True", "Proven")),
        ((0.90, 0.87, 0.93, 300), ("Unknown", "ReplicasDisagree")),
        ((0.94, 0.90, 0.965, 300), ("True", "Proven")),
    ],
    ids=["the same", "apart", "both may be right"],
)
async def test_replicas_that_disagree_prove_nothing_and_status_says_who_measured_what(
    other: tuple[float, float, float, int], proven: tuple[str, str]
) -> None:
    states = [of_pod(0.97, 0.955, 0.985, 400), of_pod(*other)]

    for pods in (states, states[::-1]):
        conditions, status = await status_of(LEARNING, TrafficFacts(quality=quality_facts(pods)))
        assert conditions["QualityProven"] == proven

    (said,) = [c["message"] for c in status["conditions"] if c["type"] == "QualityProven"]
    if proven[1] == "ReplicasDisagree":
        assert "measured 0.900 (0.870-0.930, 300 labels), another 0.970 (0.955-0.985" in said
        assert "spec.store.postgres" in said


async def test_what_is_wrong_with_one_replica_is_said_though_another_knows_more() -> None:
    well = of_pod(0.97, 0.955, 0.985, 400)
    blind = of_pod(0.97, 0.955, 0.985, 40, error="labels cannot be read: locked")
    deaf = {**well, "learning": {**REPORT["learning"], "judge": {"error": "status 500"}}}

    for states, reason in (([well, blind], "LabelsUnavailable"), ([well, deaf], "JudgeFails")):
        conditions, _ = await status_of(LEARNING, TrafficFacts(quality=quality_facts(states)))
        assert conditions["Learning"] == ("False", reason)


def test_status_quality_has_interval_since_and_cost() -> None:
    assert quality_status(measured(0.9612, 0.94, 0.98)) == {
        "measured": "0.961",
        "interval": "0.940-0.980",
        "labels": 400,
        "since": "2027-01-15T08:00:00Z",
        "costUsd": "0.25",
    }


REPORT: Object = {
    "quality": {"num_labels": 3, "labels_by_source": {"judge": 3}, "changes": []},
    "learning": {"shadow_share": 0.1, "daily_usd": 1.0, "spent_today_usd": 0.2, "cost_usd": 0.5},
}


@pytest.mark.parametrize(
    ("quality", "learning", "reason"),
    [
        ({}, {}, ""),
        ({}, {"judge": {"error": "it answered with status 500"}}, "JudgeFails"),
        ({"error": "labels cannot be read: locked"}, {}, "LabelsUnavailable"),
        ({}, {"spent_today_usd": 0.99}, "DailyCapSpent"),
        ({}, {"closed": {"large": "tier large misses its SLO"}}, "Paused"),
    ],
)
async def test_what_keeps_a_router_from_learning_is_said(
    quality: Object, learning: Object, reason: str
) -> None:
    state = {
        "quality": {**REPORT["quality"], **quality},
        "learning": {**REPORT["learning"], **learning},
    }

    facts = quality_facts([state])
    conditions, _ = await status_of(LEARNING, TrafficFacts(quality=facts))

    assert facts is not None
    assert conditions["Learning"] == (("False", reason) if reason else ("True", "Learning"))


async def test_a_tier_that_got_worse_is_told_for_a_day_with_its_statistic() -> None:
    change = {
        "tier": "small",
        "rose": False,
        "at": 0.0,
        "before": 0.8,
        "after": 0.5,
        "statistic": 9.0,
        "num_labels": 90,
    }
    now = _unix(NOW)
    found = {}
    for hours in (1, 25):
        change["at"] = now - hours * 3600
        state = {**REPORT, "quality": {**REPORT["quality"], "changes": [change]}}
        facts = quality_facts([state])
        conditions, _ = await status_of(LEARNING, TrafficFacts(quality=facts))
        found[hours] = conditions.get("QualityDrifted")

    assert found == {1: ("True", "GotWorse"), 25: None}
    assert facts is not None
    assert "tier small: quality of about 0.80 became 0.50" in facts.drift
    assert "9.0 after 90 labels" in facts.drift


def _unix(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def test_nothing_is_reported_where_nothing_is_learned_and_garbage_is_no_number() -> None:
    quiet: Object = {"quality": {"num_labels": 0}, "learning": {"shadow_share": 0.0}}
    odd = {**REPORT, "quality": {**REPORT["quality"], "measured": "much", "low": True}}

    facts = quality_facts([odd])

    assert quality_facts([]) is None
    assert quality_facts([quiet, {"quality": 7}]) is None
    assert facts is not None
    assert (facts.measured, facts.low) == (None, None)


RETRAINING: Object = {
    "phase": "shadowed",
    "candidate": "v2",
    "predecessor": None,
    "comparison": {"num_labels": 57, "smaller_error": 0.0123},
    "steps": [
        {"at": 1_800_000_000.0, "kind": "trained", "version": "v2", "why": "from 500 labels"}
    ],
    "problem": "",
}


def test_what_became_of_a_retrained_predictor_is_told_in_words() -> None:
    facts = retraining_facts([{"retraining": None}, {"retraining": RETRAINING}])

    assert facts is not None
    assert facts.candidate == "v2"
    assert facts.comparison == "v2: squared error 0.012 smaller over 50+ labels"
    assert facts.changes == ("2027-01-15T08:00:00Z trained v2: from 500 labels",)
    assert retraining_facts([{}]) is None


def test_a_candidate_that_does_worse_is_not_called_less_good_by_a_negative_number() -> None:
    worse = {**RETRAINING, "comparison": {"num_labels": 57, "smaller_error": -0.0902}}

    facts = retraining_facts([{"retraining": worse}])

    assert facts is not None
    assert facts.comparison == "v2: squared error 0.090 larger over 50+ labels"


async def test_the_life_of_the_predictor_is_status_and_its_changes_are_events() -> None:
    facts = retraining_facts([{"retraining": RETRAINING}])
    _, status = await status_of(LEARNED, TrafficFacts(retraining=facts))

    assert status["predictor"]["candidate"] == "v2"
    assert status["predictor"]["changes"] == ["2027-01-15T08:00:00Z trained v2: from 500 labels"]
    router = {"kind": "Router", "status": {}}
    (news,) = [n for n in news_in(router, status) if n.reason == "PredictorChanged"]
    assert (news.type, "from 500 labels" in news.message) == ("Normal", True)
    assert not news_in({"kind": "Router", "status": status}, status)


def step(kind: str, after_s: float, version: str = "v2") -> Object:
    return {"at": 1_800_000_000.0 + after_s, "kind": kind, "version": version, "why": "labels"}


def retrained(*steps: Object, leads: bool = True) -> Object:
    return {"retraining": {**RETRAINING, "steps": list(steps), "leads": leads}}


class Life:
    """A Router in a cluster whose pods say what their predictor went through."""

    def __init__(self) -> None:
        self.cluster = Cluster(LEARNED)
        self.states: list[Object] = []
        self.cluster.reconciler.traffic = self._traffic

    async def _traffic(self, _: list[Object]) -> TrafficFacts | None:
        if not self.states:
            return None
        return TrafficFacts(retraining=retraining_facts(self.states))

    async def told(self, *states: Object) -> list[str]:
        """Kinds of the changes that Events tell of, each as often as it was told."""
        self.states = list(states)
        await self.cluster.reconcile("Router", "r")
        found = [e for e in self.cluster.store.find("Event") if e["reason"] == "PredictorChanged"]
        assert len({e["metadata"]["name"] for e in found}) == len(found)
        return [e["message"].split()[1] for e in found for _ in range(e["count"])]

    async def begin(self) -> None:
        await self.cluster.settle()
        self.cluster.start_pods()
        await self.cluster.settle()

    def restart_operator(self) -> None:
        """Another process looks after the same objects."""
        self.cluster.reconciler = replace(self.cluster.reconciler)


async def test_two_changes_between_two_looks_are_two_events_and_both_stay_in_status() -> None:
    life = Life()
    await life.begin()

    first = await life.told(retrained(step("trained", 0)))
    both = await life.told(retrained(step("trained", 0), step("promoted", 5), step("kept", 5.5)))

    assert first == ["trained"]
    assert both == ["trained", "promoted", "kept"]
    changes = life.cluster.get("Router", "r")["status"]["predictor"]["changes"]
    assert [text.split()[1] for text in changes] == ["trained", "promoted", "kept"]


async def test_a_change_is_told_once_whichever_pod_answers_and_after_restarts() -> None:
    life = Life()
    await life.begin()
    trained, promoted = step("trained", 0), step("promoted", 5)
    leader, follower = retrained(trained, promoted), retrained(trained, leads=False)

    told = [
        await life.told(leader, follower),
        await life.told(follower),  # the one that decided does not answer
        await life.told(),  # nor does any
        await life.told(retrained()),  # all were restarted, without what they knew
    ]
    life.restart_operator()
    told.append(await life.told(follower, leader))

    assert told == [["trained", "promoted"]] * 5


async def test_an_operator_that_ends_before_the_status_is_written_tells_nothing_twice() -> None:
    life = Life()
    await life.begin()
    store = life.cluster.store
    write = store.apply_status

    async def ends(_: Object) -> Object:
        raise OSError("the operator is gone")

    store.apply_status = ends  # type: ignore[method-assign]
    with pytest.raises(OSError, match="gone"):
        await life.told(retrained(step("trained", 0)))
    store.apply_status = write  # type: ignore[method-assign]
    life.restart_operator()

    assert await life.told(retrained(step("trained", 0))) == ["trained"]


async def test_status_keeps_the_last_twenty_changes() -> None:
    life = Life()
    await life.begin()

    told = await life.told(retrained(*(step("trained", n, f"v{n}") for n in range(20))))
    await life.told(retrained(*(step("trained", n, f"v{n}") for n in range(5, 25))))

    changes = life.cluster.get("Router", "r")["status"]["predictor"]["changes"]
    assert len(told) == 20
    assert [text.split()[2] for text in changes] == [f"v{n}:" for n in range(5, 25)]


async def test_with_prompt_length_only_labels_hold_a_floor_and_status_says_so() -> None:
    text = LEARNING.replace('  predictor: {artifact: "configmap://p"}\n', "")

    before, _ = await status_of(text, TrafficFacts(quality=QualityFacts(num_labels=3)))
    after, _ = await status_of(text, TrafficFacts(quality=measured(0.97, 0.951, 0.99)))
    without, _ = await status_of(PLAIN + '  objective: {qualityFloor: "0.95"}\n', None)

    assert before["FloorHeld"] == ("Unknown", "NoTraffic")
    assert after["FloorHeld"] == ("True", "Measured")
    assert "FloorNotHeld" not in after
    assert "FloorHeld" not in without
    assert "FloorNotHeld" in without
