"""The in-process cluster: store, controllers, node, reconciler and endpoints under one roof."""

from __future__ import annotations

import asyncio
import glob
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Self

from tandem_operator.local.controllers import Deployments, Endpoints, Kubelet
from tandem_operator.local.port_forward import Forwarder
from tandem_operator.local.state_dir import RunDir, free_ports, predictor_cache
from tandem_operator.local.store import Store
from tandem_operator.local.wait_reachable import reach_every_tier
from tandem_operator.manifests import Manifest
from tandem_operator.node.images import ImageTable
from tandem_operator.node.node import Node, NodeSettings, loopback_addresses
from tandem_operator.node.reaper import Guardian
from tandem_operator.plan.objects import ROUTER_LABEL, Settings
from tandem_operator.plan.pods import is_ready
from tandem_operator.reconcile.actuator import ScalingDriver
from tandem_operator.reconcile.cluster_api import ApiError, WatchEvent
from tandem_operator.reconcile.controller import Controller
from tandem_operator.reconcile.owners import RECONCILED
from tandem_operator.reconcile.pod_client import WorkerPods
from tandem_operator.reconcile.reconciler import Reconciler
from tandem_operator.reconcile.requeue import Key
from tandem_operator.reconcile.router_pods import RouterPods
from tandem_operator.resources.base import Object
from tandem_operator.resources.timestamps import timestamp

logger = logging.getLogger("tandem.local")

RESYNC_S = 30.0
REST_S = 0.02


class ClusterError(Exception):
    """The cluster cannot do what was asked; the message says what to do."""


def count_gpus() -> int:
    """NVIDIA GPUs of this machine, a count."""
    return len(glob.glob("/dev/nvidia[0-9]*"))


