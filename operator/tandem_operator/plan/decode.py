"""Custom resources as an apiserver stores them: read into types, or told what is wrong."""

from __future__ import annotations

from pydantic import ValidationError

from tandem_operator.plan.objects import Object, Problem
from tandem_operator.resources import (
    KINDS,
    SPECS,
    AutoscalingPolicy,
    Model,
    Router,
    WorkerPool,
)
from tandem_operator.resources.field_errors import explain, show_path
from tandem_operator.resources.rules import Violation, violations


def models_of(router: Object) -> list[str]:
    """Names of the Models that a Router's tiers use, each once; works on any stored object."""
    refs = [tier.get("modelRef") or {} for tier in router.get("spec", {}).get("tiers") or []]
    return list(dict.fromkeys(str(ref["name"]) for ref in refs if "name" in ref))


def parse(obj: Object) -> Model | Router | AutoscalingPolicy | WorkerPool | Problem:
    """The typed resource, or what is wrong with it.

    An apiserver with the CRDs refuses most of this earlier; fields that slip through are said here.
    """
    kind = KINDS[obj["kind"]]
    try:
        resource = kind.model_validate({"metadata": obj["metadata"], "spec": obj.get("spec") or {}})
    except ValidationError as error:
        texts = []
        for item in error.errors(include_url=False):
            loc = item["loc"]
            path, message = explain(SPECS[obj["kind"]], {**item, "loc": loc[1:]})
            texts.append(f"{show_path(('spec', *path))}: {message}")
        return Problem("Accepted", "Invalid", "; ".join(texts))
    wire = {"spec": resource.spec.to_wire()}
    if broken := _sentences(violations(obj["kind"], wire, harmless=False)):
        return Problem("Accepted", "Invalid", "; ".join(broken))
    return resource


def leftovers(resource: Model | Router) -> list[str]:
    """What is refused today where it is written, and was stored before: it changes nothing."""
    wire = {"spec": resource.spec.to_wire()}
    return _sentences(violations(type(resource).__name__, wire, harmless=True))


def _sentences(broken: list[Violation]) -> list[str]:
    return [f"{show_path(v.path)}: {v.message}" for v in broken]
