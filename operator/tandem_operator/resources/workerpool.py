"""WorkerPool: the scalable part of a Model, one per role; `kubectl scale` and an HPA work on it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from tandem_operator.resources.base import Condition, Metadata, ObjectRef, Resource, ShortText, Text
from tandem_operator.resources.model import Role


class WorkerPoolSpec(Resource):
    """What a WorkerPool should be."""

    model_ref: ObjectRef = Field(description="The Model that these workers serve.")
    role: Role = Field(description="unified, prefill or decode.")
    # Seeded at 1 because an HPA treats 0 as switched off.
    replicas: int = Field(default=1, ge=0, le=1000, description="Workers wanted, a count.")
    min_replicas: int = Field(
        default=0, ge=0, le=1000, description="Fewest workers that scaling may leave, a count."
    )
    max_replicas: int = Field(
        default=1000, ge=1, le=1000, description="Most workers that scaling may start, a count."
    )


class LastScale(Resource):
    """Why the count last changed."""

    time: ShortText = Field(description="When, RFC 3339, UTC.")
    before: int = Field(ge=0, description="Workers before, a count.")
    after: int = Field(ge=0, description="Workers after, a count.")
    reason: Text = Field(description="Who or what changed it.")


class WorkerPoolStatus(Resource):
    """What a WorkerPool is, as last observed."""

    observed_generation: int | None = Field(
        default=None, ge=0, description="metadata.generation this status was computed from."
    )
    replicas: int = Field(default=0, ge=0, description="Workers that exist, a count.")
    ready_replicas: int = Field(default=0, ge=0, description="Workers ready, a count.")
    selector: Annotated[str, StringConstraints(max_length=512)] | None = Field(
        default=None, description="Label selector of the pods, for /scale."
    )
    last_scale: LastScale | None = Field(
        default=None, description="When, from what to what and why the count last changed."
    )
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=8,
        description="Ready: whether as many workers are ready as are wanted.",
    )


class WorkerPool(Resource):
    """One role of a Model as a number of workers."""

    metadata: Metadata
    spec: WorkerPoolSpec
    status: WorkerPoolStatus = Field(default_factory=WorkerPoolStatus)
