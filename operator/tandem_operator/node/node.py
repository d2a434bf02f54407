"""The node: starts and ends pods as told, hands out addresses and GPUs, keeps their folders."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tandem_operator.node.container import LogSpan
from tandem_operator.node.images import ImageTable
from tandem_operator.node.pod import NotRunningError, PodRunner
from tandem_operator.node.process import Process
from tandem_operator.node.reaper import Guardian
from tandem_operator.node.settings import NodeSettings
from tandem_operator.node.volumes import Lookup
from tandem_operator.plan.scheduling import gpus_of_pod
from tandem_operator.resources.base import Object

__all__ = ["Node", "NodeSettings", "NotRunningError", "loopback_addresses"]


def loopback_addresses(second_byte: int) -> Iterator[str]:
    """Addresses 127.B.0.2, 127.B.0.3, ...; Linux answers on all of 127.0.0.0/8 without set-up."""
    for third in range(256):
        for fourth in range(2 if third == 0 else 1, 255):
            yield f"127.{second_byte}.{third}.{fourth}"


class Node:
    """Runs pods below a folder; report(pod, status) is called on each change of a pod.

    addresses: of each pod, several with commas between. claims: where PersistentVolumeClaims have
    their folders; nodes of one cluster share it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        addresses: Iterator[str],
        lookup: Lookup,
        report: Callable[[Object, Object], None],
        images: ImageTable | None = None,
        settings: NodeSettings | None = None,
        guardian: Guardian | None = None,
        num_gpus: int = 0,
        claims: Path | None = None,
    ) -> None:
        self.folder = folder
        self.claims = claims or folder / "claims"
        self.settings = settings or NodeSettings()
        self.num_gpus = num_gpus
        self._addresses = addresses
        self._lookup = lookup
        self._report = report
        self._images = images or ImageTable()
        self._guardian = guardian or Guardian()
        self._own_guardian = guardian is None
        self._pods: dict[str, PodRunner] = {}
        self._gpus: dict[str, list[int]] = {}

    @property
    def pods(self) -> list[Object]:
        """The pods that this node runs."""
        return [r.pod for r in self._pods.values()]

    @property
    def free_gpus(self) -> int:
        """GPUs that no pod holds, a count."""
        return self.num_gpus - sum(len(held) for held in self._held_gpus())

    def _held_gpus(self) -> list[list[int]]:
        """A pod that has run to its end still has its logs here, but no GPU."""
        return [held for uid, held in self._gpus.items() if not self._pods[uid].finished]

    def run(self, pod: Object) -> None:
        """Start a pod that the node does not run yet; the node must have its GPUs free."""
        uid = pod["metadata"]["uid"]
        if uid in self._pods:
            return
        taken = {i for held in self._held_gpus() for i in held}
        gpus = [i for i in range(self.num_gpus) if i not in taken][: gpus_of_pod(pod)]
        extra = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if gpus else {}
        runner = PodRunner(
            pod,
            ip=next(self._addresses),
            folder=self._pod_folder(pod),
            claims=self.claims,
            images=self._images,
            lookup=self._lookup,
            guardian=self._guardian,
            settings=self.settings,
            report=lambda status: self._report(pod, status),
            extra_env=extra,
        )
        (self._pod_folder(pod) / "logs").mkdir(parents=True, exist_ok=True)
        self._pods[uid] = runner
        self._gpus[uid] = gpus
        runner.start()

    async def stop(
        self, pod: Object, grace_s: float | None = None, *, pre_stop: bool = True
    ) -> None:
        """End a pod within its grace period and forget it; its logs go with it."""
        uid = pod["metadata"]["uid"]
        runner = self._pods.get(uid)
        if runner is None:
            return
        await runner.stop(grace_s, pre_stop=pre_stop)
        self._pods.pop(uid, None)
        self._gpus.pop(uid, None)
        shutil.rmtree(self._pod_folder(pod), ignore_errors=True)

    async def config_changed(self, kind: str, namespace: str, name: str) -> None:
        """A ConfigMap or Secret changed: bring the volumes that show it up to date."""
        for runner in list(self._pods.values()):
            same = runner.pod["metadata"].get("namespace", "default") == namespace
            if same and runner.volumes.uses(kind, name):
                await runner.refresh_volumes()

    def as_seen(self, pod: Object, text: str) -> str:
        """A text with the paths at which a pod's processes find its volumes here."""
        runner = self._pods.get(pod["metadata"]["uid"])
        return text if runner is None else runner.volumes.as_seen(text)

    async def refresh(self, uid: str | None = None) -> None:
        """Bring the volumes of one pod, or of all, up to date: new tokens, changed objects."""
        for runner in list(self._pods.values()):
            if uid in (None, runner.pod["metadata"]["uid"]):
                await runner.refresh_volumes()

    def log_path(self, uid: str, container: str | None = None) -> Path | None:
        """The log file of a pod's container, None for a pod that is not here."""
        runner = self._pods.get(uid)
        return None if runner is None else runner.log_path(container)

    def log_span(self, uid: str, container: str, *, previous: bool = False) -> LogSpan | None:
        """What the present run of a container wrote, or the run before it."""
        runner = self._pods.get(uid)
        return None if runner is None else runner.log_span(container, previous=previous)

    async def exec(self, uid: str, container: str, command: list[str]) -> Process:
        """Start a command beside a running container, with pipes for its input and output.

        Raises NotRunningError, OSError or MountError.
        """
        runner = self._pods.get(uid)
        if runner is None:
            raise NotRunningError("the pod does not run on this node")
        return await runner.exec(container, command)

    async def close(self, grace_s: float = 10.0) -> None:
        """End all pods at once, without preStop; SIGKILL after the grace period."""
        runners = list(self._pods.values())
        await asyncio.gather(*(r.stop(grace_s, pre_stop=False) for r in runners))
        self._pods.clear()
        if self._own_guardian:
            await asyncio.to_thread(self._guardian.close)

    def _pod_folder(self, pod: Object) -> Path:
        """The uid keeps pods of one name apart: in two namespaces, or one after the other."""
        metadata = pod["metadata"]
        return self.folder / "pods" / f"{metadata['name']}_{metadata['uid']}"
