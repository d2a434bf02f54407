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
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tandem_operator.kube.cache import EVERYWHERE, RELIST_S, CachedApi, Namespaces
from tandem_operator.kube.client import KubeApi, connect
from tandem_operator.kube.leader import Elector, LeaseTimes, steady_clock
from tandem_operator.kube.probes import ProbeServer, Reading, probes
from tandem_operator.kube.resource_metrics import ResourceMetrics
from tandem_operator.kube.traffic import SampledTraffic
from tandem_operator.kube.watches import CustomResourceWatches
from tandem_operator.plan.objects import Settings
from tandem_operator.reconcile.actuator import ScalingDriver
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.reconcile.controller import Controller
from tandem_operator.reconcile.namespace_claim import TAKEN_RETRY_S, NamespaceClaims, Release
from tandem_operator.reconcile.pod_client import WorkerPods
from tandem_operator.reconcile.reconciler import Reconciler
from tandem_operator.reconcile.rotation import TokenRotation
from tandem_operator.reconcile.router_pods import RouterPods
from tandem_operator.resources.allow_list import AllowList
from tandem_operator.resources.base import Object
from tandem_operator.resources.entrance import Entrance
from tandem_operator.resources.network_rules import NetworkRules
from tandem_operator.resources.pod_defaults import PodDefaults
from tandem_operator.resources.timestamps import timestamp

logger = logging.getLogger("tandem.operator")

Rules = TypeVar("Rules", bound=BaseModel)


def build_parser() -> argparse.ArgumentParser:
    """The operator's arguments, as the chart gives them."""
    parser = argparse.ArgumentParser(
        prog="tandem-operator", description="Reconcile Models and Routers in a Kubernetes cluster."
    )
    add = parser.add_argument
    add("--namespace", action="append", default=[], help="only this one, and others so named")
    add("--kubeconfig", help="outside a cluster: path of the kubeconfig")
    add("--worker-image", default=Settings.worker_image, help="image of worker pods")
    add("--router-image", default=Settings.router_image, help="image of router pods")
    add(
        "--image-pull-policy",
        default=Settings.image_pull_policy,
        choices=("IfNotPresent", "Always", "Never"),
        help="of the pods' images",
    )
    add("--cluster-domain", default=Settings.cluster_domain, help="DNS domain of the cluster")
    rules: dict[str, Any] = {"metavar": "JSON", "default": "{}"}
    add("--allow", **rules, type=_json(AllowList), help="what Models and Routers may ask for")
    add("--pod-defaults", **rules, type=_json(PodDefaults), help="what all pods get besides")
    add("--routers", **rules, type=_json(Entrance), help="how requests come in from outside")
    add("--network-policies", **rules, type=_json(NetworkRules), help="who may talk to whom")
    add("--own-namespace", default="", help="namespace of the operator itself")
    add("--prometheus-url", default="", help="who answers the queries of AutoscalingPolicies")
    add("--release", default="", help="the chart's release; with it namespaces are claimed")
    add("--lease-namespace", help="namespace of the election's Lease; without it no election")
    add("--lease-name", default="tandem-operator", help="name of the Lease")
    add("--lease-seconds", type=float, default=15.0, help="silence after which another one leads")
    add("--resync-seconds", type=float, default=RELIST_S, help="longest time between two passes")
    add("--port", type=int, default=8080, help="port of /health, /ready and /metrics")
    add("--host", default="", help="address of that port (default: $POD_IP or all)")
    add("--log-level", default="info", choices=("debug", "info", "warning"), help="least severe")
    forms = ("text", "json")
    add("--log-format", default="text", choices=forms, help="of the operator and all pods")
    return parser


def _json(kind: type[Rules]) -> Callable[[str], Rules]:
    """Reads an argument that holds one of the chart's sections."""

    def read(text: str) -> Rules:
        try:
            return kind.model_validate_json(text)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise argparse.ArgumentTypeError(wrong) from error

    return read


