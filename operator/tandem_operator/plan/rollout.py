"""How a rollout goes on where the new worker finds no room beside the old one.

A worker more than wanted, then one less, is the gentle way; where all GPUs are taken, that
waits for ever. Then, unless the Model forbids it, one old worker goes first, but never the last.
"""

from __future__ import annotations

from collections.abc import Iterable

from tandem_operator.plan.objects import REVISION_LABEL, ROLE_LABEL
from tandem_operator.plan.scheduling import gpu_resource_of, unschedulable
from tandem_operator.resources import Model
from tandem_operator.resources.base import Object


def max_unavailable(
    model: Model,
    role: str,
    replicas: int,
    revision: str,
    pods: Iterable[Object],
    deployment: Object | None,
) -> int:
    """Workers of a role that its Deployment may miss now.

    pods: all of the Model's; deployment: the role's, as it was seen.
    """
    given = model.spec.rollout.max_unavailable
    if given is not None:
        return given
    if replicas < 2:
        return 0
    own = _of_role(pods, role)
    if _waiting(own, revision) is not None:
        return 1
    # Once begun it stays so to the end of the rollout: each next worker would wait again.
    rolling = ((deployment or {}).get("spec") or {}).get("strategy") or {}
    begun = (rolling.get("rollingUpdate") or {}).get("maxUnavailable") == 1
    return int(begun and any(_revision(p) != revision for p in own))


def stuck(model: Model, role: str, replicas: int, revision: str, pods: Iterable[Object]) -> str:
    """What to say of a role whose new worker waits for the room of an old one; empty where none."""
    pod = _waiting(_of_role(pods, role), revision)
    if pod is None:
        return ""
    room = "a GPU" if gpu_resource_of(pod) in (unschedulable(pod) or "") else "room"
    text = f"the new {role} worker {pod['metadata']['name']} waits for {room} that an old one holds"
    given = model.spec.rollout.max_unavailable
    if given is None and replicas >= 2:
        return f"{text}; one of the old ones goes first"
    if given:
        return text
    why = "rollout.maxUnavailable is 0" if given == 0 else "the only ready worker is not taken down"
    return f"{text}; {why}: add nodes, or set rollout.maxUnavailable: 1 to do without it meanwhile"


def _of_role(pods: Iterable[Object], role: str) -> list[Object]:
    return [p for p in pods if p["metadata"]["labels"].get(ROLE_LABEL) == role]


def _revision(pod: Object) -> str:
    return str(pod["metadata"]["labels"].get(REVISION_LABEL))


def _waiting(pods: list[Object], revision: str) -> Object | None:
    """A pod of the revision without room, while pods of others stay where they are."""
    if any(p["metadata"].get("deletionTimestamp") for p in pods):
        return None  # whoever goes makes room
    new = [p for p in pods if _revision(p) == revision]
    held = any(_revision(p) != revision and p["spec"].get("nodeName") for p in pods)
    if not held:
        return None
    return next((p for p in new if "Insufficient" in (unschedulable(p) or "")), None)