def data_digest(uri: str) -> str:
    """Digest of the file that a file:// URI names; empty when it cannot be read."""
    try:
        with open(uri.removeprefix("file://"), "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()[:16]
    except OSError:
        return ""


class LocalCluster:
    """Runs custom resources on this machine.

    async with LocalCluster(RunDir("name")) as cluster: cluster.apply(...); await
    cluster.wait_ready(60); cluster.url("chat").
    """

    def __init__(
        self,
        rundir: RunDir,
        *,
        port: int = 8000,
        exact_port: bool = False,
        images: ImageTable | None = None,
        node_settings: NodeSettings | None = None,
        settings: Settings | None = None,
        num_gpus: int | None = None,
        prometheus_url: str = "",
    ) -> None:
        self.rundir = rundir
        router_port, worker_port, kv_port, gateway_port = free_ports(rundir.subnet)
        base = settings or Settings(pre_stop_s=1, image_pull_policy="Never")
        self.settings = replace(
            base,
            endpoints="file",
            status_period_s=5.0,
            predictor_cache=str(predictor_cache()),
            router_port=router_port,
            worker_port=worker_port,
            kv_port=kv_port,
            gateway_port=gateway_port,
            prometheus_url=prometheus_url or base.prometheus_url,
        )
        self.store = Store()
        self._port, self._exact_port = port, exact_port
        self._images = images
        self._node_settings = node_settings or NodeSettings()
        self._num_gpus = count_gpus() if num_gpus is None else num_gpus
        self._guardian = Guardian(remove_on_exit=rundir.folder)
        self._kubelet = Kubelet(self.store)
        self._node = Node(
            rundir.folder,
            addresses=loopback_addresses(rundir.subnet),
            lookup=self.store.get,
            report=self._kubelet.report,
            images=images,
            settings=self._node_settings,
            guardian=self._guardian,
            num_gpus=self._num_gpus,
        )
        self._kubelet.node = self._node
        self._deployments = Deployments(self.store)
        self._endpoints = Endpoints(self.store, worker_port)
        self._forwarders: dict[str, Forwarder] = {}
        workers = WorkerPods(self.store, self.settings, time.monotonic)
        scaling = ScalingDriver(self.store, self.settings)
        routers = RouterPods(self.store, self.settings, self._node.as_seen)
        reconciler = Reconciler(
            api=self.store,
            settings=self.settings,
            now=timestamp,
            link_tester=workers.test_link,
            busy=workers.busy,
            reports=workers.reports,
            traffic=routers.traffic,
            push=routers.push,
            endpoint=lambda router: self.url(router.metadata.name),
            scaling=scaling.step,
            forget=scaling.forget,
        )
        self._controller = Controller(
            reconciler, self.store.find, RESYNC_S, REST_S, failed=self._failed
        )
        self._wake = asyncio.Event()
        # Told after every change; wait_for on it to see what has become true.
        self.changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._refreshes: set[asyncio.Task[None]] = set()
        self.on_problem: Callable[[str], None] = lambda text: logger.warning("%s", text)
        self.store.listen(self._noticed)

    @property
    def node(self) -> Node:
        """The node that runs the pods."""
        return self._node

    async def __aenter__(self) -> Self:
        self._tasks.append(asyncio.create_task(self._controller.run(), name="passes"))
        self._tasks.append(asyncio.create_task(self._run(), name="local cluster"))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self, grace_s: float = 10.0) -> None:
        """End everything that runs; nothing stays behind."""
        self._controller.queue.cancel_timers()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for forwarder in self._forwarders.values():
            await forwarder.close()
        await self._node.close(grace_s)
        await self._kubelet.close()
        await asyncio.to_thread(self._guardian.close)
        self.rundir.close()

    async def apply(self, objects: list[Object]) -> list[str]:
        """Make these objects part of the cluster; one line of result for each.

        Raises ClusterError when an object cannot be taken, or a port is in use.
        """
        results = []
        for obj in objects:
            metadata = {"namespace": "default", **obj["metadata"]}
            kind, name = obj["kind"], metadata["name"]
            if kind == "Router":
                await self._listen(name)
                await self._read_training_data(obj)
            old = self.store.read(kind, metadata["namespace"], name)
            try:
                new = self.store.write({**obj, "metadata": metadata}, manager="user")
            except ApiError as error:
                raise ClusterError(str(error)) from error
            same = (
                old is not None
                and old["metadata"]["resourceVersion"] == new["metadata"]["resourceVersion"]
            )
            word = "created" if old is None else "unchanged" if same else "configured"
            results.append(f"{kind.lower()}/{name} {word}")
            if kind in RECONCILED:
                self._controller.queue.add(Key(kind, metadata["namespace"], name))
        return results

    async def apply_manifests(self, manifests: list[Manifest]) -> list[str]:
        """Apply loaded manifests."""
        return await self.apply([m.obj for m in manifests])

    async def delete(self, kind: str, name: str, namespace: str = "default") -> bool:
        """Delete an object and what it owns; False when there is none."""
        if self.store.read(kind, namespace, name) is None:
            return False
        self.store.remove(kind, namespace, name)
        if kind == "Router" and (forwarder := self._forwarders.pop(name, None)) is not None:
            await forwarder.close()
        return True

    def scale(self, kind: str, name: str, replicas: int, namespace: str = "default") -> str:
        """Set the number of workers of a WorkerPool, of a Model's only one, or of router pods.

        Returns what was scaled, as KIND/NAME. Raises ClusterError when it cannot be scaled.
        """
        if kind == "Model" and self.store.read(kind, namespace, name) is not None:
            kind, name = "WorkerPool", self._only_pool(name, replicas)
        obj = self.store.read(kind, namespace, name)
        if obj is None:
            known = ", ".join(o["metadata"]["name"] for o in self.store.find(kind)) or "none"
            hint = ""
            if kind == "WorkerPool" and (pools := self._pools_of(name)):
                hint = f"; Model {name!r} has {' and '.join(pools)}"
            raise ClusterError(f"{kind.lower()} {name!r} not found; there are: {known}{hint}")
        if kind == "WorkerPool":
            low, high = obj["spec"].get("minReplicas", 0), obj["spec"].get("maxReplicas", 1000)
            if not low <= replicas <= high:
                raise ClusterError(
                    f"workerpool {name!r} allows {low} to {high} workers, not {replicas}; change "
                    "minReplicas or maxReplicas of its Model"
                )
        elif kind != "Router":
            raise ClusterError(
                f"a {kind} cannot be scaled; scale a workerpool, a model of one pool or a router"
            )
        try:
            self.store.change(kind, namespace, name, {"spec": {"replicas": replicas}})
        except ApiError as error:
            raise ClusterError(str(error)) from error
        return f"{kind.lower()}/{name}"

    def _pools_of(self, model: str) -> list[str]:
        """The names of a Model's WorkerPools."""
        pools = self.store.find("WorkerPool")
        return [p["metadata"]["name"] for p in pools if p["spec"]["modelRef"]["name"] == model]

    def _only_pool(self, model: str, replicas: int) -> str:
        pools = self._pools_of(model)
        if not pools:
            raise ClusterError(f"model {model!r} has no workerpool yet; see `tandem get`")
        if len(pools) > 1:
            lines = [f"tandem scale workerpool {pool} --replicas {replicas}" for pool in pools]
            raise ClusterError(
                f"model {model!r} has {len(pools)} pools; say which:\n  " + "\n  ".join(lines)
            )
        return pools[0]

    def url(self, router: str) -> str:
        """The address of a Router on this machine; empty while it has none."""
        forwarder = self._forwarders.get(router)
        return forwarder.url if forwarder is not None else ""

    def ready(self, obj: Object) -> bool:
        """Whether a Model or Router is Ready, at its present generation."""
        status = obj.get("status") or {}
        if status.get("observedGeneration") != obj["metadata"].get("generation"):
            return False
        return any(
            c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or []
        )

    def all_ready(self) -> bool:
        """Whether every Model and Router is Ready and no rollout is under way."""
        objects = [*self.store.find("Model"), *self.store.find("Router")]
        return bool(objects) and all(self.ready(o) and _settled(o) for o in objects)

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until all_ready and until routers see it. Raises TimeoutError: what is missing."""
        try:
            async with asyncio.timeout(timeout_s):
                async with self.changed:
                    await self.changed.wait_for(self.all_ready)
                for name in list(self._forwarders):
                    await reach_every_tier(self.url(name))
        except TimeoutError as error:
            missing = "; ".join(
                f"{o['kind']} {o['metadata']['name']}: {(o.get('status') or {}).get('message', '')}"
                for k in ("Model", "Router")
                for o in self.store.find(k)
                if not self.ready(o)
            )
            missing = missing or "a router has not found the workers of every tier"
            raise TimeoutError(f"not ready after {timeout_s:g} s: {missing}") from error

    async def _listen(self, router: str) -> None:
        if router in self._forwarders:
            return

        def targets() -> list[tuple[str, int]]:
            pods = self.store.find("Pod", labels={ROUTER_LABEL: router})
            return [(p["status"]["podIP"], self.settings.router_port) for p in pods if is_ready(p)]

        forwarder = Forwarder("127.0.0.1", self._port, targets)
        exact = self._exact_port and not self._forwarders
        await forwarder.start(try_next=0 if exact else 200)
        self._forwarders[router] = forwarder

    # The loop -------------------------------------------------------------------------------

    def _noticed(self, event: WatchEvent) -> None:
        obj, metadata = event.object, event.object["metadata"]
        self._controller.noticed(obj)
        if obj["kind"] in ("ConfigMap", "Secret") and event.type != "DELETED":
            task = asyncio.create_task(
                self._node.config_changed(obj["kind"], metadata["namespace"], metadata["name"])
            )
            self._refreshes.add(task)
            task.add_done_callback(self._refreshes.discard)
        self._wake.set()

    def _failed(self, key: Key, error: Exception, again_s: float) -> None:
        if isinstance(error, ApiError):
            self.on_problem(f"{key}: {error}")
        else:
            logger.debug("%s", key, exc_info=error)
            self.on_problem(f"{key}: {error!r}; this is a defect of tandem, please report it")

    async def _run(self) -> None:
        """Play the parts of Kubernetes after every change."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            for controller in (self._deployments, self._kubelet, self._endpoints):
                try:
                    controller.sync()
                except ApiError as error:
                    self.on_problem(str(error))
                    asyncio.get_running_loop().call_later(2.0, self._wake.set)
            async with self.changed:
                self.changed.notify_all()
            await asyncio.sleep(REST_S)  # several changes at once make one round

    async def _read_training_data(self, router: Object) -> None:
        """Note the digest of a Router's training data, so that changed data trains again."""
        training = router["spec"].get("predictor", {}).get("training") or {}
        uri = training.get("data", "")
        if uri.startswith("file://"):
            known = await asyncio.to_thread(data_digest, uri)
            digests = {**self.settings.data_digests, uri: known}
            self.settings = replace(self.settings, data_digests=digests)
            self._controller.reconciler.settings = self.settings


def _settled(obj: Object) -> bool:
    conditions = (obj.get("status") or {}).get("conditions") or []
    return not any(c["type"] == "Progressing" and c["status"] == "True" for c in conditions)
