"""Pure status: what was observed becomes conditions, columns and the first blocking cause."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tandem_operator.plan.model import bounded, pool_name
from tandem_operator.plan.objects import (
    REVISION_LABEL,
    ROLE_LABEL,
    SCALED_ANNOTATION,
    SEEDED_ANNOTATION,
    Object,
    Plan,
)
from tandem_operator.plan.router import missing_models, router_name, usd_per_hour
from tandem_operator.resources import Model, Router
from tandem_operator.resources.base import seconds

MAX_MESSAGE = 1024


@dataclass(frozen=True)
class Blocker:
    """Why a pod is not ready."""

    reason: str
    message: str


@dataclass(frozen=True)
class LinkTest:
    """Result of pushing one KV block from a prefill to a decode worker; None: not tested yet."""

    ok: bool | None
    message: str = ""


@dataclass(frozen=True)
class TierFacts:
    """What routers measured for one tier: share of requests and smoothed latencies in seconds."""

    share: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True)
class TrafficFacts:
    """What the pods of a Router measured, and what its predictor expects of recent answers.

    Ratios are fractions of the last tier's quality: with the choices as they were, and with as many
    requests for each tier whatever is in them.
    """

    predictor: str = ""
    threshold: float | None = None
    quality_ratio: float | None = None
    content_blind_quality_ratio: float | None = None
    tiers: Mapping[str, TierFacts] = field(default_factory=dict)


def is_ready(pod: Object) -> bool:
    """Whether a pod is ready and not about to go."""
    if pod["metadata"].get("deletionTimestamp"):
        return False
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def asleep(models: Iterable[Object]) -> bool:
    """Whether there are Models and none of them wants a worker."""
    roles = [role for m in models for role in (m.get("status") or {}).get("roles") or []]
    return bool(roles) and all(role["wanted"] == 0 for role in roles)


def gpus_of_pod(pod: Object) -> int:
    """GPUs that the pod's containers hold, a count."""
    total = 0
    for container in pod["spec"].get("containers", []):
        limits = (container.get("resources") or {}).get("limits") or {}
        total += int(limits.get("nvidia.com/gpu", 0))
    return total


# Most basic first: the first one that holds for any pod is the one to show.
_ORDER = (
    "InsufficientGPU",
    "Unschedulable",
    "VolumeMissing",
    "ImagePull",
    "WeightsDownload",
    "PredictorTraining",
    "EngineCrash",
    "RouterCrash",
    "Starting",
)


def blocker(pod: Object) -> Blocker | None:
    """The cause that keeps one pod from being ready; None for a ready pod."""
    if is_ready(pod):
        return None
    name = pod["metadata"]["name"]
    status = pod.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            message = condition.get("message", "").rstrip(". ")
            if "nvidia.com/gpu" in message:
                return Blocker(
                    "InsufficientGPU",
                    f"pod {name} waits for GPUs: {message}; add GPUs or lower replicas",
                )
            if "persistentvolumeclaim" in message.lower():
                text = f"pod {name} has no node: {message}; create the claim or correct its name"
                return Blocker("VolumeMissing", text)
            return Blocker("Unschedulable", f"pod {name} has no node: {message}")
    for entry in status.get("initContainerStatuses") or []:
        state = entry.get("state") or {}
        if (state.get("terminated") or {}).get("exitCode") == 0:
            continue
        if "waiting" not in state and "running" not in state and "terminated" not in state:
            continue
        if found := _waiting(name, entry):
            if found.reason == "EngineCrash":
                return Blocker(_init_reason(entry["name"]), found.message)
            return found
        return Blocker(_init_reason(entry["name"]), f"pod {name}: {entry['name']} is running")
    for entry in status.get("containerStatuses") or []:
        if found := _waiting(name, entry):
            return found
    return Blocker("Starting", f"pod {name} is starting")


def _init_reason(container: str) -> str:
    return {"fetch-weights": "WeightsDownload", "train-predictor": "PredictorTraining"}.get(
        container, "Starting"
    )


def _waiting(pod: str, entry: Object) -> Blocker | None:
    state, last = entry.get("state") or {}, entry.get("lastState") or {}
    waiting = state.get("waiting") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    if reason in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName"):
        return Blocker("ImagePull", f"pod {pod}: {message or reason}")
    if reason in ("FailedMount", "CreateContainerConfigError"):
        return Blocker("VolumeMissing", f"pod {pod}: {message}")
    ended = state.get("terminated") or last.get("terminated") or {}
    if ended.get("exitCode", 0) != 0 or reason in ("CrashLoopBackOff", "CreateContainerError"):
        detail = ended.get("message") or message or f"exit code {ended.get('exitCode')}"
        kind = "RouterCrash" if entry["name"] == "router" else "EngineCrash"
        count = entry.get("restartCount", 0)
        return Blocker(kind, f"pod {pod}, restarted {count} times: {detail}; its log says more")
    return None


