"""The loops of Routers in `scaling.mode: Managed` or `Advise`, remembered between passes.

    managed = ManagedScaling()
    plan = managed.step(now, key, router, models, policy, workers, states, loads)
    # plan.workers -> WorkerPool.spec.replicas; plan.threshold -> PUT /admin/set-points of each
    # router pod when it differs; status_decisions(...) -> Router.status.decisions

Reconcile itself stays level-triggered: losing this memory (a restart) costs the forecast's last
minutes and the scale-down window, never correctness. What was learnt of the week is handed out and
back (`remembered`, `kept`), because that takes weeks to learn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tandem_operator.autoscale.loop import Autoscaler, Observation, Plan
from tandem_operator.autoscale.observe import (
    Traffic,
    TrafficMeter,
    by_pool,
    current_threshold,
    num_waiting,
    performance_profile,
    pool_signals,
    routing_curve,
    threshold_limit,
)
from tandem_operator.autoscale.placement import Unplaced
from tandem_operator.autoscale.profile import PerformanceProfile
from tandem_operator.autoscale.seasons import HourlyRates
from tandem_operator.autoscale.settings import loop_settings, scheduled_floor
from tandem_operator.autoscale.sizing import Operating, Role
from tandem_operator.resources import Model, Router
from tandem_operator.resources.autoscaling import AutoscalingPolicySpec
from tandem_operator.resources.timestamps import timestamp

SHARE_SMOOTHING = 0.2
ADVISED = "advised, not done: "


@dataclass
class _Loop:
    autoscaler: Autoscaler
    advises: bool = False
    meter: TrafficMeter = field(default_factory=TrafficMeter)
    # The last known ones: a pool that sleeps reports nothing.
    profiles: dict[str, PerformanceProfile] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)


class ManagedScaling:
    """One loop per managed Router; `forget` it when the Router goes or leaves the mode."""

    def __init__(self) -> None:
        self._loops: dict[str, _Loop] = {}

    def knows(self, key: str) -> bool:
        """Whether a Router's loop has begun."""
        return key in self._loops

    def forget(self, key: str) -> None:
        """Drop a Router's loop."""
        self._loops.pop(key, None)

    def remembered(self, key: str) -> str | None:
        """What a Router's loop has learnt of the week, to be kept; None before it has begun."""
        loop = self._loops.get(key)
        return None if loop is None else loop.autoscaler.demand.hourly.as_json()

    def step(
        self,
        now_s: float,
        key: str,
        router: Router,
        models: Mapping[str, Model],
        policy: AutoscalingPolicySpec | None,
        workers: Mapping[tuple[str, Role], int],
        states: Mapping[str, Any],
        loads: Iterable[tuple[str, Any]],
        unplaced: Mapping[tuple[str, Role], Unplaced] | None = None,
        kept: str = "",
        queried: Mapping[tuple[str, Role], float | str] | None = None,
    ) -> Plan | None:
        """One decision; None for a Router without pools of ours.

        Args:
            now_s: seconds since the epoch.
            key: "<namespace>/<name>" of the Router.
            models: by name.
            workers: wanted count of each pool by (tier, role), from the WorkerPools.
            states: `/admin/state` bodies of the ready router pods, by pod and start.
            loads: (tier, `/v1/load` body) of each ready worker pod.
            unplaced: workers that no node takes, by pool.
            kept: what `remembered` told an earlier operator; read when the loop begins.
            queried: what the policy's query says of each pool, or why it says nothing.
        """
        settings = loop_settings(router, models, policy)
        if not settings.pools:
            self.forget(key)
            return None
        loop = self._loops.get(key)
        if loop is None:
            loop = self._loops[key] = _Loop(Autoscaler(settings, HourlyRates.parse(kept)))
        elif loop.autoscaler.settings != settings:
            loop.autoscaler.reconfigure(settings)
        loop.advises = router.spec.scaling.mode == "Advise"
        grouped = by_pool(loads)
        tiers = {pool.tier for pool in settings.pools}
        for tier in tiers:
            own = [load for (name, _), found in grouped.items() if name == tier for load in found]
            profile = performance_profile(own, _max_num_seqs(router, models, tier))
            if profile is not None:
                loop.profiles[tier] = profile
        bodies = list(states.values())
        threshold = current_threshold(bodies)
        traffic = loop.meter.read(now_s, states)
        backlog = dict(traffic.held) if traffic is not None else {}
        for (tier, role), found in grouped.items():
            if role == "prefill":
                continue  # its queue is of requests that wait at a decode worker, too
            backlog[tier] = backlog.get(tier, 0.0) + num_waiting(found)
        floor = scheduled_floor(policy, datetime.fromtimestamp(now_s, UTC))
        return loop.autoscaler.step(
            now_s,
            Observation(
                load=traffic.load if traffic is not None else None,
                arrived=traffic.arrived if traffic is not None else None,
                backlog=backlog,
                unplaced=unplaced or {},
                workers=workers,
                curve=routing_curve(bodies) or _as_it_goes(loop, traffic, threshold or 0.0),
                profiles=loop.profiles,
                threshold=threshold if threshold is not None else 0.0,
                threshold_limit=threshold_limit(bodies),
                floor=floor.workers,
                floor_name=floor.name,
                signals={pool: pool_signals(found) for pool, found in grouped.items()},
                queried=queried or {},
            ),
        )

    def status_decisions(self, key: str) -> list[dict[str, str]]:
        """The last ten decisions as `Router.status.decisions`, newest last."""
        loop = self._loops.get(key)
        if loop is None:
            return []
        return [
            {
                "time": timestamp(decision.at_s),
                "pool": decision.pool[:64],
                "before": f"{decision.before:g}",
                "after": f"{decision.after:g}",
                "reason": f"{ADVISED if loop.advises else ''}{decision.reason}"[:1024],
            }
            for decision in loop.autoscaler.recent
        ]


def _as_it_goes(loop: _Loop, traffic: Traffic | None, threshold: float) -> tuple[Operating, ...]:
    """Where no prompt is scored (one tier, no predictor): the shares that requests have anyway."""
    if traffic is not None and (total := sum(traffic.arrived.values())) > 0.0:
        weight = SHARE_SMOOTHING if loop.shares else 1.0
        for tier in {*traffic.arrived, *loop.shares}:
            share = traffic.arrived.get(tier, 0.0) / total
            before = loop.shares.get(tier, share)
            loop.shares[tier] = before + weight * (share - before)
    return (Operating(threshold, dict(loop.shares), 1.0),) if loop.shares else ()


def _max_num_seqs(router: Router, models: Mapping[str, Model], tier: str) -> int:
    for spec in router.spec.tiers:
        if spec.name == tier and spec.model_ref is not None and spec.model_ref.name in models:
            return models[spec.model_ref.name].spec.engine.max_num_seqs
    return 256
