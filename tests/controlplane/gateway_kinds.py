"""Kinds of others that the operator writes, as strict as theirs: an apiserver checks what it gets.

Facts of Gateway API v1 (HTTPRoute) and of the Gateway API Inference Extension v1 (InferencePool,
commit 84436a96): the fields that Tandem may write, their types, bounds, patterns and rules. An
unknown field is refused by server-side apply.
"""

from __future__ import annotations

import json
from typing import Any

ROUTES = "httproutes.gateway.networking.k8s.io"
POOLS = "inferencepools.inference.networking.k8s.io"

_LABEL = "^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"
_GROUP = "^$|^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
_KIND = "^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$"
_HOST = "^([*][.])?[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
_TIME = "^([0-9]{1,5}(h|m|s|ms)){1,4}$"


def _text(pattern: str = "", most: int = 253, least: int = 0) -> dict[str, Any]:
    form = {"pattern": pattern} if pattern else {}
    return {"type": "string", "minLength": least, "maxLength": most, **form}


def _object(*required: str, **fields: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "object", "properties": fields}
    return made | ({"required": list(required)} if required else {})


def _list(items: dict[str, Any], most: int, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


PORT = {"type": "integer", "format": "int32", "minimum": 1, "maximum": 65535}
_NUMBER = _object("number", number=PORT)

_picker = _object(
    "name",
    group={**_text(_GROUP), "default": ""},
    kind={**_text(_KIND, 63, 1), "default": "Service"},
    name=_text(least=1),
    port=_NUMBER,
    failureMode={"type": "string", "enum": ["FailOpen", "FailClose"], "default": "FailClose"},
)
_picker["x-kubernetes-validations"] = [
    {"rule": "self.kind != 'Service' || has(self.port)", "message": "a Service needs port"}
]
_targets = _list(_NUMBER, 8, 1)
_targets["x-kubernetes-validations"] = [
    {
        "rule": "self.all(p, self.exists_one(q, q.number == p.number))",
        "message": "port number must be unique",
    }
]
_labels = {
    "type": "object",
    "additionalProperties": _text(_LABEL, 63),
    "minProperties": 1,
    "maxProperties": 64,
}
POOL_SPEC = _object(
    "selector",
    "targetPorts",
    appProtocol={"type": "string", "enum": ["http", "kubernetes.io/h2c"], "default": "http"},
    endpointPickerRef=_picker,
    selector=_object("matchLabels", matchLabels=_labels),
    targetPorts=_targets,
)

_reference = _object(
    "name",
    group=_text(_GROUP),
    kind=_text(_KIND, 63, 1),
    namespace=_text(least=1, most=63),
    name=_text(least=1),
    port=PORT,
)
_parent = _object("name", **_reference["properties"], sectionName=_text(_HOST, least=1))
_match = _object(
    path=_object(
        type={"type": "string", "enum": ["Exact", "PathPrefix", "RegularExpression"]},
        value=_text(most=1024),
    )
)
_rule = _object(
    matches=_list(_match, 64),
    backendRefs=_list(_reference, 16),
    timeouts=_object(request=_text(_TIME), backendRequest=_text(_TIME)),
)
ROUTE_SPEC = _object(
    parentRefs=_list(_parent, 32),
    hostnames=_list(_text(_HOST, 253, 1), 16),
    rules=_list(_rule, 16, 1),
)


def _definition(kind: str, plural: str, spec: dict[str, Any]) -> dict[str, Any]:
    """A CustomResourceDefinition of one version, v1, whose status is nobody's here."""
    names = {"kind": kind, "plural": plural.split(".")[0], "singular": kind.lower()}
    status = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    schema = _object("spec", metadata={"type": "object"}, spec=spec, status=status)
    fields = schema["properties"]
    fields["apiVersion"] = fields["kind"] = {"type": "string"}
    version = {"name": "v1", "served": True, "storage": True, "subresources": {"status": {}}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": plural,
            "annotations": {"api-approved.kubernetes.io": "https://gateway-api.sigs.k8s.io"},
        },
        "spec": {
            "group": plural.split(".", 1)[1],
            "scope": "Namespaced",
            "names": names,
            "versions": [{**version, "schema": {"openAPIV3Schema": schema}}],
        },
    }


DEFINITIONS = {
    "apiVersion": "v1",
    "kind": "List",
    "items": [
        _definition("HTTPRoute", ROUTES, ROUTE_SPEC),
        _definition("InferencePool", POOLS, POOL_SPEC),
    ],
}


def install(cluster: Any) -> None:
    """Both kinds, once the apiserver serves them."""
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(DEFINITIONS))
    for name in (ROUTES, POOLS):
        cluster.kubectl("wait", "--for=condition=Established", f"crd/{name}", "--timeout=30s")


def remove(cluster: Any) -> None:
    """Both kinds and all their objects."""
    cluster.run("kubectl", "delete", "crd", ROUTES, POOLS, "--ignore-not-found")
