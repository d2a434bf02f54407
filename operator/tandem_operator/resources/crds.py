"""Writes the CRD YAML of the four kinds; `python -m tandem_operator.resources.crds DIR`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from tandem_operator.resources.autoscaling import AutoscalingPolicySpec, AutoscalingPolicyStatus
from tandem_operator.resources.base import (
    GROUP,
    NAME_PATTERN,
    NAME_TEXT,
    RESERVED_NAME_PATTERN,
    RESERVED_NAME_TEXT,
    VERSION,
)
from tandem_operator.resources.model import ModelSpec, ModelStatus
from tandem_operator.resources.router import RouterSpec, RouterStatus
from tandem_operator.resources.rules import RULES
from tandem_operator.resources.schema import Schema, structural
from tandem_operator.resources.workerpool import WorkerPoolSpec, WorkerPoolStatus


def _condition(kind: str, field: str = "status") -> str:
    return f'.status.conditions[?(@.type=="{kind}")].{field}'


def _column(name: str, path: str, kind: str = "string", priority: int = 0) -> Schema:
    column: Schema = {"name": name, "type": kind, "jsonPath": path}
    if priority:
        column["priority"] = priority
    return column


_AGE = _column("Age", ".metadata.creationTimestamp", "date")

COLUMNS: dict[str, list[Schema]] = {
    "Model": [
        _column("Ready", _condition("Ready")),
        _column("Reason", _condition("Ready", "reason")),
        _column("Workers", ".status.ready"),
        _column("$/H", ".status.usdPerHour"),
        _column("GPUs", ".status.gpus", "integer"),
        _column("Revision", ".status.revision", priority=1),
        _column("Message", ".status.message", priority=1),
        _AGE,
    ],
    "Router": [
        _column("Ready", _condition("Ready")),
        _column("Reason", _condition("Ready", "reason")),
        _column("SLO", _condition("SLOMet", "reason")),
        _column("Budget", _condition("WithinBudget", "reason")),
        _column("$/H", ".status.usdPerHour"),
        _column("GPUs", ".status.gpus", "integer"),
        _column("Endpoint", ".status.endpoint"),
        _column("Quality", ".status.quality.measured"),
        _column("Message", ".status.message", priority=1),
        _AGE,
    ],
    "AutoscalingPolicy": [
        _column("Accepted", _condition("Accepted")),
        _column("To-Zero", ".spec.idle.scaleToZero", "boolean"),
        _column("Without-Metrics", ".spec.missingMetrics"),
        _column("Message", _condition("Accepted", "message"), priority=1),
        _AGE,
    ],
    "WorkerPool": [
        _column("Model", ".spec.modelRef.name"),
        _column("Role", ".spec.role"),
        _column("Wanted", ".spec.replicas", "integer"),
        _column("Running", ".status.replicas", "integer"),
        _column("Ready", ".status.readyReplicas", "integer"),
        _column("Scaled-From", ".status.lastScale.before", "integer"),
        _column("Because", ".status.lastScale.reason"),
        _column("Min", ".spec.minReplicas", "integer", priority=1),
        _column("Max", ".spec.maxReplicas", "integer", priority=1),
        _column("Scaled", ".status.lastScale.time", "date", priority=1),
        _AGE,
    ],
}

SHORT_NAMES = {"Model": "mdl", "Router": "rtr", "AutoscalingPolicy": "asp", "WorkerPool": "wp"}
PLURALS = {
    "Model": "models",
    "Router": "routers",
    "AutoscalingPolicy": "autoscalingpolicies",
    "WorkerPool": "workerpools",
}
_TYPES: dict[str, tuple[Any, Any, str]] = {
    "Model": (ModelSpec, ModelStatus, "A language model and the worker pools that serve it."),
    "Router": (RouterSpec, RouterStatus, "One OpenAI-compatible endpoint over several tiers."),
    "AutoscalingPolicy": (
        AutoscalingPolicySpec,
        AutoscalingPolicyStatus,
        "How fast and on which signals a managed Router resizes its pools.",
    ),
    "WorkerPool": (
        WorkerPoolSpec,
        WorkerPoolStatus,
        "One role of a Model as a number of workers; written by the operator.",
    ),
}


def open_api(kind: str) -> Schema:
    """The structural schema of one kind, from apiVersion down."""
    spec_type, status_type, description = _TYPES[kind]
    spec = structural(spec_type, RULES[kind], ("spec",))
    spec["description"] = f"What the {kind} should be."
    status = structural(status_type, [], ("status",))
    status["description"] = f"What the {kind} is, as last observed; written by the operator."
    needs_spec = bool(spec.get("required"))
    if not needs_spec:
        spec["default"] = {}
    # Names of children are the resource's name with a suffix, and 63 is their limit.
    limit = 50 if kind == "WorkerPool" else 40
    name_rules: list[Schema] = [
        {
            "rule": f"size(self.metadata.name) <= {limit}",
            "message": f"metadata.name must have at most {limit} characters; shorten it",
        },
        {"rule": f"self.metadata.name.matches(r'{NAME_PATTERN}')", "message": NAME_TEXT},
    ]
    if kind == "WorkerPool":
        rule = "self.metadata.name == self.spec.modelRef.name + '-' + self.spec.role"
        text = (
            "a WorkerPool is called MODEL-ROLE and is written by the operator; make a Model "
            "instead, and scale the pool that follows from it"
        )
        name_rules.append({"rule": rule, "message": text})
    if kind in ("Model", "Router"):
        rule = f"!self.metadata.name.matches(r'{RESERVED_NAME_PATTERN}')"
        name_rules.append({"rule": rule, "message": RESERVED_NAME_TEXT})
    return {
        "type": "object",
        "description": description,
        "x-kubernetes-validations": name_rules,
        **({"required": ["spec"]} if needs_spec else {}),
        "properties": {
            "apiVersion": {
                "type": "string",
                "description": f"{GROUP}/{VERSION}.",
            },
            "kind": {"type": "string", "description": f"{kind}."},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
    }


def crd(kind: str) -> Schema:
    """The CustomResourceDefinition of one kind."""
    plural = PLURALS[kind]
    subresources: Schema = {"status": {}}
    if kind == "WorkerPool":
        subresources["scale"] = {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [SHORT_NAMES[kind]],
                "categories": ["tandem"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": subresources,
                    "additionalPrinterColumns": COLUMNS[kind],
                    "schema": {"openAPIV3Schema": open_api(kind)},
                }
            ],
        },
    }


class _Plain(yaml.SafeDumper):
    """Writes repeated objects out instead of naming them with anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def crd_yaml(kind: str) -> str:
    """The YAML text of one CRD, as committed."""
    head = "# Written by `python -m tandem_operator.resources.crds`; do not edit.\n"
    return head + yaml.dump(crd(kind), Dumper=_Plain, sort_keys=False, width=100)


def file_name(kind: str) -> str:
    """The name of the kind's file below the CRD folder."""
    return f"{GROUP}_{PLURALS[kind]}.yaml"


def main(argv: list[str] | None = None) -> int:
    """Write the CRDs of all kinds into the folder that is the only argument."""
    args = sys.argv[1:] if argv is None else argv
    if len(args) != 1:
        sys.stderr.write("usage: python -m tandem_operator.resources.crds DIR\n")
        return 2
    folder = Path(args[0])
    folder.mkdir(parents=True, exist_ok=True)
    for kind in _TYPES:
        (folder / file_name(kind)).write_text(crd_yaml(kind), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
