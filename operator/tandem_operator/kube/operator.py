"""The operator's main loop on Kubernetes: lead, watch, reconcile, answer probes."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime

from tandem_operator.kube.cache import OWN_KINDS, RELIST_S, CachedApi
from tandem_operator.kube.client import KubeApi, connect
from tandem_operator.kube.leader import Elector, LeaseTimes, steady_clock
from tandem_operator.kube.traffic import SampledTraffic
from tandem_operator.kube.watches import CustomResourceWatches
from tandem_operator.plan.objects import MODEL_LABEL, ROUTER_LABEL, Settings
from tandem_operator.reconcile.actuator import ScalingDriver
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.reconcile.decode import models_of
from tandem_operator.reconcile.pod_client import WorkerPods, router_traffic
from tandem_operator.reconcile.reconciler import Key, Reconciler
from tandem_operator.reconcile.work_queue import WorkQueue
from tandem_operator.resources.base import Object

logger = logging.getLogger("tandem.operator")

RESYNC_S = RELIST_S
NUM_WORKERS = 8


def build_parser() -> argparse.ArgumentParser:
    """The operator's arguments, as the chart gives them."""
    parser = argparse.ArgumentParser(
        prog="tandem-operator", description="Reconcile Models and Routers in a Kubernetes cluster."
    )
    add = parser.add_argument
    add("--namespace", help="only this namespace (default: all)")
    add("--kubeconfig", help="outside a cluster: path of the kubeconfig")
    add("--worker-image", default=Settings.worker_image, help="image of worker pods")
    add("--router-image", default=Settings.router_image, help="image of router pods")
    add(
        "--image-pull-policy",
        default=Settings.image_pull_policy,
        choices=("IfNotPresent", "Always", "Never"),
    )
    add("--cluster-domain", default=Settings.cluster_domain, help="DNS domain of the cluster")
    add("--network-policies", type=_flag, default=True, metavar="true|false")
    add("--lease-namespace", help="namespace of the election's Lease; without it no election")
    add("--lease-name", default="tandem-operator", help="name of the Lease")
    add("--lease-seconds", type=float, default=15.0, help="silence after which another one leads")
    add("--resync-seconds", type=float, default=RESYNC_S, help="longest time between two passes")
    add("--port", type=int, default=8080, help="port of /health, /ready and /metrics")
    add("--host", default="", help="address of that port (default: $POD_IP or all)")
    add("--log-level", default="info", choices=("debug", "info", "warning"))
    return parser


