"""Pure status of a Model and its WorkerPools: conditions, counts, the first blocking cause."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tandem_operator.plan.conditions import MAX_MESSAGE, Conditions, condition
from tandem_operator.plan.model import bounded, pool_name
from tandem_operator.plan.objects import (
    REVISION_LABEL,
    ROLE_LABEL,
    SCALED_ANNOTATION,
    SEEDED_ANNOTATION,
    Plan,
)
from tandem_operator.plan.pods import NO_CLAIMS, Blocker, first_blocker, is_ready
from tandem_operator.plan.rollout import stuck
from tandem_operator.plan.scheduling import Claims, gpus_of_pod
from tandem_operator.resources import Model
from tandem_operator.resources.base import Object, money


@dataclass(frozen=True)
class LinkTest:
    """Result of pushing one KV block from a prefill to a decode worker; None: not tested yet."""

    ok: bool | None
    message: str = ""


@dataclass(frozen=True)
class Remark:
    """What a worker cannot be used for (problem), and what people should know of it (notes)."""

    problem: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """What a worker says its lossy settings cost: exact, within_loss or not_measured, and why."""

    state: str
    message: str = ""


@dataclass(frozen=True)
class WorkerReports:
    """What ready pods say, by name: the identity of their weights, remarks, and lossy settings."""

    weights: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    remarks: Mapping[str, Remark] = field(default_factory=dict)
    measured: Mapping[str, Measured] = field(default_factory=dict)


SILENT = WorkerReports()


def asleep(models: Iterable[Object]) -> bool:
    """Whether there are Models and none of them wants a worker."""
    roles = [role for m in models for role in (m.get("status") or {}).get("roles") or []]
    return bool(roles) and all(role["wanted"] == 0 for role in roles)


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
    reports: WorkerReports = SILENT,
    claims: Claims = NO_CLAIMS,
) -> Object:
    """The status of a Model.

    pools: WorkerPools by name; pods: all of the Model's pods; refused: why it gets no more of them;
    reports: of ready pods; claims: its own PersistentVolumeClaims by name.
    """
    conditions = Conditions(old_status.get("conditions") or [], model.metadata.generation, now)
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
    weights_bad = first_blocker(pods, claims)
    current = [p for p in pods if p["metadata"]["labels"].get(REVISION_LABEL) == revision]
    cause = refused or first_blocker(current, claims) or weights_bad
    if cause and cause.reason in ("WeightsDownload", "WeightsUnusable", "VolumeMissing"):
        conditions.add("WeightsReady", False, cause.reason, cause.message)
    elif different := _different(reports.weights):
        conditions.add("WeightsReady", False, "WeightsDiffer", different)
    elif ready_total:
        conditions.add("WeightsReady", True, "Loaded", "a worker has loaded them")
    else:
        conditions.add("WeightsReady", None, "NotLoaded", "no worker has loaded them yet")
    _add_qualified(conditions, cause, reports.measured.values())
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
            why = first_blocker(own, claims) or refused or Blocker("Starting", text)
            conditions.add(names[role], False, why.reason, why.message)
    if "unified" in model.spec.roles():
        conditions.add("KVLinkReady", True, "NotNeeded", "unified workers transfer nothing")
    elif link.ok is None:
        conditions.add("KVLinkReady", None, "NotTested", link.message or "needs both roles ready")
    else:
        reason = "BlockTransferred" if link.ok else "KVLinkFailed"
        conditions.add("KVLinkReady", link.ok, reason, link.message)
    waiting = [
        text
        for e in roles
        if (text := stuck(model, e["role"], e["wanted"], revision, pods)) and revision
    ]
    rolled = all(e["updated"] >= e["wanted"] and e["ready"] >= e["wanted"] for e in roles)
    rolled = rolled and running == wanted_total
    if rolled:
        conditions.add("Progressing", False, "Complete", "all workers are on the current revision")
    else:
        updated_total = sum(e["updated"] for e in roles)
        text = f"{ready_total} of {wanted_total} workers ready, {updated_total} updated"
        reason = "WaitingForRoom" if waiting else "RollingOut"
        conditions.add("Progressing", True, reason, "; ".join([text, *waiting]))
    short = next((e for e in roles if e["wanted"] > 0 and e["ready"] == 0), None)
    if blocking is None and short is not None:
        blocking = cause or Blocker("Starting", f"waiting for the first {short['role']} worker")
    unfit = [f"pod {pod} {r.problem}" for pod, r in sorted(reports.remarks.items()) if r.problem]
    if blocking is None and unfit and len(unfit) == ready_total:
        blocking = Blocker("EngineUnfit", unfit[0])
    if blocking is None and link.ok is False:
        blocking = Blocker("KVLinkFailed", link.message)
    if blocking is None:
        text = f"{ready_total} of {wanted_total} workers are ready"
        if waiting:
            text = "; ".join([text, *waiting])
        elif cause is not None and cause.reason != "Starting":
            text = f"{text}; {cause.message}"
        notes = dict.fromkeys(note for r in reports.remarks.values() for note in r.notes)
        text = "; ".join([text, *unfit, *notes, *plan.notes])
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
    if held := _served(old_status.get("weights"), reports.weights):
        status["weights"] = held
    if (price := _model_price(model, roles)) is not None:
        status["usdPerHour"] = money(price)
    return status


def _served(
    old: Mapping[str, str] | None, held: Mapping[str, Mapping[str, str]]
) -> dict[str, str] | None:
    """What status.weights says: as before while any worker holds that or none says anything."""
    digests = {weights.get("digest") for weights in held.values()}
    if old and (not digests or old.get("digest") in digests):
        return dict(old)
    first = min(held, default=None)
    return dict(held[first]) if first is not None else None


def _add_qualified(
    conditions: Conditions, cause: Blocker | None, measured: Iterable[Measured]
) -> None:
    """Do lossy settings leave the answers as they were?

    A worker that lost too much has ended, so that no router sends to it; whatever served before
    a rollout goes on.
    """
    said = {worker.state: worker.message for worker in measured}
    if cause is not None and cause.reason == "QualityLoss":
        conditions.add("Qualified", False, cause.reason, cause.message)
    elif "not_measured" in said:
        conditions.add("Qualified", None, "NotMeasured", said["not_measured"])
    elif "within_loss" in said:
        conditions.add("Qualified", True, "WithinLoss", said["within_loss"])
    elif "exact" in said:
        conditions.add("Qualified", True, "Exact", said["exact"])
    else:
        text = "no worker has said yet what its settings cost in quality"
        conditions.add("Qualified", None, "NotLoaded", text)


def _different(held: Mapping[str, Mapping[str, str]]) -> str:
    """A sentence when workers hold different weights."""
    by_digest = {weights.get("digest", ""): pod for pod, weights in sorted(held.items())}
    if len(by_digest) < 2:
        return ""
    pods = ", ".join(f"{pod} {digest[:12]}" for digest, pod in sorted(by_digest.items())[:3])
    return (
        f"workers hold {len(by_digest)} different weights ({pods}); prefill and decode workers of "
        "different ones do not pair: delete the pods whose weights are old"
    )


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
    step, _, said = annotations.get(SCALED_ANNOTATION, "").partition(" ")
    known = step.partition(">")[0] if step.endswith(f">{wanted}") else seeded
    before = last.get("after", wanted if known is None else int(known))
    if before != wanted:
        by_model = seeded == str(wanted)
        reason = "the Model's replicas changed" if by_model else "set through /scale"
        if step == f"{before}>{wanted}":
            reason = said[:MAX_MESSAGE]
        last = {"time": now, "before": before, "after": wanted, "reason": reason}
    if last:
        status["lastScale"] = last
    return status


def by_hand(pool: Object, now: str) -> Object:
    """The status of a WorkerPool that no Model has made: no worker follows from it."""
    model, generation = pool["spec"]["modelRef"]["name"], int(pool["metadata"].get("generation", 1))
    text = (
        "no Model has made this WorkerPool, so no worker follows from it; delete it, and scale "
        f"the pools of Model {model} (kubectl get workerpools), or make that Model"
    )
    old = (pool.get("status") or {}).get("conditions") or []
    conditions = [
        condition(old, "Ready", "False", "MadeByHand", text, generation=generation, now=now)
    ]
    return {"observedGeneration": generation, "conditions": conditions}
