"""The environment variables of a container, from values, ConfigMaps, Secrets and the pod itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tandem_operator.node.volumes import Lookup, MountError, contents

_REFERENCE = re.compile(r"\$(\$|\(([A-Za-z_][A-Za-z0-9_.-]*)\))")


def expand(text: str, env: Mapping[str, str]) -> str:
    """Replace $(NAME) by its value as Kubernetes does; $$ is a dollar, unknown names stay."""

    def value(match: re.Match[str]) -> str:
        if match[1] == "$":
            return "$"
        return env.get(match[2], match[0])

    return _REFERENCE.sub(value, text)


async def environment(
    pod: Mapping[str, Any], container: Mapping[str, Any], pod_ips: Sequence[str], lookup: Lookup
) -> dict[str, str]:
    """The variables that the container's manifest asks for.

    Raises MountError for a missing ConfigMap, Secret or key.
    """
    namespace = str(pod["metadata"].get("namespace", "default"))
    env: dict[str, str] = {}
    for source in container.get("envFrom") or []:
        for key, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
            if ref := source.get(key):
                obj = await lookup(kind, namespace, ref["name"])
                if obj is None and not ref.get("optional"):
                    raise MountError(f"{kind} {ref['name']!r} does not exist")
                for name, value in contents(obj or {}).items():
                    env[source.get("prefix", "") + name] = value.decode()
    for entry in container.get("env") or []:
        if "value" in entry:
            env[entry["name"]] = expand(str(entry["value"]), env)
        elif (
            found := await _value_from(entry.get("valueFrom") or {}, pod, pod_ips, lookup)
        ) is not None:
            env[entry["name"]] = found
    return env


async def _value_from(
    source: Mapping[str, Any], pod: Mapping[str, Any], pod_ips: Sequence[str], lookup: Lookup
) -> str | None:
    namespace = str(pod["metadata"].get("namespace", "default"))
    if ref := source.get("fieldRef"):
        return field(pod, pod_ips, str(ref["fieldPath"]))
    for key, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
        if ref := source.get(key):
            obj = await lookup(kind, namespace, ref["name"])
            value = contents(obj or {}).get(ref["key"])
            if value is None and not ref.get("optional"):
                raise MountError(f"{kind} {ref['name']!r} has no key {ref['key']!r}")
            return None if value is None else value.decode()
    return ""


def field(pod: Mapping[str, Any], pod_ips: Sequence[str], path: str) -> str:
    """A downward API field of the pod, such as metadata.name or metadata.labels['x']."""
    metadata, spec = pod["metadata"], pod["spec"]
    if path == "status.podIPs":
        return ",".join(pod_ips)
    if path in ("status.podIP", "status.hostIP"):
        return pod_ips[0]
    if path == "spec.nodeName":
        return str(spec.get("nodeName", ""))
    if path == "spec.serviceAccountName":
        return str(spec.get("serviceAccountName", "default"))
    if match := re.match(r"^metadata\.(labels|annotations)\['(.+)'\]$", path):
        return str((metadata.get(match[1]) or {}).get(match[2], ""))
    return str(metadata.get(path.removeprefix("metadata."), ""))
