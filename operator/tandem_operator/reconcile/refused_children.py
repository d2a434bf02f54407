"""A child that the apiserver refuses is a condition of its owner, in the server's own words."""

from __future__ import annotations

import re

from tandem_operator.plan.objects import Problem
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.resources.base import Object

# How soon a refused child is tried again without any event: a quota or a policy may have changed.
REFUSED_RETRY_S = 60.0

_REQUEST = re.compile(r"^[A-Z]+ /\S+: ")
# What the server says of its own doing before it says what is wrong.
_PREFACE = re.compile(
    r"^failed to (?:create typed patch object \([^)]*\)|convert new object .*?Kind=\w+): "
)


def refused_child(child: Object, error: ApiError) -> Problem | None:
    """What to say of a child that cannot be written; None where trying again may help."""
    kind, name = child["kind"], child["metadata"]["name"]
    if kind == "InferencePool" and error.status == 404:
        return Problem(
            "GatewayReady",
            "NoInferencePools",
            "the cluster has no kind InferencePool any more; install the definitions of the "
            "Gateway API Inference Extension",
        )
    if not error.refuses_body:
        return None
    said = _PREFACE.sub("", _REQUEST.sub("", str(error))).strip().rstrip(".")
    return Problem(
        "Accepted",
        "ChildRefused",
        f"the cluster refuses {kind} {name}: {said}; {_next_step(child, error)}",
    )


def _next_step(child: Object, error: ApiError) -> str:
    if error.status == 403:
        return "change the policy or quota that forbids it, or grant the operator the right"
    if child["kind"] == "PersistentVolumeClaim" and "immutable" in str(error):
        name = child["metadata"]["name"]
        return (
            f"a claim keeps the class and modes it was made with; kubectl delete pvc {name} "
            "lets it be made anew"
        )
    if child["kind"] == "Deployment":
        return "correct podPatch, which is merged into the pod last, or the field behind it"
    return "correct the field that it is made from"
