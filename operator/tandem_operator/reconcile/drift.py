"""Whether a live object still is what was applied: compared before each write, to save it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem_operator.plan.objects import Object, digest
from tandem_operator.reconcile.cluster_api import ATOMIC_MAPS

APPLIED_ANNOTATION = "tandem.dev/applied"


def stamp(obj: Object) -> Object:
    """The object with an annotation that tells later what was applied."""
    metadata = obj["metadata"]
    annotations = {**metadata.get("annotations", {}), APPLIED_ANNOTATION: digest(obj)}
    return {**obj, "metadata": {**metadata, "annotations": annotations}}


def needs_apply(live: Object | None, wanted: Object) -> bool:
    """Whether applying would change anything: absent, planned otherwise, or drifted."""
    if live is None:
        return True
    applied = (live["metadata"].get("annotations") or {}).get(APPLIED_ANNOTATION)
    if applied != wanted["metadata"]["annotations"][APPLIED_ANNOTATION]:
        return True
    return not contains(live, wanted)


# Lists that server-side apply merges by a key: entries that others add are theirs.
_MERGED_BY = {
    "ownerReferences": "uid",
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
}


def contains(live: Any, wanted: Any) -> bool:
    """Whether live holds everything in wanted; an apiserver adds defaults, never takes away."""
    if isinstance(wanted, Mapping):
        return isinstance(live, Mapping) and all(
            live.get(k) == v
            if k in ATOMIC_MAPS
            else _merged(live.get(k), v, _MERGED_BY[k])
            if k in _MERGED_BY and isinstance(v, list)
            else contains(live.get(k), v)
            for k, v in wanted.items()
            if v not in ({}, [])
        )
    if isinstance(wanted, list):
        return (
            isinstance(live, list)
            and len(live) == len(wanted)
            and all(contains(a, b) for a, b in zip(live, wanted, strict=True))
        )
    return bool(live == wanted)


def _merged(live: Any, wanted: list[Any], key: str) -> bool:
    if not isinstance(live, list):
        return False
    by_key = {entry.get(key): entry for entry in live if isinstance(entry, Mapping)}
    return all(contains(by_key.get(entry.get(key)), entry) for entry in wanted)
