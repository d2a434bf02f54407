"""What a pod's own status tells: ready or not, and what keeps it from being ready."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tandem_operator.resources.base import Object


@dataclass(frozen=True)
class Blocker:
    """Why a pod is not ready."""

    reason: str
    message: str


def is_ready(pod: Object) -> bool:
    """Whether a pod is ready and not about to go."""
    if pod["metadata"].get("deletionTimestamp"):
        return False
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


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


def unschedulable(pod: Object) -> str | None:
    """Why the scheduler finds no node for a pod; None where it has one or is being looked at."""
    for condition in (pod.get("status") or {}).get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return str(condition.get("message", "")).rstrip(". ") or "no node fits"
    return None


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
