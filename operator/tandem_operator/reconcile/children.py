"""The children of a resource: listed, made as planned, and left alone where they are another's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tandem_operator.plan import Plan
from tandem_operator.plan.objects import SCALED_ANNOTATION, owner_labels
from tandem_operator.plan.permissions import taken
from tandem_operator.plan.pods import first_blocker
from tandem_operator.reconcile.cluster_api import ApiError, ClusterApi
from tandem_operator.reconcile.drift import needs_apply, stamp
from tandem_operator.reconcile.refused_children import REFUSED_RETRY_S, refused_child
from tandem_operator.reconcile.requeue import Result
from tandem_operator.resources import Model, Router
from tandem_operator.resources.base import Object

SECRET_RETRY_S = 30.0
UNSEEN_RETRY_S = 1.0

# Kinds of children that are removed when the plan no longer holds them.
PRUNED_KINDS = (
    "Deployment",
    "WorkerPool",
    "Service",
    "ConfigMap",
    "PodDisruptionBudget",
    "NetworkPolicy",
    "ServiceAccount",
    "Role",
    "RoleBinding",
    "Job",
)

# Claims hold downloaded data: compared and made, never removed by the operator.
CLAIM_KIND = "PersistentVolumeClaim"
OBSERVED_KINDS = (*PRUNED_KINDS, CLAIM_KIND)


async def own_children(
    api: ClusterApi, owner: Object, labels: Mapping[str, str], more: Iterable[str] = ()
) -> list[Object]:
    """The resource's own children; what others made is not looked at, whatever its labels.

    more: kinds besides OBSERVED_KINDS that the installation makes.
    """
    namespace, uid = owner["metadata"]["namespace"], owner["metadata"]["uid"]
    found: list[Object] = []
    for kind in (*OBSERVED_KINDS, *more):
        listed = await api.select(kind, namespace, labels)
        for obj in ({**o, "kind": kind} for o in listed):
            if controlled(obj, uid) or kept(obj, labels):
                found.append(obj)
    return found


def kept(obj: Object, labels: Mapping[str, str]) -> bool:
    """Whether an object is a claim with the resource's labels that no owner's end takes away."""
    metadata = obj["metadata"]
    own = metadata.get("labels") or {}
    free = not any(o.get("controller") for o in metadata.get("ownerReferences") or [])
    return obj["kind"] == CLAIM_KIND and free and labels.items() <= own.items()


def claims_of(children: Iterable[Object]) -> dict[str, Object]:
    """The PersistentVolumeClaims among children, by name."""
    found = (o for o in children if o["kind"] == CLAIM_KIND)
    return {o["metadata"]["name"]: o for o in found}


async def apply_plan(
    api: ClusterApi,
    owner: Model | Router,
    plan: Plan,
    children: Iterable[Object],
    pods: list[Object],
    result: Result,
) -> None:
    """Make the cluster hold what the plan says; writes only what differs."""
    if not plan.apply:
        return
    seen = {(o["kind"], o["metadata"]["name"]): o for o in children}
    live = await _standing(api, owner, plan, seen, result)
    if live is None:
        return
    unseen: set[str] = set()
    # The shared Secret is not listed, so it is made first and again when pods may wait for it:
    # a kubelet says no more of a missing volume than that the container is being created.
    cause = first_blocker(pods, claims_of(seen.values()))
    begun = any(kind == "Deployment" for kind, _ in seen)
    whole = begun and not (cause and cause.reason in ("VolumeMissing", "Starting"))
    if begun and not whole:
        result.look_again(SECRET_RETRY_S)
    for obj in plan.create:
        key = (obj["kind"], obj["metadata"]["name"])
        if key in seen or (obj["kind"] == "Secret" and whole):
            continue
        if key in live:
            # There, but not listed: its labels are gone or the list lags. It must be seen
            # before its Deployment gets a count, or a scaled pool would lose its workers.
            unseen.add(key[1])
            continue
        try:
            made = await api.create(obj)
        except ApiError as error:
            _note_refusal(plan, obj, error, result)
            unseen.add(key[1])
            continue
        if made is not None:
            result.writes += 1
            live[key] = made
        elif obj["kind"] == "WorkerPool":
            unseen.add(key[1])
    for scale in plan.scale:
        pool = seen[("WorkerPool", scale.pool)]
        namespace, before = pool["metadata"]["namespace"], int(pool["spec"].get("replicas", 1))
        if before == scale.replicas:
            continue
        # Together, so that whoever sees the new count finds the reason.
        step = {SCALED_ANNOTATION: f"{before}>{scale.replicas} the Model's replicas changed"}
        body = {"metadata": {"annotations": step}, "spec": {"replicas": scale.replicas}}
        await api.merge("WorkerPool", namespace, scale.pool, body)
        result.writes += 1
    for obj in plan.apply:
        key = (obj["kind"], obj["metadata"]["name"])
        if key[1] in unseen and (obj["kind"] == "Deployment" or key not in live):
            result.look_again(UNSEEN_RETRY_S)
            continue
        stamped = stamp(obj)
        if needs_apply(live.get(key), stamped):
            try:
                await api.apply(onto(live.get(key), stamped))
            except ApiError as error:
                _note_refusal(plan, obj, error, result)
            else:
                result.writes += 1
    wanted = {(o["kind"], o["metadata"]["name"]) for o in plan.apply} | plan.keep
    for kind, name in seen.keys() - wanted:
        child = seen[(kind, name)]
        if child["metadata"].get("deletionTimestamp") or kind == CLAIM_KIND:
            continue
        await api.delete(kind, child["metadata"]["namespace"], name)
        result.writes += 1


async def _standing(
    api: ClusterApi,
    owner: Model | Router,
    plan: Plan,
    seen: Mapping[tuple[str, str], Object],
    result: Result,
) -> dict[tuple[str, str], Object] | None:
    """The planned children that exist; None when somebody else's object stands in the way.

    Then the plan holds the problem and nothing is written: half a Model helps nobody.
    """
    live = dict(seen)
    for obj in plan.apply:
        kind, name = key = (obj["kind"], obj["metadata"]["name"])
        if key in live:
            continue
        found = await api.named(kind, obj["metadata"]["namespace"], name)
        if found is None:
            continue
        if not controlled(found, owner.metadata.uid) and not kept(found, owner_labels(owner)):
            plan.problems.insert(0, taken(owner, found))
            plan.apply.clear()
            result.look_again(SECRET_RETRY_S)
            return None
        live[key] = found
    return live


def _note_refusal(plan: Plan, child: Object, error: ApiError, result: Result) -> None:
    """Keep what the apiserver says of a child for the status. Raises the error if it may pass."""
    problem = refused_child(child, error)
    if problem is None:
        raise error
    plan.problems.append(problem)
    result.look_again(REFUSED_RETRY_S)


def controlled(obj: Object, uid: str) -> bool:
    """Whether the resource with this uid is the object's controller."""
    owners = obj["metadata"].get("ownerReferences") or []
    return any(o.get("controller") and o.get("uid") == uid for o in owners)


def onto(live: Object | None, obj: Object) -> Object:
    """What to apply so that it lands on this very object, and not on another one of its name."""
    if live is None:
        return obj
    return {**obj, "metadata": {**obj["metadata"], "uid": live["metadata"]["uid"]}}
