"""Why a pod has no node, without the scheduler's asides, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tandem_operator.resources.base import GPU_RESOURCE, Object

# On a pod whose GPUs nodes offer under another name than GPU_RESOURCE: that name.
GPU_ANNOTATION = "tandem.dev/gpu-resource"

Claims = Mapping[str, Object]

# Of no use to whoever asks why: what the scheduler tried besides.
_ASIDES = re.compile(
    r"[.,]?\s*(no new claims to deallocate,?\s*)?(preemption:.*)?(\. not found)?$", re.DOTALL
)
_NO_CLASS = re.compile(r'storageclass\.storage\.k8s\.io "([^"]*)" not found')
_NO_CLAIM = re.compile(r'persistentvolumeclaim "([^"]*)" not found')

_STEPS = (
    ("untolerated taint", "tolerate the taint in the role's tolerations, or add other nodes"),
    ("affinity/selector", "correct nodeSelector, or label a node"),
    ("insufficient", "add nodes, or lower what resources asks for"),
    ("too many pods", "add nodes"),
)


def gpu_resource_of(pod: Object) -> str:
    """The name under which nodes offer the pod's GPUs."""
    annotations = pod["metadata"].get("annotations") or {}
    return str(annotations.get(GPU_ANNOTATION, GPU_RESOURCE))


def gpus_of_pod(pod: Object) -> int:
    """GPUs that the pod's containers hold, a count."""
    name, total = gpu_resource_of(pod), 0
    for container in pod["spec"].get("containers", []):
        limits = (container.get("resources") or {}).get("limits") or {}
        total += int(limits.get(name, 0))
    return total


def unschedulable(pod: Object) -> str | None:
    """Why the scheduler finds no node for a pod; None where it has one or is being looked at."""
    for condition in (pod.get("status") or {}).get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return _ASIDES.sub("", str(condition.get("message", ""))).rstrip(". ") or "no node fits"
    return None


def no_node(pod: Object, claims: Claims) -> tuple[str, str] | None:
    """Reason and sentence for a pod without a node; None for one that has or may get it.

    claims: the resource's own PersistentVolumeClaims by name.
    """
    why = unschedulable(pod)
    if why is None:
        return None
    name, resource = pod["metadata"]["name"], gpu_resource_of(pod)
    if resource in why:
        return "InsufficientGPU", f"pod {name} waits for GPUs: {why}; add GPUs or lower replicas"
    lowered = why.lower()
    if "persistentvolumeclaim" in lowered or "storageclass" in lowered:
        return "VolumeMissing", f"pod {name} has no node: {why}; {_claim_step(pod, why, claims)}"
    step = next((text for cue, text in _STEPS if cue in lowered), "")
    return "Unschedulable", f"pod {name} has no node: {why}" + (f"; {step}" if step else "")


def _claim_step(pod: Object, why: str, claims: Claims) -> str:
    if match := _NO_CLASS.search(why):
        return f"make StorageClass {match[1]}, or name another one (kubectl get storageclass)"
    if match := _NO_CLAIM.search(why):
        return f"create the claim {match[1]}, or correct its name"
    for volume in pod["spec"].get("volumes") or []:
        name = (volume.get("persistentVolumeClaim") or {}).get("claimName", "")
        claim = claims.get(name)
        if claim is None or (claim.get("status") or {}).get("phase") != "Pending":
            continue
        kind = claim["spec"].get("storageClassName")
        modes = ", ".join(claim["spec"].get("accessModes") or [])
        if not kind:
            return (
                f"claim {name} names no StorageClass and the cluster has no default one; set "
                "storageClassName"
            )
        return (
            f"claim {name} waits for StorageClass {kind}, which must exist and offer {modes} "
            f"(kubectl describe pvc {name} says why it does not)"
        )
    return "kubectl describe pvc says what its claim waits for"
