"""Pure planning: a resource and what was observed in, Kubernetes manifests out."""

from tandem_operator.plan.model import plan_model, revision_of
from tandem_operator.plan.objects import Plan, Problem, Scale, Settings
from tandem_operator.plan.router import plan_router

__all__ = ["Plan", "Problem", "Scale", "Settings", "plan_model", "plan_router", "revision_of"]
