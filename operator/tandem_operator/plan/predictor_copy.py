"""The predictor of a ConfigMap, copied under a name that does not change.

Router pods mount the copy from their start, whether there is one or not: so a Router may name
another ConfigMap, or its first, and the pods that run read it. Kubernetes gives a running pod no
mount of another name.
"""

from __future__ import annotations

from collections.abc import Mapping

from tandem_operator.plan.objects import Problem, child, digest
from tandem_operator.resources import Router
from tandem_operator.resources.base import Object

COPY_DIR = "/var/lib/tandem/copied-predictor"
COPIED_ANNOTATION = "tandem.dev/copied-from"
AT_ANNOTATION = "tandem.dev/copied-at"
_PREFIX = "configmap://"
_CONTENT = ("data", "binaryData")


def copy_name(router: str) -> str:
    """Name of the copy. router: the Router's."""
    return f"{router}-router-predictor"


def copied_source(router: Router) -> tuple[str, str] | None:
    """The ConfigMap that a Router's artifact is in, and the key ("" for all); None: elsewhere."""
    artifact = router.spec.predictor.artifact
    if router.spec.predictor.ranks_by != "Learned" or not (artifact or "").startswith(_PREFIX):
        return None
    name, _, key = str(artifact).removeprefix(_PREFIX).partition("/")
    return name, key


def copy_path(key: str) -> str:
    """Where a router pod finds what was copied."""
    return f"{COPY_DIR}/{key}".rstrip("/")


def copy_volume(router: Router) -> tuple[Object, Object]:
    """The volume and the mount of each router pod."""
    source = {"name": copy_name(router.metadata.name), "optional": True}
    mount = {"name": "copied-predictor", "mountPath": COPY_DIR, "readOnly": True}
    return {"name": "copied-predictor", "configMap": source}, mount


def is_current(copy: Object, name: str, version: str) -> bool:
    """Whether a copy holds what the ConfigMap of that name and version does."""
    said = (copy["metadata"].get("annotations") or {}).get(COPIED_ANNOTATION)
    return bool(said == _origin(name, version, copy))


def copied_at(copy: Object) -> str:
    """Since when a copy holds what it does, RFC 3339."""
    return str((copy["metadata"].get("annotations") or {}).get(AT_ANNOTATION, ""))


def planned_copy(
    router: Router, name: str, version: str, content: Mapping[str, Object], at: str
) -> Object:
    """The copy. content: an object with the same data; version: the original's; at: since when."""
    body = {field: content[field] for field in _CONTENT if content.get(field)}
    marks = {COPIED_ANNOTATION: _origin(name, version, body), AT_ANNOTATION: at}
    return child(
        router, "v1", "ConfigMap", copy_name(router.metadata.name), body, annotations=marks
    )


def _origin(name: str, version: str, content: Mapping[str, Object]) -> str:
    held = digest({field: content[field] for field in _CONTENT if content.get(field)})
    return f"{name} {version} {held}"


def missing_copy(name: str, own: str) -> Problem:
    """That there is nothing to copy. own: the copy's name."""
    if name == own:
        text = f"ConfigMap {name} is the operator's copy; name the ConfigMap that you made"
        return Problem("PredictorReady", "VolumeMissing", text)
    return Problem(
        "PredictorReady",
        "VolumeMissing",
        f"ConfigMap {name} does not exist; create it in this namespace (kubectl create configmap "
        f"{name} --from-file=ARTIFACT), or correct predictor.artifact",
    )


def missing_key(name: str, key: str, content: Mapping[str, Object]) -> Problem | None:
    """That the ConfigMap does not hold the key that the artifact names."""
    keys = sorted({*(content.get("data") or {}), *(content.get("binaryData") or {})})
    if not key or key in keys:
        return None
    return Problem(
        "PredictorReady",
        "VolumeMissing",
        f"ConfigMap {name} has no key {key}, only {', '.join(keys)[:200] or 'none at all'}; "
        "correct predictor.artifact",
    )
