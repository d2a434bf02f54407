"""An object store that answers as an apiserver does, in this process.

Versions, generations, watches, labels, server-side apply with one set of fields per manager,
owner references with garbage collection. Lists are owned as a whole, which suffices for manifests
that one manager writes.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from tandem_operator.reconcile.cluster_api import ATOMIC_MAPS, FIELD_MANAGER, ApiError, WatchEvent
from tandem_operator.resources import SPECS
from tandem_operator.resources.base import Object
from tandem_operator.resources.rules import violations
from tandem_operator.resources.timestamps import timestamp

StoreKey = tuple[str, str, str]


class Store:
    """A ClusterApi in memory. Reads and watch events are copies; callers may change them."""

    def __init__(self) -> None:
        self._objects: dict[StoreKey, Object] = {}
        self._managed: dict[StoreKey, dict[str, Object]] = {}
        self._version = 0
        self._listeners: list[Callable[[WatchEvent], None]] = []
        self.num_writes = 0

    def listen(self, listener: Callable[[WatchEvent], None]) -> None:
        """Call listener for every change from now on."""
        self._listeners.append(listener)

    def unlisten(self, listener: Callable[[WatchEvent], None]) -> None:
        """Call listener no more."""
        self._listeners.remove(listener)

    # Synchronous core -----------------------------------------------------------------------

    def read(self, kind: str, namespace: str, name: str) -> Object | None:
        """A copy of the object, None when there is none."""
        obj = self._objects.get((kind, namespace, name))
        return copy.deepcopy(obj) if obj is not None else None

    def find(
        self, kind: str, namespace: str | None = None, labels: Mapping[str, str] | None = None
    ) -> list[Object]:
        """Copies of all objects of a kind that carry all the labels, oldest first."""
        found = []
        for (k, ns, _), obj in self._objects.items():
            if k != kind or (namespace is not None and ns != namespace):
                continue
            own = obj["metadata"].get("labels") or {}
            if all(own.get(key) == value for key, value in (labels or {}).items()):
                found.append(copy.deepcopy(obj))
        return found

    def write(self, obj: Object, manager: str = FIELD_MANAGER) -> Object:
        """Server-side apply: fields that the manager applied before and now leaves out go away."""
        body = _plain(obj)
        key = _key(body)
        old = self._objects.get(key)
        uid = body["metadata"].pop("uid", None)
        if uid is not None and (old is None or old["metadata"]["uid"] != uid):
            raise ApiError(409, f"{key[0]} {key[2]!r} is not the one with uid {uid}")
        if old is not None and old.get("immutable") and old.get("data") != body.get("data"):
            raise ApiError(422, f"{key[0]} {key[2]!r} is immutable")
        base = copy.deepcopy(old) if old is not None else _skeleton(body)
        managed = self._managed.setdefault(key, {})
        _remove_left_out(base, managed.get(manager, {}), body)
        for other, fields in managed.items():
            if other != manager:
                _restore(base, fields)
        managed[manager] = copy.deepcopy(body)
        return self._save(key, old, _merge(base, body, ATOMIC_MAPS))

    def change(self, kind: str, namespace: str, name: str, patch: Object) -> Object:
        """Merge a patch into an object without owning its fields.

        Raises ApiError 404 when there is none.
        """
        key = (kind, namespace, name)
        old = self._objects.get(key)
        if old is None:
            raise ApiError(404, f"{kind} {name!r} not found")
        return self._save(key, old, _merge(copy.deepcopy(old), patch))

    def add(self, obj: Object) -> Object | None:
        """Create an object, None when it exists."""
        key = _key(obj)
        if key in self._objects:
            return None
        return self._save(key, None, _merge(_skeleton(obj), _plain(obj)))

    def remove(self, kind: str, namespace: str, name: str) -> None:
        """Delete an object; a pod is marked first and goes when its node lets go of it."""
        key = (kind, namespace, name)
        obj = self._objects.get(key)
        if obj is None:
            return
        if kind == "Pod" and obj["spec"].get("nodeName"):
            if not obj["metadata"].get("deletionTimestamp"):
                self.change(kind, namespace, name, {"metadata": {"deletionTimestamp": timestamp()}})
            return
        self.drop(kind, namespace, name)

    def drop(self, kind: str, namespace: str, name: str) -> None:
        """Take an object out of the store and delete what it owns."""
        key = (kind, namespace, name)
        obj = self._objects.pop(key, None)
        if obj is None:
            return
        self._managed.pop(key, None)
        self._version += 1
        self.num_writes += 1
        self._tell(WatchEvent("DELETED", obj))
        uid = obj["metadata"]["uid"]
        for (k, ns, n), other in list(self._objects.items()):
            owners = other["metadata"].get("ownerReferences") or []
            if any(o["uid"] == uid for o in owners):
                self.remove(k, ns, n)

    def _save(self, key: StoreKey, old: Object | None, new: Object) -> Object:
        if old is None or old.get("spec") != new.get("spec"):
            new = _admit(new, old)
        metadata = new["metadata"]
        if old is not None:
            if _without_version(old) == _without_version(new):
                return copy.deepcopy(old)
            if old.get("spec") != new.get("spec"):
                metadata["generation"] = int(old["metadata"].get("generation", 1)) + 1
        self._version += 1
        self.num_writes += 1
        metadata["resourceVersion"] = str(self._version)
        self._objects[key] = new
        self._tell(WatchEvent("ADDED" if old is None else "MODIFIED", new))
        return copy.deepcopy(new)

    def _tell(self, event: WatchEvent) -> None:
        copied = WatchEvent(event.type, copy.deepcopy(event.object))
        for listener in list(self._listeners):
            listener(copied)

    # ClusterApi -----------------------------------------------------------------------------

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """See ClusterApi."""
        return self.read(kind, namespace, name)

    async def named(self, kind: str, namespace: str, name: str) -> Object | None:
        """See ClusterApi."""
        return self.read(kind, namespace, name)

    async def version(self, kind: str, namespace: str, name: str) -> str | None:
        """See ClusterApi."""
        found = self.read(kind, namespace, name)
        return None if found is None else str(found["metadata"]["resourceVersion"])

    async def secret_labels(self, namespace: str, name: str) -> Mapping[str, str] | None:
        """See ClusterApi."""
        found = self.read("Secret", namespace, name)
        return None if found is None else found["metadata"].get("labels") or {}

    async def select(
        self, kind: str, namespace: str | None = None, labels: Mapping[str, str] | None = None
    ) -> list[Object]:
        """See ClusterApi."""
        return self.find(kind, namespace, labels)

    async def apply(self, obj: Object) -> Object:
        """See ClusterApi."""
        return self.write(obj)

    async def create(self, obj: Object) -> Object | None:
        """See ClusterApi."""
        return self.add(obj)

    async def patch_spec(self, kind: str, namespace: str, name: str, spec: Object) -> Object:
        """See ClusterApi."""
        return self.change(kind, namespace, name, {"spec": spec})

    async def merge(self, kind: str, namespace: str, name: str, body: Object) -> bool:
        """See ClusterApi."""
        if (kind, namespace, name) not in self._objects:
            return False
        self.change(kind, namespace, name, body)
        return True

    async def patch_secret(self, namespace: str, name: str, body: Object) -> None:
        """See ClusterApi."""
        found = self.read("Secret", namespace, name)
        version = body["metadata"].get("resourceVersion")
        if found is not None and version not in (None, found["metadata"]["resourceVersion"]):
            raise ApiError(409, f"Secret {name!r} has changed")
        self.change("Secret", namespace, name, body)

    async def annotate(
        self, kind: str, namespace: str, name: str, annotations: Mapping[str, str]
    ) -> None:
        """See ClusterApi."""
        await self.merge(kind, namespace, name, {"metadata": {"annotations": dict(annotations)}})

    async def apply_status(self, obj: Object) -> Object:
        """See ClusterApi."""
        key = _key(obj)
        old = self._objects.get(key)
        if old is None:
            raise ApiError(404, f"{key[0]} {key[2]!r} not found")
        return self._save(key, old, {**copy.deepcopy(old), "status": copy.deepcopy(obj["status"])})

    async def delete(self, kind: str, namespace: str, name: str) -> None:
        """See ClusterApi."""
        self.remove(kind, namespace, name)

    async def watch(self, kind: str, namespace: str | None = None) -> AsyncIterator[WatchEvent]:
        """The objects there are, as ADDED, and then every change."""
        queue: asyncio.Queue[WatchEvent] = asyncio.Queue()
        for obj in self.find(kind, namespace):
            queue.put_nowait(WatchEvent("ADDED", obj))

        def listener(event: WatchEvent) -> None:
            of = event.object["metadata"]["namespace"]
            if event.object["kind"] == kind and namespace in (None, of):
                queue.put_nowait(event)

        self.listen(listener)
        try:
            while True:
                yield await queue.get()
        finally:
            self.unlisten(listener)


def _key(obj: Object) -> StoreKey:
    metadata = obj["metadata"]
    return obj["kind"], metadata.get("namespace", "default"), metadata["name"]


def _skeleton(obj: Object) -> Object:
    return {
        "apiVersion": obj["apiVersion"],
        "kind": obj["kind"],
        "metadata": {
            "name": obj["metadata"]["name"],
            "namespace": obj["metadata"].get("namespace", "default"),
            "uid": str(uuid.uuid4()),
            "creationTimestamp": timestamp(),
            "generation": 1,
        },
    }


def _plain(obj: Object) -> Object:
    """A copy with a Secret's stringData turned into data."""
    body = copy.deepcopy(obj)
    if body["kind"] == "Secret" and "stringData" in body:
        for key, value in body.pop("stringData").items():
            body.setdefault("data", {})[key] = base64.b64encode(str(value).encode()).decode()
    return body


