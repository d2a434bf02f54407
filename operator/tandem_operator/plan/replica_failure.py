"""Pods that never come to be: admission, a quota or a webhook refuses them.

Such a pod cannot be looked at; the Deployment tells of it in its ReplicaFailure condition.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tandem_operator.plan.pods import Blocker
from tandem_operator.resources.base import Object

_NO_CLASS = re.compile("no PriorityClass with name ([^ ]+) was found")


def refused_pods(children: Iterable[Object]) -> Blocker | None:
    """Why the first Deployment among the children gets no pods; None when none is refused."""
    for child in children:
        if child["kind"] != "Deployment":
            continue
        for condition in (child.get("status") or {}).get("conditions") or []:
            if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
                message = str(condition.get("message", "")).rstrip(". ")
                return Blocker("PodsRefused", f"{message}; {_next_step(message)}")
    return None


def _next_step(message: str) -> str:
    if "hostPath" in message:
        return (
            "file:// needs a namespace that allows hostPath; use image:///, pvc://, hf:// or s3://"
        )
    if "exceeded quota" in message:
        return "raise the ResourceQuota or ask for less in resources and replicas"
    if (missing := _NO_CLASS.search(message)) is not None:
        return (
            f"make PriorityClass {missing[1]}, or name another one in priorityClassName "
            "(kubectl get priorityclass)"
        )
    return "change the pods with podPatch, or what refuses them"
