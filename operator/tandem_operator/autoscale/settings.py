"""What a Router, its Models and its AutoscalingPolicy ask of the control loop, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from tandem_operator.autoscale.loop import LoopSettings, Speed
from tandem_operator.autoscale.profile import Slo
from tandem_operator.autoscale.sizing import Ceilings, PoolSpec, Role
from tandem_operator.plan.budget_split import budget_split
from tandem_operator.resources import Model, Router
from tandem_operator.resources.autoscaling import AutoscalingPolicySpec, RolePolicy, Steps
from tandem_operator.resources.base import seconds

ROLES: tuple[Role, ...] = ("prefill", "decode", "unified")
DEFAULT_MAX_WORKERS = 64
MAX_SCHEDULE = timedelta(days=7)


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
    percentiles = [target.percentile for target in (slo.ttft, slo.tpot) if target is not None]
    roles: dict[Role, RolePolicy] = {role: getattr(policy, role) for role in ROLES}
    return LoopSettings(
        pools=tuple(pools),
        slo=Slo(
            ttft_s=seconds(slo.ttft.target) if slo.ttft else None,
            tpot_s=seconds(slo.tpot.target) if slo.tpot else None,
            percentile=float(max(percentiles, default=95)),
        ),
        ceilings=Ceilings(
            gpus=budget.gpus,
            usd_per_hour=budget_split(router, models).workers_usd_per_hour,
        ),
        quality_floor=float(router.spec.objective.quality_floor),
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


def _speed(steps: Steps) -> Speed:
    return Speed(seconds(steps.window), steps.max_step, seconds(steps.period))


def scheduled_floor(policy: AutoscalingPolicySpec | None, now: datetime) -> int:
    """The most workers that a schedule in force at `now` (with a time zone) asks for.

    A schedule whose cron line or time zone cannot be read asks for nothing.
    """
    floor = 0
    for schedule in policy.schedules if policy else ():
        try:
            zone = ZoneInfo(schedule.time_zone)
            fields = cron_fields(schedule.cron)
        except (KeyError, ValueError, OSError):
            continue
        if schedule.min_replicas <= floor:
            continue
        local = now.astimezone(zone).replace(second=0, microsecond=0)
        length = min(MAX_SCHEDULE, timedelta(seconds=seconds(schedule.duration)))
        minutes = max(1, int(length.total_seconds() // 60))
        if any(_begins(fields, local - timedelta(minutes=back)) for back in range(minutes)):
            floor = schedule.min_replicas
    return floor


_RANGES = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
Fields = tuple[frozenset[int], frozenset[int], frozenset[int], frozenset[int], frozenset[int]]


def cron_fields(line: str) -> Fields:
    """The five sets that a cron line names: minutes, hours, days, months, weekdays (0 is Sunday).

    Raises ValueError with the part that cannot be read.
    """
    parts = line.split()
    if len(parts) != 5:
        raise ValueError(
            f"cron {line!r} has {len(parts)} fields; give minute hour day month weekday"
        )
    minute, hour, day, month, weekday = (
        _field(part, low, high) for part, (low, high) in zip(parts, _RANGES, strict=True)
    )
    return minute, hour, day, month, frozenset(value % 7 for value in weekday)


def _field(text: str, low: int, high: int) -> frozenset[int]:
    values: set[int] = set()
    for part in text.split(","):
        span, _, step_text = part.partition("/")
        first_text, _, last_text = span.partition("-")
        try:
            step = int(step_text) if step_text else 1
            first = low if first_text == "*" else int(first_text)
            last = (
                int(last_text) if last_text else (high if first_text == "*" or step_text else first)
            )
        except ValueError:
            raise ValueError(f"cron field {part!r} is not a number, range or *") from None
        if step < 1 or not low <= first <= last <= high:
            raise ValueError(f"cron field {part!r} is outside {low}-{high}")
        values.update(range(first, last + 1, step))
    return frozenset(values)


def _begins(fields: Fields, moment: datetime) -> bool:
    minute, hour, day, month, weekday = fields
    if moment.minute not in minute or moment.hour not in hour or moment.month not in month:
        return False
    on_day, on_weekday = moment.day in day, moment.isoweekday() % 7 in weekday
    # As cron does: when both are restricted, either will do.
    if len(day) < 31 and len(weekday) < 7:
        return on_day or on_weekday
    return on_day and on_weekday