class Operator:
    """Watches the cluster and reconciles what changed, as long as it runs."""

    def __init__(
        self,
        api: KubeApi,
        settings: Settings,
        namespaces: Namespaces = EVERYWHERE,
        resync_s: float = RELIST_S,
        restore_signals: Callable[[], None] = lambda: None,
        release: Release | None = None,
    ) -> None:
        self.cache = CachedApi(
            api,
            namespaces,
            lambda obj: self.controller.noticed(obj),
            resync_s,
            more=settings.entrance.kinds,
        )
        self._watches = CustomResourceWatches(
            api, namespaces, self.cache.custom, restore_signals, resync_s
        )
        workers = WorkerPods(self.cache, settings, time.monotonic)
        scaling = ScalingDriver(self.cache, settings)
        routers = RouterPods(self.cache, settings)
        traffic = SampledTraffic(routers.traffic, settings.status_period_s, time.monotonic)
        reconciler = Reconciler(
            api=self.cache,
            settings=settings,
            now=timestamp,
            link_tester=workers.test_link,
            busy=workers.busy,
            reports=workers.reports,
            traffic=traffic,
            stale=traffic.ask_again,
            push=routers.push,
            scaling=scaling.step,
            forget=scaling.forget,
            rotate=TokenRotation(self.cache, time.time).step,
            claims=None
            if release is None
            else NamespaceClaims(self.cache, release, ReleaseWatch(api, time.monotonic).runs),
        )
        self.controller = Controller(reconciler, self.cache.copies, resync_s)

    async def run(self) -> None:
        """Reconcile until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.cache.run())
            group.create_task(self._watches.run(), name="kopf")
            await self.cache.wait_synced()
            group.create_task(self.controller.run())


class ReleaseWatch:
    """Whether other releases of the chart still have an operator; asked for now and then."""

    def __init__(self, api: KubeApi, clock: Callable[[], float]) -> None:
        self._api = api
        self._clock = clock
        self._known: dict[Release, tuple[float, bool]] = {}

    async def runs(self, release: Release) -> bool:
        """Whether it has pods; a release that may not be looked at is taken to have some."""
        asked, known = self._known.get(release, (-TAKEN_RETRY_S, True))
        if self._clock() - asked < TAKEN_RETRY_S:
            return known
        labels = {
            "app.kubernetes.io/name": "tandem-operator",
            "app.kubernetes.io/instance": release.name,
        }
        try:
            known = bool(await self._api.select("Pod", release.namespace, labels))
        except ApiError as error:
            if error.status != 403:
                raise
            known = True
        self._known[release] = (self._clock(), known)
        return known


class Vitals:
    """What the operator's port tells: whether it is ready, and how much it does."""

    def __init__(self, api: KubeApi) -> None:
        self._api = api
        self.operator: Operator | None = None
        self.elector: Elector | None = None

    def ready(self) -> bool:
        """Whether everything was listed; a replica that stands by could lead at any time."""
        return self.operator is None or self.operator.cache.synced

    @property
    def leading(self) -> bool:
        """Whether this replica reconciles."""
        return self.operator is not None and (self.elector is None or self.elector.leading)

    def copies(self, kind: str) -> list[Object]:
        """The resources of a kind; none from a replica that stands by."""
        if self.operator is None or not self.leading:
            return []
        return self.operator.cache.copies(kind, None)

    def readings(self) -> list[Reading]:
        """The metrics, read at each scrape."""
        api = self._api

        def leading() -> float:
            return float(self.leading)

        def of_controller(read: Callable[[Controller], int]) -> Callable[[], float]:
            return lambda: float(read(self.operator.controller)) if self.operator else 0.0

        return [
            ("tandem_operator_leading", "gauge", "Whether this replica reconciles.", leading),
            (
                "tandem_operator_queue_length",
                "gauge",
                "Resources that wait for a pass or are in one.",
                of_controller(lambda c: len(c.queue)),
            ),
            (
                "tandem_operator_passes",
                "counter",
                "Passes over a resource.",
                of_controller(lambda c: c.num_passes),
            ),
            (
                "tandem_operator_failures",
                "counter",
                "Passes that failed and are tried again.",
                of_controller(lambda c: c.num_failures),
            ),
            (
                "tandem_operator_api_writes",
                "counter",
                "Writes to the apiserver.",
                lambda: float(api.num_writes),
            ),
            (
                "tandem_operator_api_reads",
                "counter",
                "Gets and lists asked of the apiserver.",
                lambda: float(api.num_reads),
            ),
        ]


async def lead(api: KubeApi, vitals: Vitals, operator: Operator, elector: Elector | None) -> None:
    """Reconcile while leading; returns when the lead is lost."""
    if elector is not None:
        await elector.acquire()
    vitals.operator = operator
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
    vitals = Vitals(api)
    resources = ResourceMetrics(vitals.copies)
    server = ProbeServer(probes(vitals.ready, vitals.readings(), resources))
    await server.open(args.host or os.environ.get("POD_IP", ""), args.port)
    settings = Settings(
        worker_image=args.worker_image,
        router_image=args.router_image,
        image_pull_policy=args.image_pull_policy,
        network=args.network_policies,
        cluster_domain=args.cluster_domain,
        allow=args.allow,
        pods=args.pod_defaults,
        entrance=args.routers,
        log_format=args.log_format,
        own_namespace=args.own_namespace,
        prometheus_url=args.prometheus_url,
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
    vitals.elector = elector
    own = Release(args.own_namespace, args.release) if args.release else None
    watched = tuple(dict.fromkeys(args.namespace)) or EVERYWHERE
    operator = Operator(api, settings, watched, args.resync_seconds, stop_on_signals, own)
    leading = asyncio.create_task(lead(api, vitals, operator, elector))
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({leading, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if leading.done() and not stop.is_set():
            leading.result()
            return 1  # lost the lead; the pod starts again and stands by
        return 0
    finally:
        for task in (leading, stopped):
            task.cancel()
        await asyncio.gather(leading, stopped, return_exceptions=True)
        await server.close()
        await api.close()
