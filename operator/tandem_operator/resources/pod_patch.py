"""Finds what a podPatch holds and no pod template has, before an apiserver or a pod has to say it.

The fields are those of the Kubernetes client library's own models; an apiserver has the last word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tandem_operator.resources.field_errors import YamlPath, suggest

_QUANTITY = re.compile(
    r"^[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$"
)
_ITEMS = re.compile(r"^[Ll]ist\[(.+)\]$")
_VALUES = re.compile(r"^[Dd]ict\[str, (.+)\]$")


def misfits(patch: Mapping[str, Any]) -> list[tuple[YamlPath, str]]:
    """Path below the patch and a sentence for each field that a pod template cannot have."""
    return [*_misfits(patch, "V1PodTemplateSpec", ()), *wrong_quantities(patch)]


def wrong_quantities(patch: Mapping[str, Any]) -> Iterator[tuple[YamlPath, str]]:
    """The same for what containers ask for, of which an apiserver says no path."""
    spec = patch.get("spec")
    for kind in ("initContainers", "containers"):
        listed = spec.get(kind) if isinstance(spec, Mapping) else None
        for number, container in enumerate(listed if isinstance(listed, list) else ()):
            resources = container.get("resources") if isinstance(container, Mapping) else None
            for part in ("requests", "limits"):
                asked = resources.get(part) if isinstance(resources, Mapping) else None
                for name, value in (asked if isinstance(asked, Mapping) else {}).items():
                    if value is not None and _QUANTITY.match(str(value)) is None:
                        at = ("spec", kind, number, "resources", part, str(name))
                        yield at, f"{value!r} is not a quantity; write 500m, 4, 4Gi or the like"


def _misfits(value: Any, kind: str, at: YamlPath) -> Iterator[tuple[YamlPath, str]]:
    if value is None:  # removes the field
        return
    if (items := _ITEMS.match(kind)) is not None:
        if not isinstance(value, list):
            yield at, "must be a list"
            return
        for number, item in enumerate(value):
            yield from _misfits(item, items[1], (*at, number))
    elif (values := _VALUES.match(kind)) is not None:
        if not isinstance(value, Mapping):
            yield at, "must be a mapping"
            return
        for key, item in value.items():
            yield from _misfits(item, values[1], (*at, str(key)))
    elif kind.startswith("V1"):
        yield from _object_misfits(value, kind, at)
    elif kind == "bool" and not isinstance(value, bool):
        yield at, f"must be true or false, not {value!r}"
    elif kind == "int" and (isinstance(value, bool) or not isinstance(value, int)):
        yield at, f"must be a whole number, not {value!r}"
    elif kind == "str" and isinstance(value, (Mapping, list)):
        yield at, "must be text"


def _object_misfits(value: Any, kind: str, at: YamlPath) -> Iterator[tuple[YamlPath, str]]:
    # Half a second; only who writes a podPatch pays for it.
    from kubernetes.aio.client import models

    if not isinstance(value, Mapping):
        yield at, "must be a mapping of fields"
        return
    known = getattr(models, kind)
    types = {known.attribute_map[name]: found for name, found in known.openapi_types.items()}
    for key, item in value.items():
        if key in types:
            yield from _misfits(item, types[key], (*at, str(key)))
        else:
            yield (*at, str(key)), f"no field of a pod; {suggest(str(key), types)}"