def first_blocker(pods: Iterable[Object]) -> Blocker | None:
    """The most basic cause over all pods that are meant to stay."""
    found = [
        b
        for pod in pods
        if not pod["metadata"].get("deletionTimestamp")
        for b in [blocker(pod)]
        if b is not None
    ]
    return min(found, key=lambda b: _ORDER.index(b.reason), default=None)


def condition(
    old: Iterable[Mapping[str, Any]],
    kind: str,
    status: str,
    reason: str,
    message: str,
    *,
    generation: int,
    now: str,
) -> Object:
    """A condition; its transition time is kept while its status stays."""
    before = next((c for c in old if c.get("type") == kind), None)
    changed = before is None or before.get("status") != status
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message[:MAX_MESSAGE],
        "lastTransitionTime": now if changed or before is None else before["lastTransitionTime"],
        "observedGeneration": generation,
    }


class _Conditions:
    """Collects conditions in order."""

    def __init__(self, old: Iterable[Mapping[str, Any]], generation: int, now: str) -> None:
        self._old, self._generation, self._now = list(old), generation, now
        self.items: list[Object] = []

    def add(self, kind: str, ok: bool | None, reason: str, message: str = "") -> None:
        status = "Unknown" if ok is None else "True" if ok else "False"
        self.items.append(
            condition(
                self._old,
                kind,
                status,
                reason,
                message,
                generation=self._generation,
                now=self._now,
            )
        )


def money(value: float) -> str:
    """US dollars as a decimal string without needless digits."""
    return f"{value:.4f}".rstrip("0").rstrip(".") or "0"


def model_status(
    model: Model,
    old_status: Mapping[str, Any],
    plan: Plan,
    revision: str,
    pools: Mapping[str, Object],
    pods: list[Object],
    link: LinkTest,
    now: str,
    refused: Blocker | None = None,
) -> Object:
    """The status of a Model.

    pools: WorkerPools by name; pods: all of the Model's pods; refused: why it gets no more of them.
    """
    conditions = _Conditions(old_status.get("conditions") or [], model.metadata.generation, now)
    problem = next((p for p in plan.problems if p.condition == "Accepted"), None)
    if problem:
        conditions.add("Accepted", False, problem.reason, problem.message)
    else:
        conditions.add("Accepted", True, "Valid", "the specification can be run")
    roles: list[Object] = []
    blocking: Blocker | None = Blocker(problem.reason, problem.message) if problem else None
    running = wanted_total = ready_total = gpus = 0
    for role in model.spec.roles():
        pool = pools.get(pool_name(model.metadata.name, role))
        wanted = bounded(pool["spec"]) if pool else model.spec.roles()[role].replicas
        own = [p for p in pods if p["metadata"]["labels"].get(ROLE_LABEL) == role]
        ready = [p for p in own if is_ready(p)]
        updated = [p for p in own if p["metadata"]["labels"].get(REVISION_LABEL) == revision]
        live = [p for p in own if not p["metadata"].get("deletionTimestamp")]
        roles.append({"role": role, "wanted": wanted, "ready": len(ready), "updated": len(updated)})
        gpus += sum(gpus_of_pod(p) for p in live)
        running += len(live)
        wanted_total += wanted
        ready_total += len(ready)
    weights_bad = first_blocker(pods)
    current = [p for p in pods if p["metadata"]["labels"].get(REVISION_LABEL) == revision]
    cause = refused or first_blocker(current) or weights_bad
    if cause and cause.reason in ("WeightsDownload", "VolumeMissing"):
        conditions.add("WeightsReady", False, cause.reason, cause.message)
    elif ready_total:
        conditions.add("WeightsReady", True, "Loaded", "a worker has loaded them")
    else:
        conditions.add("WeightsReady", None, "NotLoaded", "no worker has loaded them yet")
    names = {"unified": "DecodeReady", "prefill": "PrefillReady", "decode": "DecodeReady"}
    for entry in roles:
        role, ready_count, wanted = entry["role"], entry["ready"], entry["wanted"]
        text = f"{ready_count} of {wanted} {role} workers are ready"
        if wanted == 0:
            zero = (
                f"no {role} worker is wanted; scale workerpool "
                f"{pool_name(model.metadata.name, role)} to 1 or more"
            )
            conditions.add(names[role], False, "ScaledToZero", zero)
            blocking = blocking or Blocker("ScaledToZero", zero)
        elif ready_count >= 1:
            conditions.add(names[role], True, "WorkersReady", text)
        else:
            own = [p for p in pods if p["metadata"]["labels"].get(ROLE_LABEL) == role]
            why = first_blocker(own) or refused or Blocker("Starting", text)
            conditions.add(names[role], False, why.reason, why.message)
    if "unified" in model.spec.roles():
        conditions.add("KVLinkReady", True, "NotNeeded", "unified workers transfer nothing")
    elif link.ok is None:
        conditions.add("KVLinkReady", None, "NotTested", link.message or "needs both roles ready")
    else:
        reason = "BlockTransferred" if link.ok else "KVLinkFailed"
        conditions.add("KVLinkReady", link.ok, reason, link.message)
    rolled = all(e["updated"] >= e["wanted"] and e["ready"] >= e["wanted"] for e in roles)
    rolled = rolled and running == wanted_total
    if rolled:
        conditions.add("Progressing", False, "Complete", "all workers are on the current revision")
    else:
        updated_total = sum(e["updated"] for e in roles)
        text = f"{ready_total} of {wanted_total} workers ready, {updated_total} updated"
        conditions.add("Progressing", True, "RollingOut", text)
    short = next((e for e in roles if e["wanted"] > 0 and e["ready"] == 0), None)
    if blocking is None and short is not None:
        blocking = cause or Blocker("Starting", f"waiting for the first {short['role']} worker")
    if blocking is None and link.ok is False:
        blocking = Blocker("KVLinkFailed", link.message)
    if blocking is None:
        text = f"{ready_total} of {wanted_total} workers are ready"
        if cause is not None and cause.reason != "Starting":
            text = f"{text}; {cause.message}"
        conditions.add("Ready", True, "Serving", text)
    else:
        conditions.add("Ready", False, blocking.reason, blocking.message)
    status: Object = {
        "observedGeneration": model.metadata.generation,
        "conditions": conditions.items,
        "revision": revision,
        "roles": roles,
        "ready": f"{ready_total}/{wanted_total}",
        "gpus": gpus,
        "message": conditions.items[-1]["message"],
    }
    if (price := _model_price(model, roles)) is not None:
        status["usdPerHour"] = money(price)
    return status


