"""The control loop's hands: ask router and worker pods, decide, write replicas and thresholds.

One call per reconcile pass of a Router in `scaling.mode: Managed` or `Advise`. Everything that is
decided is decided in `managed`; here it is only fetched and written, and what cannot be fetched is
missing. In mode Advise nothing is written.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from tandem_operator.autoscale.loop import Plan
from tandem_operator.autoscale.observe import asked_threshold, current_threshold
from tandem_operator.autoscale.placement import Unplaced
from tandem_operator.autoscale.router_loops import ManagedScaling
from tandem_operator.autoscale.sizing import Role
from tandem_operator.plan.decode import parse
from tandem_operator.plan.objects import (
    MODEL_LABEL,
    ROLE_LABEL,
    SCALED_ANNOTATION,
    Object,
    Settings,
    child,
)
from tandem_operator.plan.pods import is_ready
from tandem_operator.plan.router import rates_name
from tandem_operator.plan.scheduling import unschedulable
from tandem_operator.reconcile.children import controlled, onto
from tandem_operator.reconcile.cluster_api import ClusterApi
from tandem_operator.reconcile.engine_reports import EngineReports, is_foreign
from tandem_operator.reconcile.pod_client import ask_json, identity, peer_token
from tandem_operator.reconcile.prometheus import Query, queried, query_prometheus
from tandem_operator.resources import Model, Router
from tandem_operator.resources.autoscaling import AutoscalingPolicy, AutoscalingPolicySpec

logger = logging.getLogger("tandem.operator")

ASK_TIMEOUT_S = 2.0
PERIOD_S = 5.0  # between two steps of one Router's loop
KEEP_RATES_S = 1800.0  # between two writes of the hourly rates
WAKE_PERIOD_S = 1.0  # the same while all of its pools are empty: somebody may be waiting


class Ask(Protocol):
    """How a pod is asked; `tandem_operator.reconcile.pod_client.ask_json`, or a fake."""

    def __call__(
        self,
        host: str,
        port: int,
        path: str,
        body: Object | None = None,
        token: str = "",
        timeout_s: float = ASK_TIMEOUT_S,
        method: str | None = None,
    ) -> Awaitable[tuple[int, Any]]:
        """Status and decoded reply; raises OSError, TimeoutError or ValueError without one."""
        ...


class ScalingDriver:
    """Steps the loops of managed Routers.

    Args:
        api: the cluster.
        settings: ports of workers and routers.
        clock: seconds since the epoch.
        ask: how pods are asked.
        query: how the installation's Prometheus is asked.
    """

    def __init__(
        self,
        api: ClusterApi,
        settings: Settings,
        clock: Callable[[], float] = time.time,
        ask: Ask = ask_json,
        query: Query = query_prometheus,
    ) -> None:
        self._api = api
        self._settings = settings
        self._clock = clock
        self._ask = ask
        self._query = query
        self._managed = ManagedScaling()
        self._reports = EngineReports()
        self._stepped: dict[str, float] = {}
        self._asleep: set[str] = set()
        self._kept_at: dict[str, float] = {}

    async def step(
        self, router: Router, models: Mapping[str, Model], pods: list[Object]
    ) -> list[dict[str, str]]:
        """One step, at most every `PERIOD_S`; the last decisions for the Router's status.

        Args:
            models: the Router's Models by name.
            pods: the Router's own pods.

        Raises:
            ApiError: the cluster failed a call.
        """
        namespace = router.metadata.namespace
        key = f"{namespace}/{router.metadata.name}"
        now = self._clock()
        if not router.spec.scaling.has_loop:
            self.forget(namespace, router.metadata.name)
            return []
        if now < self._stepped.get(key, now):
            # The wall clock was set back: all that is remembered lies in the future now, and the
            # loop would wait until it is past.
            self.forget(namespace, router.metadata.name)
        # A reconcile comes a moment early or late; a step left out would double the period.
        period = 0.9 * WAKE_PERIOD_S if key in self._asleep else PERIOD_S
        if now - self._stepped.get(key, -PERIOD_S) < period:
            return self._managed.status_decisions(key)
        self._stepped[key] = now
        ready = [pod for pod in pods if is_ready(pod)]
        token = await peer_token(self._api, namespace)
        tiers = _tiers_by_model(router)
        pools = await self._pools(namespace, tiers)
        workers = await self._workers(namespace, tiers)
        policy = await self._policy(router)
        states, loads, said = await asyncio.gather(
            self._states(ready, token),
            self._loads(workers, token),
            queried(self._settings.prometheus_url, router, policy, pools, self._query),
        )
        if any(int(obj["spec"].get("replicas", 0)) for obj in pools.values()):
            self._asleep.discard(key)
        else:
            self._asleep.add(key)
        plan = self._managed.step(
            now,
            key,
            router,
            models,
            policy,
            {pool: int(obj["spec"].get("replicas", 0)) for pool, obj in pools.items()},
            states,
            loads,
            _unplaced(workers),
            "" if self._managed.knows(key) else await self._remembered(router),
            said,
        )
        if plan is not None and router.spec.scaling.mode == "Managed":
            await self._write(plan, pools, ready, states, token, self._reasons(key))
            await self._remember(router, key, now)
        return self._managed.status_decisions(key)

    def forget(self, namespace: str, name: str) -> None:
        """Drop what is remembered of a Router that is gone or no longer managed."""
        key = f"{namespace}/{name}"
        self._managed.forget(key)
        self._stepped.pop(key, None)
        self._asleep.discard(key)
        self._kept_at.pop(key, None)

    async def _remembered(self, router: Router) -> str:
        """The hourly rates that an earlier operator learnt; empty where there are none."""
        name = rates_name(router.metadata.name)
        found = await self._api.get("ConfigMap", router.metadata.namespace, name)
        if found is None or not controlled(found, router.metadata.uid):
            return ""
        return str((found.get("data") or {}).get("hourly", ""))

    async def _remember(self, router: Router, key: str, now: float) -> None:
        """Keep what was learnt of the week, once in a while: one small ConfigMap per Router."""
        if now - self._kept_at.setdefault(key, now) < KEEP_RATES_S:
            return
        self._kept_at[key] = now
        text = self._managed.remembered(key)
        if text is None:
            return
        name = rates_name(router.metadata.name)
        found = await self._api.named("ConfigMap", router.metadata.namespace, name)
        if found is not None and not controlled(found, router.metadata.uid):
            logger.warning(
                "ConfigMap %s of %s is not this Router's and is left as it is: what its control "
                "loop learns of the week is lost at a restart of the operator; rename the "
                "ConfigMap, or delete it if it is not needed",
                name,
                key,
            )
            return
        kept = child(router, "v1", "ConfigMap", name, {"data": {"hourly": text}})
        await self._api.apply(onto(found, kept))

    def _reasons(self, key: str) -> dict[str, str]:
        """Why each pool was last scaled, by tier and role."""
        return {d["pool"]: d["reason"] for d in self._managed.status_decisions(key)}

    async def _policy(self, router: Router) -> AutoscalingPolicySpec | None:
        ref = router.spec.scaling.policy_ref
        if ref is None:
            return None
        obj = await self._api.get("AutoscalingPolicy", router.metadata.namespace, ref.name)
        read = parse(obj) if obj is not None else None
        # Where it cannot be read, the Router's status says so: built-in values hold.
        return read.spec if isinstance(read, AutoscalingPolicy) else None

    async def _pools(
        self, namespace: str, tiers: Mapping[str, str]
    ) -> dict[tuple[str, Role], Object]:
        found: dict[tuple[str, Role], Object] = {}
        for obj in await self._api.select("WorkerPool", namespace):
            spec = obj["spec"]
            tier = tiers.get((spec.get("modelRef") or {}).get("name", ""))
            if tier is not None:
                found[tier, spec["role"]] = obj
        return found

    async def _states(self, ready: list[Object], token: str) -> dict[str, Any]:
        port = self._settings.router_port
        answers = await asyncio.gather(
            *(self._get(pod, port, "/admin/state", token) for pod in ready)
        )
        return {
            identity(pod): body
            for pod, body in zip(ready, answers, strict=True)
            if body is not None
        }

    async def _workers(self, namespace: str, tiers: Mapping[str, str]) -> list[tuple[str, Object]]:
        """Pods of each tier, ready or not."""
        found: list[tuple[str, Object]] = []
        for model, tier in tiers.items():
            pods = await self._api.select("Pod", namespace, {MODEL_LABEL: model})
            found += [(tier, pod) for pod in pods]
        return found

    async def _loads(self, workers: list[tuple[str, Object]], token: str) -> list[tuple[str, Any]]:
        asked = [(tier, pod) for tier, pod in workers if is_ready(pod)]
        port = self._settings.worker_port
        answers = await asyncio.gather(*(self._load(pod, port, token) for _, pod in asked))
        return [
            (tier, body) for (tier, _), body in zip(asked, answers, strict=True) if body is not None
        ]

    async def _load(self, pod: Object, port: int, token: str) -> Any:
        if is_foreign(pod):
            return await self._reports.read(pod, port, ASK_TIMEOUT_S)
        return await self._get(pod, port, "/v1/load", token)

    async def _get(self, pod: Object, port: int, path: str, token: str) -> Any:
        """The decoded reply; None where there is no good one."""
        try:
            status, body = await self._ask(
                pod["status"]["podIP"], port, path, token=token, timeout_s=ASK_TIMEOUT_S
            )
        except (OSError, TimeoutError, ValueError):
            return None
        return body if status == 200 else None

    async def _write(
        self,
        plan: Plan,
        pools: Mapping[tuple[str, Role], Object],
        ready: list[Object],
        states: Mapping[str, Any],
        token: str,
        reasons: Mapping[str, str],
    ) -> None:
        for key, count in plan.workers.items():
            obj = pools.get(key)
            before = 0 if obj is None else int(obj["spec"].get("replicas", 0))
            if obj is not None and before != count:
                metadata = obj["metadata"]
                because = reasons.get("/".join(key), "the control loop")
                # First, so that whoever sees the new count finds the reason.
                await self._api.annotate(
                    "WorkerPool",
                    metadata["namespace"],
                    metadata["name"],
                    {SCALED_ANNOTATION: f"{before}>{count} {because}"},
                )
                await self._api.patch_spec(
                    "WorkerPool", metadata["namespace"], metadata["name"], {"replicas": count}
                )
        # Each router pod on its own: one that has just started still has the configured one.
        wanted = min(1.0, max(-1.0, plan.threshold))
        behind = [
            pod
            for pod in ready
            if (state := states.get(identity(pod))) is not None
            and current_threshold([state]) not in (None, wanted)
            and asked_threshold(state) != wanted  # else its quality floor holds a lower one
        ]
        await asyncio.gather(*(self._put_threshold(pod, wanted, token) for pod in behind))

    async def _put_threshold(self, pod: Object, threshold: float, token: str) -> None:
        name = pod["metadata"]["name"]
        try:
            status, body = await self._ask(
                pod["status"]["podIP"],
                self._settings.router_port,
                "/admin/set-points",
                {"gain_threshold": threshold},
                token,
                ASK_TIMEOUT_S,
                "PUT",
            )
        except (OSError, TimeoutError, ValueError) as error:
            logger.warning("router pod %s did not take its threshold: %r", name, error)
            return
        if status != 200:
            said = f"{status} {str(body)[:200]}"
            logger.warning("router pod %s refused its threshold: %s", name, said)


def _unplaced(workers: list[tuple[str, Object]]) -> dict[tuple[str, Role], Unplaced]:
    """Pods by pool that the scheduler finds no node for."""
    found: dict[tuple[str, Role], Unplaced] = {}
    for tier, pod in workers:
        role = (pod["metadata"].get("labels") or {}).get(ROLE_LABEL)
        why = unschedulable(pod)
        if why is None or role not in ("prefill", "decode", "unified"):
            continue
        key: tuple[str, Role] = (tier, role)
        found[key] = Unplaced(1 + (found[key].count if key in found else 0), why)
    return found


def _tiers_by_model(router: Router) -> dict[str, str]:
    return {
        tier.model_ref.name: tier.name for tier in router.spec.tiers if tier.model_ref is not None
    }
