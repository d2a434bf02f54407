"""Which ConfigMap or Secret a pod waits for: a kubelet tells that in an Event alone, not in status.

Asked for only while a pod is being created, and never for what the operator makes itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tandem_operator.plan.objects import PEER_SECRET
from tandem_operator.plan.pods import Blocker, blocker
from tandem_operator.reconcile.cluster_api import ClusterApi
from tandem_operator.resources.base import Object


async def missing_source(
    api: ClusterApi, pods: Iterable[Object], children: Iterable[Object], *, ask_secrets: bool
) -> Blocker | None:
    """The first ConfigMap or Secret that a starting pod needs and that does not exist.

    ask_secrets: whether the operator holds the right to look for a Secret.
    """
    ours = {(o["kind"], o["metadata"]["name"]) for o in children} | {("Secret", PEER_SECRET)}
    asked: set[tuple[str, str]] = set()
    for pod in pods:
        found = blocker(pod)
        if found is None or found.reason != "Starting" or not _being_created(pod):
            continue
        namespace = pod["metadata"]["namespace"]
        for key in _sources(pod["spec"]):
            kind, name = key
            if key in ours or key in asked or (kind == "Secret" and not ask_secrets):
                continue
            asked.add(key)
            if kind == "Secret":
                exists = await api.secret_labels(namespace, name) is not None
            else:
                exists = await api.named(kind, namespace, name) is not None
            if not exists:
                text = (
                    f"pod {pod['metadata']['name']} waits for {kind} {name}, which does not exist; "
                    "create it in this namespace, or correct the name"
                )
                return Blocker("VolumeMissing", text)
    return None


def _being_created(pod: Object) -> bool:
    status = pod.get("status") or {}
    entries = [
        *(status.get("initContainerStatuses") or ()),
        *(status.get("containerStatuses") or ()),
    ]
    reasons = [((e.get("state") or {}).get("waiting") or {}).get("reason") for e in entries]
    return bool(pod["spec"].get("nodeName")) and (not reasons or "ContainerCreating" in reasons)


def _sources(spec: Object) -> Iterator[tuple[str, str]]:
    """The ConfigMaps and Secrets that a pod cannot start without."""
    for volume in spec.get("volumes") or []:
        yield from _named("ConfigMap", volume.get("configMap"), "name")
        yield from _named("Secret", volume.get("secret"), "secretName")
    for container in [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]:
        for source in container.get("envFrom") or []:
            yield from _named("ConfigMap", source.get("configMapRef"), "name")
            yield from _named("Secret", source.get("secretRef"), "name")
        for variable in container.get("env") or []:
            source = variable.get("valueFrom") or {}
            yield from _named("ConfigMap", source.get("configMapKeyRef"), "name")
            yield from _named("Secret", source.get("secretKeyRef"), "name")


def _named(kind: str, source: Any, field: str) -> Iterator[tuple[str, str]]:
    if isinstance(source, dict) and not source.get("optional") and source.get(field):
        yield kind, str(source[field])