def _merge(base: Object, patch: Mapping[str, Any], atomic: frozenset[str] = frozenset()) -> Object:
    for key, value in patch.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict) and key not in atomic:
            _merge(base[key], value, atomic)
        elif value is None:
            base.pop(key, None)
        else:
            base[key] = copy.deepcopy(value)
    return base


def _remove_left_out(base: Object, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Remove what was in before and is not in after."""
    for key, value in before.items():
        if key not in after:
            if isinstance(value, Mapping) and isinstance(base.get(key), dict):
                _remove_left_out(base[key], value, {})
                if not base[key]:
                    base.pop(key)
            else:
                base.pop(key, None)
        elif (
            isinstance(value, Mapping)
            and isinstance(after[key], Mapping)
            and isinstance(base.get(key), dict)
        ):
            _remove_left_out(base[key], value, after[key])


def _restore(base: Object, fields: Mapping[str, Any]) -> None:
    """Put back what another manager applied and this one has just given up."""
    for key, value in fields.items():
        if key not in base:
            base[key] = copy.deepcopy(value)
        elif isinstance(value, Mapping) and isinstance(base[key], dict):
            _restore(base[key], value)


def _without_version(obj: Object) -> Object:
    metadata = {k: v for k, v in obj["metadata"].items() if k != "resourceVersion"}
    return {**obj, "metadata": metadata}


def _admit(obj: Object, old: Object | None) -> Object:
    """Defaults and rules of the custom resources, as the CRDs have them."""
    spec_type = SPECS.get(obj["kind"])
    if spec_type is None:
        return obj
    try:
        spec = spec_type.model_validate(obj.get("spec") or {})
    except ValueError as error:
        raise ApiError(422, f"{obj['kind']} {obj['metadata']['name']!r}: {error}") from error
    admitted = {**obj, "spec": spec.model_dump(by_alias=True, exclude_none=True, mode="json")}
    if broken := violations(obj["kind"], admitted, old):
        text = "; ".join(v.message for v in broken)
        raise ApiError(422, f"{obj['kind']} {obj['metadata']['name']!r}: {text}")
    return admitted
