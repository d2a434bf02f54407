"""Reads the ConfigMap of a Router's predictor where its copy is not of the newest version."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tandem_operator.plan.objects import Problem
from tandem_operator.plan.predictor_copy import (
    COPIED_ANNOTATION,
    copied_at,
    copied_source,
    copy_name,
    is_current,
    missing_copy,
    missing_key,
    planned_copy,
)
from tandem_operator.reconcile.cluster_api import ClusterApi
from tandem_operator.resources import Router
from tandem_operator.resources.base import Object

# A kubelet shows a running pod what changed in its volumes at once when the pod is touched, and
# within a minute or two otherwise.
TOUCH_ANNOTATION = "tandem.dev/predictor-copied"


@dataclass(frozen=True)
class PredictorSource:
    """The copy to keep, what keeps it from being what the Router names, whether it is new."""

    copy: Object | None = None
    problem: Problem | None = None
    is_new: bool = False


async def predictor_source(
    api: ClusterApi, router: Router, children: Iterable[Object], now: str
) -> PredictorSource:
    """What a Router's copy should hold; nothing where its artifact is in no ConfigMap.

    Of a ConfigMap that was copied before only the version is asked for. While it, or its key, is
    missing the copy stays, and so does what the router pods read from it.
    """
    wanted = copied_source(router)
    if wanted is None:
        return PredictorSource()
    (name, key), namespace = wanted, router.metadata.namespace
    own = copy_name(router.metadata.name)
    held = next(
        (c for c in children if c["kind"] == "ConfigMap" and c["metadata"]["name"] == own), None
    )
    version = await api.version("ConfigMap", namespace, name) if name != own else None
    if version is not None and held is not None and is_current(held, name, version):
        copy = planned_copy(router, name, version, held, copied_at(held))
        return PredictorSource(copy, missing_key(name, key, held))
    found = await api.named("ConfigMap", namespace, name) if version is not None else None
    if found is None:
        return PredictorSource(problem=missing_copy(name, own))
    if (keyless := missing_key(name, key, found)) is not None:
        return PredictorSource(problem=keyless)
    copy = planned_copy(router, name, found["metadata"]["resourceVersion"], found, now)
    return PredictorSource(copy, is_new=True)


async def show_at_once(api: ClusterApi, copy: Object, pods: Iterable[Object]) -> int:
    """Let kubelets show a copy now to pods that are older than it; the number of writes."""
    shown = copy["metadata"]["annotations"][COPIED_ANNOTATION].rpartition(" ")[2]
    touched = 0
    for pod in pods:
        metadata = pod["metadata"]
        known = (metadata.get("annotations") or {}).get(TOUCH_ANNOTATION)
        younger = str(metadata.get("creationTimestamp", "")) >= copied_at(copy)
        if metadata.get("deletionTimestamp") or younger or known == shown:
            continue
        mark = {TOUCH_ANNOTATION: shown}
        await api.annotate("Pod", metadata["namespace"], metadata["name"], mark)
        touched += 1
    return touched
