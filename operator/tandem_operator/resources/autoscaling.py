"""AutoscalingPolicy: how fast and on which signals a managed Router resizes its pools."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from tandem_operator.resources.base import (
    Condition,
    Decimal,
    Duration,
    Metadata,
    Resource,
    ShortText,
)
from tandem_operator.resources.schedule import checked_cron, checked_time_zone

PROMETHEUS = "Prometheus"


class Signal(Resource):
    """One measured value and where to hold it."""

    name: Literal[
        "PendingPrefillTokens", "KVUtilization", "RunningRequests", "Forecast", "Prometheus"
    ] = Field(
        description="Tokens waiting for prefill per worker, share of KV blocks in use, running "
        "requests per worker, the forecast load against the performance profile, or the "
        "policy's query."
    )
    target: Decimal = Field(
        description="Value to hold, in the signal's own unit. Of a query: what one worker takes of "
        "its number."
    )


class Steps(Resource):
    """How fast the count may change in one direction."""

    window: Duration = Field(
        default="30s", description="The wish must have held this long; the mildest one counts."
    )
    max_step: int = Field(
        default=4, ge=1, le=1000, description="Most workers added or removed at once, a count."
    )
    period: Duration = Field(default="15s", description="Least time between two steps.")


class RolePolicy(Resource):
    """Signals and speeds of one role."""

    signals: list[Signal] = Field(
        default_factory=list,
        max_length=4,
        description="The signal that asks for most workers wins; Forecast alone when empty.",
    )
    up: Steps = Field(default_factory=Steps, description="Limits when adding workers.")
    down: Steps = Field(
        default_factory=lambda: Steps(window="5m", max_step=1, period="60s"),
        description="Limits when removing workers.",
        json_schema_extra={"default": {"window": "5m", "maxStep": 1, "period": "60s"}},
    )


class Schedule(Resource):
    """A floor that holds at certain times."""

    name: Annotated[ShortText, StringConstraints(min_length=1)] = Field(
        description="Name in the Router's decisions."
    )
    cron: Annotated[
        str, StringConstraints(min_length=9, max_length=100), AfterValidator(checked_cron)
    ] = Field(description='When it begins: minute hour day month weekday, such as "0 8 * * 1-5".')
    time_zone: Annotated[ShortText, AfterValidator(checked_time_zone)] = Field(
        default="UTC", description="IANA time zone of cron, such as Europe/Berlin."
    )
    duration: Duration = Field(description="How long it holds.")
    min_replicas: int = Field(
        ge=0, le=1000, description="Fewest workers of every role meanwhile, a count."
    )


class Idle(Resource):
    """When pools may sleep."""

    scale_to_zero: bool = Field(
        default=False, description="Stop all workers of a tier that nobody asks."
    )
    after: Duration = Field(default="10m", description="Time without any request before that.")


class AutoscalingPolicySpec(Resource):
    """What an AutoscalingPolicy should be."""

    prefill: RolePolicy = Field(
        default_factory=RolePolicy, description="Signals and speeds of prefill workers."
    )
    decode: RolePolicy = Field(
        default_factory=RolePolicy, description="Signals and speeds of decode workers."
    )
    unified: RolePolicy = Field(
        default_factory=RolePolicy, description="Signals and speeds of unified workers."
    )
    query: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = Field(
        default=None,
        description="PromQL for the signal Prometheus, asked of the installation's: one number for "
        "a whole pool. $namespace, $router, $tier and $role in it are replaced by the names.",
    )
    schedules: list[Schedule] = Field(
        default_factory=list,
        max_length=16,
        description="Fewest workers at certain times, such as office hours.",
    )
    idle: Idle = Field(
        default_factory=Idle, description="When pools may sleep: scale to zero, and after how long."
    )
    missing_metrics: Literal["Hold", "ScaleUp"] = Field(
        default="Hold", description="What to do when a worker does not report."
    )


class AutoscalingPolicyStatus(Resource):
    """What an AutoscalingPolicy is, as last observed."""

    observed_generation: int | None = Field(
        default=None, ge=0, description="metadata.generation this status was computed from."
    )
    conditions: list[Condition] = Field(
        default_factory=list, max_length=8, description="Accepted: whether it can be used."
    )


class AutoscalingPolicy(Resource):
    """How fast and on which signals a managed Router resizes its pools."""

    metadata: Metadata
    spec: AutoscalingPolicySpec = Field(default_factory=AutoscalingPolicySpec)
    status: AutoscalingPolicyStatus = Field(default_factory=AutoscalingPolicyStatus)
