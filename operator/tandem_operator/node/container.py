"""What a node knows about one container, and the pod status that its containers add up to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tandem_operator.node.process import Process
from tandem_operator.resources.base import Object
from tandem_operator.resources.timestamps import timestamp


@dataclass(frozen=True)
class LogSpan:
    """The part of a log file that one run of a container wrote; end is None while it runs.

    Positions are in bytes.
    """

    path: Path
    start: int
    end: int | None


@dataclass
class ContainerState:
    """What is known about one container."""

    spec: Object
    state: Object = field(default_factory=lambda: {"waiting": {"reason": "ContainerCreating"}})
    last_state: Object = field(default_factory=dict)
    restarts: int = 0
    started: bool = False
    ready: bool = False
    process: Process | None = None
    # Where in the log the present run and the one before it began; None before the first run.
    log_start: int | None = None
    previous_log_start: int | None = None

    def status(self) -> Object:
        """The container's entry in pod.status."""
        return {
            "name": self.spec["name"],
            "image": self.spec.get("image", ""),
            "imageID": "",
            "ready": self.ready,
            "started": self.started,
            "restartCount": self.restarts,
            "state": self.state,
            "lastState": self.last_state,
        }

    def begin_log(self, log: Path) -> None:
        """A new run is about to write: what it writes starts where the file ends now."""
        self.previous_log_start = self.log_start
        self.log_start = log.stat().st_size if log.exists() else 0

    def forget_log(self) -> None:
        """The log was rotated: only what comes from now on can be told."""
        self.log_start, self.previous_log_start = 0, None

    def span(self, log: Path, *, previous: bool) -> LogSpan | None:
        """What the present (or last) run wrote, or the run before it; None when there is none."""
        if not previous:
            end = None if self.process is not None else _size(log)
            return LogSpan(log, self.log_start or 0, end)
        if self.previous_log_start is None:
            return None
        return LogSpan(log, self.previous_log_start, self.log_start)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class PodConditions:
    """The conditions of a pod, each with the time of its last change."""

    def __init__(self, clock: Callable[[], str] = timestamp) -> None:
        self._clock = clock
        self._since: dict[str, tuple[str, str]] = {}

    def of(self, values: dict[str, bool]) -> list[Object]:
        """The conditions list for these values."""
        return [self._one(kind, value) for kind, value in values.items()]

    def _one(self, kind: str, value: bool) -> Object:
        status = "True" if value else "False"
        if self._since.get(kind, ("", ""))[0] != status:
            self._since[kind] = (status, self._clock())
        return {"type": kind, "status": status, "lastTransitionTime": self._since[kind][1]}


def phase(
    policy: str, init: Sequence[ContainerState], containers: Sequence[ContainerState], ending: bool
) -> str:
    """A pod's phase; policy is its restartPolicy, ending means that it is being stopped."""
    states = [c.state for c in containers]
    if all("terminated" in s for s in states) and (policy != "Always" or ending):
        codes = [s["terminated"]["exitCode"] for s in states]
        if policy == "Never" or all(code == 0 for code in codes) or ending:
            return "Succeeded" if all(code == 0 for code in codes) else "Failed"
    failed_init = any(
        "terminated" in c.state and c.state["terminated"]["exitCode"] != 0 for c in init
    )
    if failed_init and policy == "Never":
        return "Failed"
    begun = any("running" in s or "terminated" in s for s in states) or any(
        c.restarts for c in containers
    )
    return "Running" if begun else "Pending"
