"""Whether a Router's quality floor holds, by prediction and by measurement, and what is learned."""

from __future__ import annotations

from datetime import UTC, datetime

from tandem_operator.plan.conditions import Conditions
from tandem_operator.plan.router_facts import QualityFacts, TrafficFacts
from tandem_operator.resources import Router
from tandem_operator.resources.base import Object, money

#: A drift is told for a day.
DRIFT_SHOWN_S = 86_400.0
#: Status shows two digits; less than half of the second is no violation.
TOLERANCE = 0.005


def add_quality_conditions(
    conditions: Conditions, router: Router, traffic: TrafficFacts | None, now: str
) -> None:
    """FloorHeld where a floor is held; Learning, QualityProven, QualityDrifted where one learns."""
    spec = router.spec
    floor = spec.held_floor if spec.held_floor is not None else spec.learned_floor
    learned = traffic.quality if traffic is not None else None
    if floor is not None:
        _held(conditions, router, floor, traffic)
    learning = router.spec.learning
    if learning is None or float(learning.shadow_share) == 0.0:
        return
    if learned is None:
        conditions.add("Learning", None, "NotKnown", "no router pod has told of its labels yet")
    elif learned.judge_error:
        text = f"the judge gives no verdicts, requests go on: {learned.judge_error}"
        conditions.add("Learning", False, "JudgeFails", text)
    elif learned.labels_error:
        conditions.add("Learning", False, "LabelsUnavailable", learned.labels_error)
    elif learned.cap_error:
        conditions.add("Learning", False, "DailyCapSpent", learned.cap_error)
    elif learned.paused:
        conditions.add("Learning", False, "Paused", learned.paused)
    else:
        text = f"{learned.num_labels} labels, ${money(learned.cost_usd)} spent on them"
        conditions.add("Learning", True, "Learning", text)
    stated = router.spec.objective.quality_floor
    wanted = floor if floor is not None else (float(stated) if stated is not None else None)
    if wanted is not None:
        _proven(conditions, wanted, learned)
    if (
        learned is not None
        and learned.drifted_at is not None
        and _unix(now) - learned.drifted_at < DRIFT_SHOWN_S
    ):
        reason = "GotBetter" if learned.rose else "GotWorse"
        conditions.add("QualityDrifted", True, reason, learned.drift)


def quality_status(learned: QualityFacts) -> Object:
    """`status.quality`."""
    found: Object = {"labels": learned.num_labels, "costUsd": money(learned.cost_usd)}
    if learned.since is not None:
        since = datetime.fromtimestamp(learned.since, UTC)
        found["since"] = since.isoformat(timespec="seconds").replace("+00:00", "Z")
    if learned.measured is not None and learned.low is not None and learned.high is not None:
        found["measured"] = f"{learned.measured:.3f}"
        found["interval"] = f"{learned.low:.3f}-{learned.high:.3f}"
    return found


def _proven(conditions: Conditions, floor: float, learned: QualityFacts | None) -> None:
    if learned is None or learned.measured is None or learned.low is None or learned.high is None:
        number = learned.num_labels if learned is not None else 0
        text = f"{number} labels say too little yet to hold against the floor {floor:g}"
        conditions.add("QualityProven", None, "TooFewLabels", text)
        return
    text = (
        f"measured {learned.measured:.3f}, within {learned.low:.3f}-{learned.high:.3f} with 95 % "
        f"certainty after {learned.num_labels} labels, floor {floor:g}"
    )
    if learned.disagreement:
        text = (
            f"{learned.disagreement}: nothing is proven of the Router; share labels by "
            "spec.store.postgres, or see in GET /admin/decisions what one gets that others do not"
        )
        conditions.add("QualityProven", None, "ReplicasDisagree", text)
    elif learned.low >= floor:
        conditions.add("QualityProven", True, "Proven", text)
    elif learned.high < floor:
        conditions.add("QualityProven", False, "BelowFloor", text)
    else:
        conditions.add("QualityProven", None, "TooFewLabels", text)


def _held(
    conditions: Conditions, router: Router, floor: float, traffic: TrafficFacts | None
) -> None:
    learned = traffic.quality if traffic is not None else None
    expected = traffic.quality_ratio if traffic is not None else None
    is_measured = learned is not None and learned.measured is not None
    if learned is not None and is_measured:
        expected = learned.measured
    if traffic is None or expected is None:
        text = f"floor {floor:g}: nothing was scored or measured yet"
        conditions.add("FloorHeld", None, "NoTraffic", text)
        return
    basis = "measured" if is_measured else "predicted"
    text = f"{basis} quality {expected:.2f} of the last tier's, floor {floor:g}"
    if expected >= floor - TOLERANCE:
        conditions.add("FloorHeld", True, "Measured" if is_measured else "Predicted", text)
        return
    limit, in_force = traffic.threshold_limit, traffic.threshold
    moved = limit is not None and in_force is not None and in_force > limit + 1e-6
    if traffic.lambda_per_usd > 0.0:
        text += ": the budget comes before quality; raise it, or lower the floor"
        conditions.add("FloorHeld", False, "BudgetOverrides", text)
    elif moved:
        text += ": a tier's maxShare comes before quality; raise it"
        conditions.add("FloorHeld", False, "ShareOverrides", text)
    elif router.spec.slo.ttft is not None or router.spec.slo.tpot is not None:
        text += ": requests that the last tier would answer too late go elsewhere; add workers"
        conditions.add("FloorHeld", False, "SloOverrides", text)
    else:
        conditions.add("FloorHeld", False, "BelowFloor", text)


def _unix(now: str) -> float:
    return datetime.fromisoformat(now.replace("Z", "+00:00")).timestamp()
