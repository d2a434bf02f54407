"""The four custom resources as types; the CRD YAML, the loader and the planner all start here."""

from pydantic import BaseModel

from tandem_operator.resources.autoscaling import AutoscalingPolicy, AutoscalingPolicySpec
from tandem_operator.resources.base import API_VERSION, GROUP, VERSION, Condition, Metadata
from tandem_operator.resources.model import Model, ModelSpec, ModelStatus, RoleSpec
from tandem_operator.resources.router import Router, RouterSpec, RouterStatus, TierSpec
from tandem_operator.resources.workerpool import WorkerPool, WorkerPoolSpec, WorkerPoolStatus

KINDS: dict[str, type[Model] | type[Router] | type[AutoscalingPolicy] | type[WorkerPool]] = {
    "Model": Model,
    "Router": Router,
    "AutoscalingPolicy": AutoscalingPolicy,
    "WorkerPool": WorkerPool,
}

SPECS: dict[str, type[BaseModel]] = {
    "Model": ModelSpec,
    "Router": RouterSpec,
    "AutoscalingPolicy": AutoscalingPolicySpec,
    "WorkerPool": WorkerPoolSpec,
}

__all__ = [
    "API_VERSION",
    "GROUP",
    "KINDS",
    "SPECS",
    "VERSION",
    "AutoscalingPolicy",
    "AutoscalingPolicySpec",
    "Condition",
    "Metadata",
    "Model",
    "ModelSpec",
    "ModelStatus",
    "RoleSpec",
    "Router",
    "RouterSpec",
    "RouterStatus",
    "TierSpec",
    "WorkerPool",
    "WorkerPoolSpec",
    "WorkerPoolStatus",
]
