"""What a pod's own status tells: ready or not, and what keeps it from being ready."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from tandem_operator.plan.scheduling import Claims, no_node
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


NO_CLAIMS: Claims = {}

# How a process ends that was asked to, or made to.
_SIGNALLED = frozenset({0, 137, 143})
# A worker of ours whose weights are not there, or are no model that it reads; docs/contract.md.
_NO_WEIGHTS = 66
# One whose lossy settings change its answers by more than the stated loss.
_UNQUALIFIED = 65
_SLACK_S = 30.0  # by which probes and clocks of a node are late

# Most basic first: the first one that holds for any pod is the one to show.
_ORDER = (
    "InsufficientGPU",
    "Unschedulable",
    "VolumeMissing",
    "ImagePull",
    "WeightsDownload",
    "WeightsUnusable",
    "QualityLoss",
    "PredictorTraining",
    "EngineCrash",
    "RouterCrash",
    "Starting",
)


def blocker(pod: Object, claims: Claims = NO_CLAIMS) -> Blocker | None:
    """The cause that keeps one pod from being ready; None for a ready pod."""
    if is_ready(pod):
        return None
    name = pod["metadata"]["name"]
    status = pod.get("status") or {}
    if (placed := no_node(pod, claims)) is not None:
        return Blocker(*placed)
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
        if "waiting" in state and not entry.get("restartCount"):
            break  # its volumes are being mounted
        return Blocker(_init_reason(entry["name"]), f"pod {name}: {entry['name']} is running")
    for entry in status.get("containerStatuses") or []:
        if found := _too_slow(pod, entry) or _waiting(name, entry):
            return found
    limit_s = _startup_limit_s(pod)
    within = f"; it has {limit_s:.0f} s for it (rollout.startupTimeout)" if limit_s else ""
    return Blocker("Starting", f"pod {name} is starting{within}")


def _startup_limit_s(pod: Object) -> float | None:
    """How long the probe gives a worker to start; None for other pods."""
    for container in pod["spec"].get("containers") or []:
        if container["name"] == "worker" and (probe := container.get("startupProbe")):
            return float(probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3))
    return None


def _too_slow(pod: Object, entry: Object) -> Blocker | None:
    """A worker that was ended by its startup probe, as one that compiles for longer is."""
    limit_s = _startup_limit_s(pod)
    last = (entry.get("lastState") or {}).get("terminated") or {}
    if entry["name"] != "worker" or limit_s is None or last.get("exitCode") not in _SIGNALLED:
        return None
    try:
        began, ended = (datetime.fromisoformat(last[at]) for at in ("startedAt", "finishedAt"))
    except (KeyError, ValueError):
        return None
    grace_s = float(pod["spec"].get("terminationGracePeriodSeconds") or 30)
    if not limit_s <= (ended - began).total_seconds() <= limit_s + grace_s + _SLACK_S:
        return None
    return Blocker(
        "Starting",
        f"pod {pod['metadata']['name']} was not ready within {limit_s:.0f} s and was started again "
        f"(restarts: {entry.get('restartCount', 0)}); raise rollout.startupTimeout if it still "
        "loads or compiles then: its log says how far it gets",
    )


def _init_reason(container: str) -> str:
    return {"fetch-weights": "WeightsDownload", "train-predictor": "PredictorTraining"}.get(
        container, "Starting"
    )


def _waiting(pod: str, entry: Object) -> Blocker | None:
    state, last = entry.get("state") or {}, entry.get("lastState") or {}
    waiting = state.get("waiting") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    if reason in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName"):
        step = "correct spec.image, or give images.pullSecrets in the chart"
        return Blocker("ImagePull", f"pod {pod}: {message or reason}; {step}")
    if reason in ("FailedMount", "CreateContainerConfigError"):
        return Blocker("VolumeMissing", f"pod {pod}: {message}{_missing_step(message)}")
    ended = state.get("terminated") or last.get("terminated") or {}
    if ended.get("exitCode", 0) != 0 or reason in ("CrashLoopBackOff", "CreateContainerError"):
        detail = ended.get("message") or message or f"exit code {ended.get('exitCode')}"
        kind = "RouterCrash" if entry["name"] == "router" else "EngineCrash"
        count = entry.get("restartCount", 0)
        text = f"pod {pod}, restarted {count} times: {detail}"
        if entry["name"] == "worker" and ended.get("exitCode") == _NO_WEIGHTS:
            return Blocker("WeightsUnusable", f"{text}; correct weights.source, or what it names")
        if entry["name"] == "worker" and ended.get("exitCode") == _UNQUALIFIED:
            return Blocker("QualityLoss", text)
        return Blocker(kind, f"{text}; its log says more")
    return None


def _missing_step(message: str) -> str:
    """What to do about a ConfigMap, Secret or key that a pod names and nobody has made."""
    lowered = message.lower()
    if "configmap" not in lowered and "secret" not in lowered:
        return ""
    return "; create it in this namespace, or correct the name"


def first_blocker(pods: Iterable[Object], claims: Claims = NO_CLAIMS) -> Blocker | None:
    """The most basic cause over all pods that are meant to stay.

    claims: the resource's own PersistentVolumeClaims by name.
    """
    found = [
        b
        for pod in pods
        if not pod["metadata"].get("deletionTimestamp")
        for b in [blocker(pod, claims)]
        if b is not None
    ]
    return min(found, key=lambda b: _ORDER.index(b.reason), default=None)
