"""Which resources a changed object concerns: itself, its owner, the Routers that use a Model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tandem_operator.plan.decode import models_of
from tandem_operator.plan.objects import MODEL_LABEL, ROUTER_LABEL
from tandem_operator.reconcile.requeue import Key
from tandem_operator.resources.base import Object

# The kinds that people write, and that passes look at.
RECONCILED = ("Model", "Router", "AutoscalingPolicy")
_OWNER_LABELS = ((MODEL_LABEL, "Model"), (ROUTER_LABEL, "Router"))


def is_controlled(obj: Object) -> bool:
    """Whether an object names a controller; a WorkerPool made by hand names none."""
    return any(owner.get("controller") for owner in obj["metadata"].get("ownerReferences") or [])


def concerned(obj: Object, routers: Callable[[str], Iterable[Object]]) -> list[Key]:
    """The resources to look at after a change of obj, each once.

    routers: the stored Routers of a namespace.
    """
    metadata, kind = obj["metadata"], obj["kind"]
    namespace, labels = metadata["namespace"], metadata.get("labels") or {}
    found: list[Key] = []
    if kind in RECONCILED:
        found.append(Key(kind, namespace, metadata["name"]))
    else:
        found += [Key(o, namespace, labels[label]) for label, o in _OWNER_LABELS if label in labels]
    if kind == "WorkerPool" and not is_controlled(obj):
        found.append(Key(kind, namespace, metadata["name"]))
    if kind == "Model":
        found += [
            Key("Router", namespace, router["metadata"]["name"])
            for router in routers(namespace)
            if metadata["name"] in models_of(router)
        ]
    # A child that lost its labels leaves the selector and still names its owner.
    found += [
        Key(owner["kind"], namespace, owner["name"])
        for owner in metadata.get("ownerReferences") or []
        if owner["kind"] in RECONCILED
    ]
    return list(dict.fromkeys(found))