def _model_price(model: Model, roles: list[Object]) -> float | None:
    total = 0.0
    for entry in roles:
        price = model.spec.roles()[entry["role"]].usd_per_hour
        if price is None:
            return None
        total += float(price) * entry["wanted"]
    return total


def _beyond(pool: Object, asked: int, wanted: int) -> str:
    """What to say of a count that the bounds do not allow."""
    if asked == wanted:
        return ""
    bound, role = ("maxReplicas" if asked > wanted else "minReplicas"), pool["spec"]["role"]
    model = pool["spec"]["modelRef"]["name"]
    return f"; {asked} were asked for, {bound} of {role} in Model {model} is {wanted}"


def pool_status(pool: Object, pods: list[Object], selector: str, now: str) -> Object:
    """The status of a WorkerPool from the pods of its role."""
    old = pool.get("status") or {}
    live = [p for p in pods if not p["metadata"].get("deletionTimestamp")]
    ready = sum(is_ready(p) for p in live)
    wanted, asked = bounded(pool["spec"]), int(pool["spec"].get("replicas", 1))
    generation = int(pool["metadata"].get("generation", 1))
    status: Object = {
        "observedGeneration": generation,
        "replicas": len(live),
        "readyReplicas": ready,
        "selector": selector,
        "conditions": [
            condition(
                old.get("conditions") or [],
                "Ready",
                "True" if ready >= wanted else "False",
                "WorkersReady" if ready >= wanted else "Scaling",
                f"{ready} of {wanted} workers are ready{_beyond(pool, asked, wanted)}",
                generation=generation,
                now=now,
            )
        ],
    }
    last = old.get("lastScale") or {}
    annotations = pool["metadata"].get("annotations") or {}
    seeded = annotations.get(SEEDED_ANNOTATION)
    before = last.get("after", wanted if seeded is None else int(seeded))
    if before != wanted:
        by_model = seeded == str(wanted)
        reason = "the Model's replicas changed" if by_model else "set through /scale"
        step, _, said = annotations.get(SCALED_ANNOTATION, "").partition(" ")
        if step == f"{before}>{wanted}":
            reason = said[:MAX_MESSAGE]
        last = {"time": now, "before": before, "after": wanted, "reason": reason}
    if last:
        status["lastScale"] = last
    return status


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
) -> Object:
    """The status of a Router.

    model_objects: the raw Models with their status, by name. traffic: what its pods measured.
    refused_pods: why it gets no more of them.
    """
    conditions = _Conditions(old_status.get("conditions") or [], router.metadata.generation, now)
    problems = {p.condition: p for p in reversed(plan.problems)}
    blocking: Blocker | None = None
    if refused := problems.get("Accepted"):
        conditions.add("Accepted", False, refused.reason, refused.message)
        blocking = Blocker(refused.reason, refused.message)
    else:
        conditions.add("Accepted", True, "Valid", "the specification can be run")
    if unresolved := problems.get("ModelsResolved"):
        conditions.add("ModelsResolved", False, unresolved.reason, unresolved.message)
        blocking = blocking or Blocker(unresolved.reason, unresolved.message)
    else:
        conditions.add("ModelsResolved", True, "Found", "every tier's Model exists")
    ready_pods = [p for p in pods if is_ready(p)]
    cause = refused_pods or first_blocker(pods)
    if router.spec.predictor.type != "Learned":
        chosen = router.spec.predictor.type
        conditions.add("PredictorReady", True, chosen, f"type {chosen} needs no artifact")
    elif cause and cause.reason in ("PredictorTraining", "VolumeMissing") and not ready_pods:
        conditions.add("PredictorReady", False, cause.reason, cause.message)
    elif ready_pods:
        conditions.add("PredictorReady", True, "Loaded", "a router pod has loaded it")
    else:
        conditions.add("PredictorReady", None, "NotLoaded", "no router pod has loaded it yet")
    tiers, any_ready = _tiers(router, model_objects, traffic)
    for kind, unset in (
        ("SLOMet", router.spec.slo.ttft is None and router.spec.slo.tpot is None),
        ("WithinBudget", router.spec.budget.usd_per_hour is None),
    ):
        if unset and not (kind == "WithinBudget" and router.spec.budget.gpus is not None):
            conditions.add(kind, True, "NoneSet", "no target is set")
        elif kind == "WithinBudget":
            _budget(conditions, router, models, model_objects)
        else:
            _slo(conditions, router, traffic)
    wanted = router.spec.replicas
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
        reason = "Degraded" if waiting else "Serving"
        conditions.add("Ready", True, reason, text)
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
        if traffic.quality_ratio is not None:
            status["predictor"]["qualityRatio"] = f"{traffic.quality_ratio:.2f}"
        if traffic.content_blind_quality_ratio is not None:
            blind = f"{traffic.content_blind_quality_ratio:.2f}"
            status["predictor"]["baselineQualityRatio"] = blind
    if old_status.get("decisions"):
        status["decisions"] = old_status["decisions"]
    return status


