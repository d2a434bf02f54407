"""Whether a Router's predictor is the one that answers, and whether its quality floor is held."""

from __future__ import annotations

from tandem_operator.plan.conditions import Conditions
from tandem_operator.plan.objects import REVISION_LABEL, Plan, Problem
from tandem_operator.plan.pods import Blocker, first_blocker, is_ready
from tandem_operator.plan.router_facts import PredictorFacts, TrafficFacts
from tandem_operator.resources import Router
from tandem_operator.resources.base import Object

#: A predictor of public outcomes does not know pairs it has not seen, so none takes this place.
NO_LABELS = (
    "there is no artifact yet, requests are ranked by prompt length; labels gather: `tandem labels "
    "export FILE`, or `tandem grade` on questions of yours, then `tandem train FILE` and set "
    "predictor.artifact"
)


def add_predictor_conditions(
    conditions: Conditions,
    router: Router,
    plan: Plan,
    pods: list[Object],
    traffic: TrafficFacts | None,
    refused_pods: Blocker | None,
) -> None:
    """PredictorReady from what the pods of the planned revision report, and FloorNotHeld."""
    kind = router.spec.predictor.kind
    if kind == "Learned" and not router.spec.predictor.has_source:
        conditions.add("PredictorReady", False, "NoLabels", NO_LABELS)
    elif (missing := _problem(plan)) is not None:
        text = missing.message + _meanwhile(traffic)
        conditions.add("PredictorReady", False, missing.reason, text)
    elif kind == "Learned":
        _learned(conditions, router, _current(plan, pods), traffic, refused_pods)
    else:
        conditions.add("PredictorReady", True, kind, f"type {kind} needs no artifact")
    floor = router.spec.objective.quality_floor
    if (
        floor is not None
        and router.spec.predictor.ranks_by != "Learned"
        and router.spec.learned_floor is None
    ):
        text = (
            f"qualityFloor {floor} is not held: type {kind} measures no quality; train a predictor "
            "(predictor.training or predictor.artifact), or remove qualityFloor"
        )
        conditions.add("FloorNotHeld", True, "NothingMeasuresQuality", text)


def _problem(plan: Plan) -> Problem | None:
    return next((p for p in plan.problems if p.condition == "PredictorReady"), None)


def _meanwhile(traffic: TrafficFacts | None) -> str:
    """What answers while the artifact is not there."""
    known = sorted({p.version for p in (traffic.predictors if traffic else {}).values() if p.tiers})
    if known:
        return f"; predictor {', '.join(known)} stays in use"
    return "; the fallback tier answers meanwhile"


def _current(plan: Plan, pods: list[Object]) -> list[Object]:
    """Pods of the revision that is wanted now; all of them where nothing is planned."""
    deployment = next((o for o in plan.apply if o["kind"] == "Deployment"), None)
    if deployment is None:
        return pods
    revision = deployment["metadata"]["labels"][REVISION_LABEL]
    return [p for p in pods if p["metadata"]["labels"].get(REVISION_LABEL) == revision]


def _learned(
    conditions: Conditions,
    router: Router,
    pods: list[Object],
    traffic: TrafficFacts | None,
    refused_pods: Blocker | None,
) -> None:
    ready = [p["metadata"]["name"] for p in pods if is_ready(p)]
    known = traffic.predictors if traffic else {}
    reports = [(name, known[name]) for name in ready if name in known]
    cause = refused_pods or first_blocker(pods)
    if not ready and cause is not None and cause.reason != "Starting":
        conditions.add("PredictorReady", False, cause.reason, cause.message)
    elif not reports:
        text = "no router pod of the current revision has reported a predictor yet"
        conditions.add("PredictorReady", None, "NotLoaded", text)
    elif broken := next(((n, r) for n, r in reports if r.problem and not r.tiers), None):
        text = f"pod {broken[0]}: {broken[1].problem}; the fallback tier answers meanwhile"
        conditions.add("PredictorReady", False, "NotLoaded", text)
    elif other := next((r for _, r in reports if _differs(r, router)), None):
        conditions.add("PredictorReady", False, "TierMismatch", _mismatch(other, router))
    else:
        name, report = next(((n, r) for n, r in reports if r.problem), reports[0])
        text = f"pod {name} uses predictor {report.version}"
        if report.problem:
            text += f"; its newer file is not used: {report.problem}"
        if report.verdicts:
            text += f"; its training said: {'; '.join(report.verdicts)}"
        conditions.add("PredictorReady", True, "Loaded", text)


def _differs(report: PredictorFacts, router: Router) -> bool:
    return set(report.tiers) != {tier.name for tier in router.spec.tiers}


def _mismatch(report: PredictorFacts, router: Router) -> str:
    own = ", ".join(tier.name for tier in router.spec.tiers)
    return (
        f"predictor {report.version} was trained on tiers {', '.join(report.tiers)}, the Router "
        f"has {own}; rename the Router's tiers or train on outcomes of {own}"
    )
