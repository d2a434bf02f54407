"""What a Router, its Models and its AutoscalingPolicy ask of the control loop, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from tandem_operator.autoscale.loop import LoopSettings, Speed
from tandem_operator.autoscale.profile import Slo
from tandem_operator.autoscale.sizing import Ceilings, PoolSpec, Role
from tandem_operator.resources import Model, Router
from tandem_operator.resources.autoscaling import AutoscalingPolicySpec, RolePolicy, Steps
from tandem_operator.resources.base import seconds
from tandem_operator.resources.budget_split import budget_split
from tandem_operator.resources.schedule import in_force

ROLES: tuple[Role, ...] = ("prefill", "decode", "unified")
DEFAULT_MAX_WORKERS = 64
# Where the routers' threshold begins without one of their Router's (tandem_router has the same).
DEFAULT_THRESHOLDS = {"Learned": 0.1, "Fixed": 0.1, "Length": 0.5}


def loop_settings(
    router: Router, models: Mapping[str, Model], policy: AutoscalingPolicySpec | None
) -> LoopSettings:
    """Settings of the loop of one Router; tiers without a Model here (external) have no pools.

    Args:
        models: by name; missing ones are left out, reconcile reports them.
        policy: built-in values when None.
    """
    policy = policy or AutoscalingPolicySpec()
    pools: list[PoolSpec] = []
    for tier in router.spec.tiers:
        model = models.get(tier.model_ref.name) if tier.model_ref is not None else None
        if model is None:
            continue
        for role in ROLES:
            spec = getattr(model.spec, role)
            if spec is None:
                continue
            floor = 0 if policy.idle.scale_to_zero else 1
            lowest = spec.min_replicas if spec.min_replicas is not None else floor
            highest = spec.max_replicas if spec.max_replicas is not None else DEFAULT_MAX_WORKERS
            pools.append(
                PoolSpec(
                    tier=tier.name,
                    role=role,
                    gpus=spec.gpus,
                    usd_per_hour=float(spec.usd_per_hour or 0.0),
                    minimum=min(lowest, highest),
                    maximum=highest,
                )
            )
    slo, budget = router.spec.slo, router.spec.budget
    roles: dict[Role, RolePolicy] = {role: getattr(policy, role) for role in ROLES}
    return LoopSettings(
        pools=tuple(pools),
        slo=Slo(
            ttft_s=seconds(slo.ttft.target) if slo.ttft else None,
            tpot_s=seconds(slo.tpot.target) if slo.tpot else None,
            ttft_percentile=float(slo.ttft.percentile) if slo.ttft else 95.0,
            tpot_percentile=float(slo.tpot.percentile) if slo.tpot else 95.0,
        ),
        ceilings=Ceilings(
            gpus=budget.gpus,
            usd_per_hour=budget_split(router, models).workers_usd_per_hour,
        ),
        quality_floor=router.spec.held_floor,
        base_threshold=_base_threshold(router),
        up={role: _speed(found.up) for role, found in roles.items()},
        down={role: _speed(found.down) for role, found in roles.items()},
        idle_after_s=seconds(policy.idle.after) if policy.idle.scale_to_zero else None,
        missing_metrics=policy.missing_metrics,
        signals={
            role: {signal.name: float(signal.target) for signal in found.signals}
            for role, found in roles.items()
            if found.signals
        },
    )


def _base_threshold(router: Router) -> float:
    """Where the threshold stays while no quality floor moves it and no budget is short."""
    given = router.spec.threshold
    return DEFAULT_THRESHOLDS[router.spec.predictor.ranks_by] if given is None else float(given)


def _speed(steps: Steps) -> Speed:
    return Speed(seconds(steps.window), steps.max_step, seconds(steps.period))


@dataclass(frozen=True, slots=True)
class ScheduledFloor:
    """Fewest workers of every pool, and the schedule that asks for them; none while name is ""."""

    workers: int = 0
    name: str = ""


def scheduled_floor(policy: AutoscalingPolicySpec | None, now: datetime) -> ScheduledFloor:
    """The schedule in force at `now` (with a time zone) that asks for most workers."""
    found = ScheduledFloor()
    for schedule in policy.schedules if policy else ():
        if schedule.min_replicas > found.workers and in_force(
            schedule.cron, schedule.time_zone, seconds(schedule.duration), now
        ):
            found = ScheduledFloor(schedule.min_replicas, schedule.name)
    return found
