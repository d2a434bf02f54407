"""Pure status of a Router: conditions, tiers, what its predictor is worth, what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tandem_operator.plan.conditions import Conditions
from tandem_operator.plan.gateway_status import add_gateway_conditions
from tandem_operator.plan.measured_prices import TokenPrice
from tandem_operator.plan.objects import Plan, service_name
from tandem_operator.plan.pods import NO_CLAIMS, Blocker, first_blocker, is_ready
from tandem_operator.plan.predictor_status import add_predictor_conditions
from tandem_operator.plan.quality_status import add_quality_conditions, quality_status
from tandem_operator.plan.router import missing_models, router_name
from tandem_operator.plan.router_config import token_prices, usd_per_hour
from tandem_operator.plan.router_facts import TierFacts, TrafficFacts
from tandem_operator.plan.scheduling import Claims
from tandem_operator.resources import Model, Router
from tandem_operator.resources.base import Object, money
from tandem_operator.resources.router.status import CHANGES_KEPT

BUILT_IN_VALUES_HOLD = ("PolicyMissing", "PolicyInvalid")
"""Problems of a policy: told, and no reason not to serve."""


def router_status(
    router: Router,
    old_status: Mapping[str, Any],
    plan: Plan,
    models: Mapping[str, Model],
    model_objects: Mapping[str, Object],
    pods: list[Object],
    endpoint: str,
    traffic: TrafficFacts | None,
    now: str,
    refused_pods: Blocker | None = None,
    claims: Claims = NO_CLAIMS,
    prices: Mapping[str, TokenPrice] | None = None,
    failed_training: str = "",
    children: Iterable[Object] = (),
) -> Object:
    """The status of a Router.

    model_objects: the raw Models with their status, by name. traffic: what its pods measured.
    refused_pods: why it gets no more of them. claims: its own PersistentVolumeClaims by name.
    prices: measured ones of tokens, by tier. failed_training: what its last Job ended with.
    children: as they are, with what others say of them.
    """
    conditions = Conditions(old_status.get("conditions") or [], router.metadata.generation, now)
    problems = {p.condition: p for p in reversed(plan.problems)}
    blocking: Blocker | None = None
    if refused := problems.get("Accepted"):
        conditions.add("Accepted", False, refused.reason, refused.message)
        if refused.reason not in BUILT_IN_VALUES_HOLD:
            blocking = Blocker(refused.reason, refused.message)
    else:
        conditions.add("Accepted", True, "Valid", "the specification can be run")
    if unresolved := problems.get("ModelsResolved"):
        conditions.add("ModelsResolved", False, unresolved.reason, unresolved.message)
    else:
        conditions.add("ModelsResolved", True, "Found", "every tier's Model exists")
    ready_pods = [p for p in pods if is_ready(p)]
    cause = refused_pods or first_blocker(pods, claims)
    add_predictor_conditions(conditions, router, plan, pods, traffic, refused_pods)
    tiers, any_ready = _tiers(router, models, model_objects, traffic, prices or {})
    for kind, unset in (
        ("SLOMet", router.spec.slo.ttft is None and router.spec.slo.tpot is None),
        ("WithinBudget", router.spec.budget.usd_per_hour is None),
    ):
        if unset and not (kind == "WithinBudget" and router.spec.budget.gpus is not None):
            conditions.add(kind, True, "NoneSet", "no target is set")
        elif kind == "WithinBudget":
            _budget(conditions, router, models, model_objects)
        else:
            _slo(conditions, router, models, model_objects, traffic)
    _durable(conditions, traffic)
    add_quality_conditions(conditions, router, traffic, now)
    if router.spec.cascade is not None:
        _cascade(conditions, traffic)
    add_gateway_conditions(conditions, router, plan, children)
    wanted = router.spec.replicas
    # A Model that goes takes its tier with it; what serves the others goes on.
    if unresolved and not (ready_pods and any_ready):
        blocking = blocking or Blocker(unresolved.reason, unresolved.message)
    if blocking is None and wanted == 0:
        blocking = Blocker("ScaledToZero", "no router pod is wanted")
    if blocking is None and not ready_pods:
        blocking = cause or Blocker("Starting", f"0 of {wanted} router pods are ready")
    if blocking is None and not any_ready:
        blocking = _tier_blocker(router, model_objects)
    waiting = [t["name"] for t in tiers if not t["ready"]]
    if blocking is None:
        text = f"{len(ready_pods)} of {wanted} router pods are ready"
        if waiting:
            text += f"; tier {', '.join(waiting)} is not ready, its share goes to the others"
        if unresolved:
            text += f"; {unresolved.message}"
        reason = "Degraded" if waiting else "Serving"
        if refused:
            # It serves, and a one-line view shows what is wrong all the same.
            reason, text = refused.reason, f"{text}; {refused.message}"
        conditions.add("Ready", True, reason, "; ".join([text, *plan.notes]))
    else:
        conditions.add("Ready", False, blocking.reason, blocking.message)
    status: Object = {
        "observedGeneration": router.metadata.generation,
        "conditions": conditions.items,
        "endpoint": endpoint,
        "ready": f"{len(ready_pods)}/{wanted}",
        "tiers": tiers,
        "gpus": _sum_gpus(router, model_objects),
        "message": conditions.items[-1]["message"],
    }
    if (price := _router_price(router, model_objects)) is not None:
        status["usdPerHour"] = money(price)
    if traffic is not None:
        status["predictor"] = {"version": traffic.predictor[:64]}
        if traffic.threshold is not None:
            status["predictor"]["threshold"] = f"{traffic.threshold:.3g}"
        # Qualities of Length and Fixed are orders, not measurements: a ratio of them says nothing.
        measured = router.spec.predictor.ranks_by == "Learned"
        if measured and traffic.quality_ratio is not None:
            status["predictor"]["qualityRatio"] = f"{traffic.quality_ratio:.2f}"
        if measured and traffic.content_blind_quality_ratio is not None:
            blind = f"{traffic.content_blind_quality_ratio:.2f}"
            status["predictor"]["baselineQualityRatio"] = blind
        if traffic.retraining is not None:
            retraining = traffic.retraining
            for name, said in (
                ("candidate", retraining.candidate[:64]),
                (
                    "comparison",
                    retraining.problem or failed_training or retraining.comparison,
                ),
            ):
                if said:
                    status["predictor"][name] = said[:1024]
    if changes := _changes(old_status, traffic):
        status.setdefault("predictor", {})["changes"] = changes
    if traffic is not None and traffic.quality is not None:
        status["quality"] = quality_status(traffic.quality)
    if old_status.get("decisions"):
        status["decisions"] = old_status["decisions"]
    return status


def _changes(old: Mapping[str, Any], traffic: TrafficFacts | None) -> list[str]:
    """The last changes of the predictor: those that status told, and what pods know beyond.

    A pod forgets with its memory, and there may be none; the time at the front orders them.
    """
    known = (old.get("predictor") or {}).get("changes") or []
    retraining = traffic.retraining if traffic is not None else None
    new = retraining.changes if retraining is not None else ()
    return sorted(dict.fromkeys((*known, *new)), key=lambda text: text[:20])[-CHANGES_KEPT:]


def _used(router: Router) -> list[str]:
    return list(dict.fromkeys(t.model_ref.name for t in router.spec.tiers if t.model_ref))


def _duration(seconds: float) -> str:
    """A duration with two significant digits, so that noise does not rewrite the status."""
    return f"{float(f'{1000 * seconds:.2g}'):g}ms"


def _slo(
    conditions: Conditions,
    router: Router,
    models: Mapping[str, Model],
    model_objects: Mapping[str, Object],
    traffic: TrafficFacts | None,
) -> None:
    """The share of requests that met each target, against the stated percentile."""
    total = 0
    for name, facts in (traffic.tiers if traffic else {}).items():
        for seen, target, what in (
            (facts.ttft, router.spec.slo.ttft, "TTFT"),
            (facts.tpot, router.spec.slo.tpot, "TPOT"),
        ):
            if seen is None or target is None:
                continue
            total += seen.num
            if 100 * seen.num_met < target.percentile * seen.num:
                text = (
                    f"tier {name}: {what} p{target.percentile} is {_duration(seen.value_s)} over "
                    f"the last {seen.num} requests, target {target.target}"
                )
                remedy = _remedy(router, name, what, models, model_objects)
                conditions.add("SLOMet", False, "Missed", f"{text}; {remedy}")
                return
    if total:
        conditions.add("SLOMet", True, "Met", "all tiers answer within their targets")
    else:
        conditions.add("SLOMet", None, "NoTraffic", "nothing was measured in the last five minutes")


def _remedy(
    router: Router,
    name: str,
    what: str,
    models: Mapping[str, Model],
    model_objects: Mapping[str, Object],
) -> str:
    """What helps a tier that misses its target: more workers only where there may be more."""
    tier = next((t for t in router.spec.tiers if t.name == name), None)
    if tier is None or tier.model_ref is None:
        return "its provider is late: allow it a smaller maxShare, or a longer target"
    model = models.get(tier.model_ref.name)
    status = (model_objects.get(tier.model_ref.name) or {}).get("status") or {}
    counts = {entry["role"]: entry["wanted"] for entry in status.get("roles") or []}
    concerned = ("prefill", "unified") if what == "TTFT" else ("decode", "unified")
    for role, spec in (model.spec.roles() if model is not None else {}).items():
        most = spec.max_replicas
        if role in concerned and most is not None and counts.get(role, 0) >= most:
            return (
                f"Model {tier.model_ref.name} has its {most} {role} workers, no more are allowed: "
                "raise maxReplicas, or the target"
            )
    if router.spec.scaling.mode == "Managed":
        return "the control loop sizes its pools: status.decisions say what it does"
    return "add workers"


def _tiers(
    router: Router,
    wanted: Mapping[str, Model],
    models: Mapping[str, Object],
    traffic: TrafficFacts | None,
    measured: Mapping[str, TokenPrice],
) -> tuple[list[Object], bool]:
    tiers = []
    for tier in router.spec.tiers:
        ready = True
        if tier.model_ref is not None:
            ready = _model_ready(models.get(tier.model_ref.name))
        entry: Object = {
            "name": tier.name,
            "ready": ready,
            "tokenPrices": token_prices(tier, wanted, measured),
        }
        if (known := measured.get(tier.name)) is not None:
            entry["usdPer1MInputTokens"] = f"{known.usd_per_1m_input_tokens:g}"
            entry["usdPer1MOutputTokens"] = f"{known.usd_per_1m_output_tokens:g}"
        if tier.model_ref is not None and (price := _price_of(models.get(tier.model_ref.name))):
            entry["usdPerHour"] = price
        facts = traffic.tiers.get(tier.name, TierFacts()) if traffic else TierFacts()
        if facts.share is not None:
            entry["share"] = f"{facts.share:.2f}"
        if facts.ttft is not None:
            entry["ttft"] = _duration(facts.ttft.value_s)
        if facts.tpot is not None:
            entry["tpot"] = _duration(facts.tpot.value_s)
        tiers.append(entry)
    return tiers, any(t["ready"] for t in tiers)


def _model_ready(model: Object | None) -> bool:
    conditions = ((model or {}).get("status") or {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _tier_blocker(router: Router, models: Mapping[str, Object]) -> Blocker:
    for name in _used(router):
        status = (models.get(name) or {}).get("status") or {}
        for c in status.get("conditions") or []:
            if c["type"] == "Ready" and c["status"] != "True":
                return Blocker(c["reason"], f"Model {name}: {c.get('message', '')}")
    return Blocker("Starting", "no tier is ready")


def _durable(conditions: Conditions, traffic: TrafficFacts | None) -> None:
    """Whether spend, decisions and keys outlive the router pods."""
    store = traffic.store if traffic is not None else None
    if store is None:
        conditions.add("Durable", None, "NotKnown", "no router pod has told of its store yet")
    elif not store.durable:
        text = "spend, decisions and minted keys are gone with the router pods; set spec.store"
        conditions.add("Durable", False, "NotDurable", text)
    elif not store.ok:
        text = f"the {store.kind} store takes nothing, requests go on: {store.error}"
        conditions.add("Durable", False, "StoreUnavailable", text[:1000])
    else:
        text = f"spend, decisions and keys are kept in {store.kind}"
        conditions.add("Durable", True, "Kept", text)


def _cascade(conditions: Conditions, traffic: TrafficFacts | None) -> None:
    """Whether answers can be read before they are sent, and how often that changed something."""
    facts = traffic.cascade if traffic is not None else None
    if facts is None:
        text = "no router pod has told of its cascade yet"
        conditions.add("CascadeReady", None, "NotKnown", text)
    elif facts.problem:
        conditions.add("CascadeReady", False, "NoVerifier", facts.problem)
    else:
        zones, outcomes = sum(facts.zones.values()), sum(facts.outcomes.values())
        text = "answers in the middle zone are read before they are sent"
        if zones and outcomes:
            read, replaced = facts.zones.get("verify", 0), facts.outcomes.get("escalated", 0)
            text += f"; {read / zones:.0%} of requests so far, {replaced / outcomes:.0%} of these "
            text += "answers were replaced"
        if facts.judge_problem:
            text += f"; {facts.judge_problem}"
        conditions.add("CascadeReady", True, "Reading", text)


def _budget(
    conditions: Conditions,
    router: Router,
    models: Mapping[str, Model],
    objects: Mapping[str, Object],
) -> None:
    budget = router.spec.budget
    gpus, price = _sum_gpus(router, objects), _router_price(router, objects)
    if missing_models(router, models):
        conditions.add("WithinBudget", None, "Unknown", "not every Model exists")
    elif budget.gpus is not None and gpus > budget.gpus:
        text = f"{gpus} GPUs in use, budget {budget.gpus}; lower replicas or raise budget.gpus"
        conditions.add("WithinBudget", False, "OverGPUs", text)
    elif budget.usd_per_hour is not None and price is None:
        unpriced = [n for n in _used(router) if usd_per_hour(models[n]) is None]
        text = f"Model {', '.join(unpriced) or '?'} has a role without usdPerHour"
        conditions.add("WithinBudget", None, "Unpriced", text)
    elif budget.usd_per_hour is not None and (price or 0.0) > float(budget.usd_per_hour):
        text = (
            f"${money(price or 0.0)}/h in use, budget ${budget.usd_per_hour}/h; lower replicas "
            "or raise budget.usdPerHour"
        )
        conditions.add("WithinBudget", False, "OverSpend", text)
    else:
        conditions.add("WithinBudget", True, "WithinBudget", "workers cost less than the budget")


def _sum_gpus(router: Router, models: Mapping[str, Object]) -> int:
    return sum(
        int(((models.get(n) or {}).get("status") or {}).get("gpus") or 0) for n in _used(router)
    )


def _price_of(model: Object | None) -> str | None:
    price: str | None = ((model or {}).get("status") or {}).get("usdPerHour")
    return price


def _router_price(router: Router, models: Mapping[str, Object]) -> float | None:
    total = 0.0
    for name in _used(router):
        price = _price_of(models.get(name))
        if price is None:
            return None
        total += float(price)
    return total


def service_endpoint(router: Router, cluster_domain: str) -> str:
    """The base URL of a Router inside a Kubernetes cluster."""
    name = service_name(router_name(router.metadata.name))
    namespace = router.metadata.namespace
    return f"http://{name}.{namespace}.svc.{cluster_domain}:{router.spec.port}"