def _flag(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Operator:
    """Watches the cluster and reconciles what changed, as long as it runs."""

    def __init__(
        self,
        api: KubeApi,
        settings: Settings,
        namespace: str | None = None,
        resync_s: float = RESYNC_S,
        restore_signals: Callable[[], None] = lambda: None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.queue = WorkQueue(loop.call_later, loop.time)
        self.cache = CachedApi(api, namespace, self._changed, resync_s)
        self._watches = CustomResourceWatches(
            api, namespace, self.cache.custom, restore_signals, resync_s
        )
        workers = WorkerPods(self.cache, settings, time.monotonic)
        scaling = ScalingDriver(self.cache, settings)
        self.reconciler = Reconciler(
            api=self.cache,
            settings=settings,
            now=_now,
            link_tester=workers.test_link,
            busy=workers.busy,
            traffic=SampledTraffic(
                lambda pods: router_traffic(pods, settings.router_port),
                settings.status_period_s,
                time.monotonic,
            ),
            scaling=scaling.step,
            forget=scaling.forget,
        )
        self.num_passes = 0
        self.num_failures = 0
        self._resync_s = resync_s

    async def run(self) -> None:
        """Reconcile until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.cache.run())
            group.create_task(self._watches.run(), name="kopf")
            await self.cache.wait_synced()
            for _ in range(NUM_WORKERS):
                group.create_task(self._work())
            group.create_task(self._resync())

    async def _work(self) -> None:
        while True:
            key = await self.queue.take()
            self.num_passes += 1
            try:
                result = await self.reconciler.reconcile(key)
            except ApiError as error:
                self.num_failures += 1
                delay = self.queue.failed(key)
                logger.warning("%s: %s; again in %.1f s", key, error, delay)
            except Exception:
                # A defect in one resource's plan must not stop the others.
                self.num_failures += 1
                delay = self.queue.failed(key)
                logger.exception("%s: unexpected; again in %.1f s", key, delay)
            else:
                self.queue.done(key)
                if result.again_s is not None:
                    self.queue.add_later(key, result.again_s)
                if result.writes:
                    logger.debug("%s: %d writes", key, result.writes)

    async def _resync(self) -> None:
        while True:
            await asyncio.sleep(self._resync_s)
            for kind in OWN_KINDS:
                for namespace, name in self.cache.keys(kind):
                    self.queue.add(Key(kind, namespace, name))

    def _changed(self, obj: Object) -> None:
        metadata, kind = obj["metadata"], obj["kind"]
        namespace, labels = metadata["namespace"], metadata.get("labels") or {}
        if kind in OWN_KINDS:
            self.queue.add(Key(kind, namespace, metadata["name"]))
        if kind == "Model":
            for router in self.cache.copies("Router", namespace):
                if metadata["name"] in models_of(router):
                    self.queue.add(Key("Router", namespace, router["metadata"]["name"]))
        for label, owner in ((MODEL_LABEL, "Model"), (ROUTER_LABEL, "Router")):
            if label in labels and kind not in OWN_KINDS:
                self.queue.add(Key(owner, namespace, labels[label]))
        # A child that lost its labels leaves the selector and still names its owner.
        for owner_ref in metadata.get("ownerReferences") or []:
            if owner_ref["kind"] in OWN_KINDS:
                self.queue.add(Key(owner_ref["kind"], namespace, owner_ref["name"]))


class Probes:
    """Answers /health, /ready and /metrics."""

    def __init__(self, api: KubeApi) -> None:
        self._api = api
        self.operator: Operator | None = None
        self.elector: Elector | None = None

    async def serve(self, host: str, port: int) -> asyncio.Server:
        """Begin to answer. Raises OSError when the port is taken."""
        return await asyncio.start_server(self._answer, host or None, port)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        unreadable = (asyncio.IncompleteReadError, asyncio.LimitOverrunError, IndexError)
        try:
            async with asyncio.timeout(5):
                head = await reader.readuntil(b"\r\n\r\n")
                status, body = self._page(head.split(b" ", 2)[1].split(b"?")[0].decode("latin-1"))
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\n"
                    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                    + body
                )
                await writer.drain()
        except (OSError, TimeoutError, *unreadable) as error:
            logger.debug("probe not answered: %r", error)
        finally:
            writer.close()

    def _page(self, target: str) -> tuple[str, bytes]:
        if target == "/health":
            return "200 OK", b"ok\n"
        if target == "/ready":
            # A replica that stands by is ready: it could lead at any time.
            ready = self.operator is None or self.operator.cache.synced
            return ("200 OK", b"ok\n") if ready else ("503 Service Unavailable", b"syncing\n")
        if target == "/metrics":
            return "200 OK", self._metrics().encode()
        return "404 Not Found", b"not found\n"

    def _metrics(self) -> str:
        operator = self.operator
        leading = self.elector is None or self.elector.leading
        values = {
            "tandem_operator_leading": ("gauge", int(leading and operator is not None)),
            "tandem_operator_queue_length": ("gauge", len(operator.queue) if operator else 0),
            "tandem_operator_passes_total": ("counter", operator.num_passes if operator else 0),
            "tandem_operator_failures_total": (
                "counter",
                operator.num_failures if operator else 0,
            ),
            "tandem_operator_api_writes_total": ("counter", self._api.num_writes),
            "tandem_operator_api_reads_total": ("counter", self._api.num_reads),
        }
        return "".join(f"# TYPE {n} {t}\n{n} {v}\n" for n, (t, v) in values.items())


async def _lead(api: KubeApi, probes: Probes, operator: Operator, elector: Elector | None) -> None:
    """Reconcile while leading; returns when the lead is lost."""
    if elector is not None:
        await elector.acquire()
    probes.operator = operator
    work = asyncio.create_task(operator.run(), name="operator")
    holder = asyncio.create_task(elector.hold() if elector else asyncio.Event().wait())
    try:
        await asyncio.wait({work, holder}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (work, holder):
            task.cancel()
        (lost,) = await asyncio.gather(holder, return_exceptions=True)
        if elector is not None and elector.leading:
            # Hand over only when nothing of ours can take effect any more; watches may end later.
            elector.leading = False
            if await api.settle(elector.times.renew_s):
                await elector.release()
        (failed,) = await asyncio.gather(work, return_exceptions=True)
    for error in (failed, lost):
        if isinstance(error, Exception):
            raise error


async def serve(args: argparse.Namespace) -> int:
    """Run until SIGTERM, or until the lead is lost; the exit status."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop_on_signals() -> None:
        for sig in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sig, stop.set)

    stop_on_signals()
    api_client = await connect(args.kubeconfig)
    api = KubeApi(api_client)
    probes = Probes(api)
    server = await probes.serve(args.host or os.environ.get("POD_IP", ""), args.port)
    settings = Settings(
        worker_image=args.worker_image,
        router_image=args.router_image,
        image_pull_policy=args.image_pull_policy,
        network_policies=args.network_policies,
        cluster_domain=args.cluster_domain,
    )
    elector = None
    if args.lease_namespace:
        identity = f"{os.environ.get('POD_NAME') or socket.gethostname()}_{os.getpid()}"
        times = LeaseTimes.of(args.lease_seconds)
        elector = Elector(
            KubeApi(api_client),
            args.lease_namespace,
            args.lease_name,
            identity,
            times,
            steady_clock,
        )
        api.may_write = elector.may_write
    probes.elector = elector
    operator = Operator(api, settings, args.namespace, args.resync_seconds, stop_on_signals)
    lead = asyncio.create_task(_lead(api, probes, operator, elector))
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({lead, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if lead.done() and not stop.is_set():
            lead.result()
            return 1  # lost the lead; the pod starts again and stands by
        return 0
    finally:
        for task in (lead, stopped):
            task.cancel()
        await asyncio.gather(lead, stopped, return_exceptions=True)
        server.close()
        await api.close()
