"""What pods are made of, kept on their Deployment: so people are told why there are new ones."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tandem_operator.plan.objects import digest
from tandem_operator.resources.base import Object

MADE_OF_ANNOTATION = "tandem.dev/made-of"
# How a volume's source is called, and which of its fields names it.
_SOURCES = {
    "configMap": ("ConfigMap", "name"),
    "secret": ("Secret", "secretName"),
    "persistentVolumeClaim": ("claim", "claimName"),
    "hostPath": ("folder", "path"),
}


def made_of(template: Object) -> str:
    """The parts of a template, as JSON, before it has a revision."""
    spec = template["spec"]
    container = spec["containers"][0]
    rest = {
        "pod": {
            name: value for name, value in spec.items() if name not in ("containers", "volumes")
        },
        "container": {
            name: value
            for name, value in container.items()
            if name not in ("image", "resources", "args", "volumeMounts")
        },
        "more": spec["containers"][1:],
        "metadata": template.get("metadata"),
    }
    parts = {
        "image": container.get("image", ""),
        "resources": json.dumps(container.get("resources") or {}, sort_keys=True),
        "mounts": ", ".join(_mounted(volume) for volume in spec.get("volumes") or []),
        "arguments": " ".join(container.get("args") or []),
        "other settings of pods": digest(rest),
    }
    return json.dumps({name: value for name, value in parts.items() if value})


def _mounted(volume: Mapping[str, Object]) -> str:
    for source, (kind, field) in _SOURCES.items():
        if source in volume:
            return f"{kind} {volume[source].get(field, '')}"
    return str(volume.get("name"))


def why_new_pods(before: str | None, after: str) -> str:
    """What differs between two Deployments' annotations, in words."""
    old = json.loads(before) if before else {}
    new = json.loads(after)
    differing = [name for name in new.keys() | old.keys() if old.get(name) != new.get(name)]
    if not old or not differing:
        return "the operator makes pods another way than before"
    return "; ".join(
        _differs(name, old.get(name, ""), new.get(name, "")) for name in sorted(differing)
    )


def _differs(name: str, old: str, new: str) -> str:
    if name == "mounts":
        was, now = old.split(", "), new.split(", ")
        gone = [f"no longer {each}" for each in was if each not in now]
        return f"{name}: {', '.join([each for each in now if each not in was] + gone)}"
    return name if name.startswith("other") else f"{name}: {old} -> {new}"