def _used(router: Router) -> list[str]:
    return list(dict.fromkeys(t.model_ref.name for t in router.spec.tiers if t.model_ref))


def _duration(seconds: float) -> str:
    """A duration with two significant digits, so that noise does not rewrite the status."""
    return f"{float(f'{1000 * seconds:.2g}'):g}ms"


def _slo(conditions: _Conditions, router: Router, traffic: TrafficFacts | None) -> None:
    """Smoothed latencies of the tiers in use against the targets."""
    measured = False
    for name, facts in (traffic.tiers if traffic else {}).items():
        for value, target, what in (
            (facts.ttft_s, router.spec.slo.ttft, "TTFT"),
            (facts.tpot_s, router.spec.slo.tpot, "TPOT"),
        ):
            if value is None or target is None:
                continue
            measured = True
            if value > seconds(target.target):
                text = f"tier {name}: {what} {_duration(value)}, target {target.target}"
                conditions.add("SLOMet", False, "Missed", f"{text}; add workers")
                return
    if measured:
        conditions.add("SLOMet", True, "Met", "all tiers answer within their targets")
    else:
        conditions.add("SLOMet", None, "NoTraffic", "nothing was measured yet")


def _tiers(
    router: Router, models: Mapping[str, Object], traffic: TrafficFacts | None
) -> tuple[list[Object], bool]:
    tiers = []
    for tier in router.spec.tiers:
        ready = True
        if tier.model_ref is not None:
            ready = _model_ready(models.get(tier.model_ref.name))
        entry: Object = {"name": tier.name, "ready": ready}
        if tier.model_ref is not None and (price := _price_of(models.get(tier.model_ref.name))):
            entry["usdPerHour"] = price
        facts = traffic.tiers.get(tier.name, TierFacts()) if traffic else TierFacts()
        if facts.share is not None:
            entry["share"] = f"{facts.share:.2f}"
        if facts.ttft_s is not None:
            entry["ttft"] = _duration(facts.ttft_s)
        if facts.tpot_s is not None:
            entry["tpot"] = _duration(facts.tpot_s)
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


def _budget(
    conditions: _Conditions,
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
    name = router_name(router.metadata.name)
    namespace = router.metadata.namespace
    return f"http://{name}.{namespace}.svc.{cluster_domain}:{router.spec.port}"
