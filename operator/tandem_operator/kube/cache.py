"""Copies of the objects that the operator works on, kept current by list and watch.

A reconcile reads the copies instead of a dozen lists, so that a thousand Models cost the apiserver
one watch per kind. A stale copy does no harm: writes are idempotent or checked by version, and the
change that is on its way wakes the reconcile again. After a broken watch or a 410 the list
replaces all copies, so that an object deleted meanwhile is gone here too.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

from tandem_operator.api import KIND_INFO, ApiError
from tandem_operator.kube.client import Gone, KubeApi
from tandem_operator.plan.objects import MANAGED, MODEL_LABEL, ROUTER_LABEL

Object = dict[str, Any]
logger = logging.getLogger("tandem.operator")

# What a copy does not need; managedFields alone are half of an object.
_DROPPED_ANNOTATIONS = ("kubectl.kubernetes.io/last-applied-configuration",)
RETRY_FIRST_S, RETRY_MAX_S = 0.2, 10.0

OWN_KINDS = ("Model", "Router", "AutoscalingPolicy")
MANAGED_KINDS = (
    "WorkerPool",
    "Deployment",
    "Service",
    "ConfigMap",
    "PodDisruptionBudget",
    "NetworkPolicy",
    "ServiceAccount",
    "PersistentVolumeClaim",
    "Role",
    "RoleBinding",
    "Pod",
)
_INDEXED = (MODEL_LABEL, ROUTER_LABEL)


class KindCache:
    """The copies of one kind."""

    def __init__(
        self,
        api: KubeApi,
        kind: str,
        namespace: str | None,
        selector: str,
        changed: Callable[[Object], None],
    ) -> None:
        self._api = api
        self._kind = kind
        self._namespace = namespace
        self._selector = selector
        self._changed = changed
        self._objects: dict[tuple[str, str], Object] = {}
        self._index: dict[tuple[str, str, str], set[tuple[str, str]]] = {}
        self.synced = asyncio.Event()

    def get(self, namespace: str, name: str) -> Object | None:
        """The copy of one object."""
        return self._objects.get((namespace, name))

    def select(self, namespace: str | None, labels: Mapping[str, str]) -> list[Object]:
        """The copies that carry all the labels, sorted by name."""
        keys: set[tuple[str, str]] | None = None
        for label in _INDEXED:
            if label in labels and namespace is not None:
                keys = self._index.get((namespace, label, labels[label]), set())
        found = []
        for key in sorted(self._objects.keys() if keys is None else keys):
            obj = self._objects[key]
            own = obj["metadata"].get("labels") or {}
            if namespace in (None, key[0]) and all(own.get(k) == v for k, v in labels.items()):
                found.append(obj)
        return found

    async def run(self) -> None:
        """Keep the copies current until cancelled."""
        delay = RETRY_FIRST_S
        version = ""
        while True:
            try:
                if not version:
                    version = await self._relist()
                    delay = RETRY_FIRST_S
                async for what, obj in self._api.watch(
                    self._kind, self._namespace, self._selector, version
                ):
                    version = obj["metadata"]["resourceVersion"]
                    delay = RETRY_FIRST_S
                    if what != "BOOKMARK":
                        self._take(what, obj)
            except Gone:
                version = ""
            except ApiError as error:
                logger.warning("%s: %s; again in %.1f s", self._kind, error, delay)
                await asyncio.sleep(delay)
                delay = min(2 * delay, RETRY_MAX_S)
                if error.status != 0:
                    version = ""

    async def _relist(self) -> str:
        items, version = await self._api.list_page(self._kind, self._namespace, self._selector)
        seen = set()
        for obj in items:
            key = _key(obj)
            seen.add(key)
            old = self._objects.get(key)
            if (
                old is None
                or old["metadata"]["resourceVersion"] != obj["metadata"]["resourceVersion"]
            ):
                self._take("MODIFIED", obj)
        for key in set(self._objects) - seen:
            self._take("DELETED", self._objects[key])
        self.synced.set()
        return version

    def _take(self, what: str, obj: Object) -> None:
        key = _key(obj)
        self._forget(key)
        slim = _slim(obj, self._kind)
        if what != "DELETED":
            self._objects[key] = slim
            for label, value in (slim["metadata"].get("labels") or {}).items():
                if label in _INDEXED:
                    self._index.setdefault((key[0], label, value), set()).add(key)
        self._changed(slim)

    def _forget(self, key: tuple[str, str]) -> None:
        old = self._objects.pop(key, None)
        for label, value in ((old or {}).get("metadata", {}).get("labels") or {}).items():
            if label in _INDEXED:
                members = self._index.get((key[0], label, value), set())
                members.discard(key)
                if not members:
                    self._index.pop((key[0], label, value), None)


def _key(obj: Object) -> tuple[str, str]:
    return obj["metadata"]["namespace"], obj["metadata"]["name"]


def _slim(obj: Object, kind: str) -> Object:
    metadata = {k: v for k, v in obj["metadata"].items() if k != "managedFields"}
    if annotations := metadata.get("annotations"):
        metadata["annotations"] = {
            k: v for k, v in annotations.items() if k not in _DROPPED_ANNOTATIONS
        }
    return {**obj, "kind": kind, "apiVersion": KIND_INFO[kind].api_version, "metadata": metadata}


class CachedApi:
    """A ClusterApi whose reads come from copies and whose writes go to the apiserver."""

    def __init__(
        self, api: KubeApi, namespace: str | None, changed: Callable[[Object], None]
    ) -> None:
        self._api = api
        managed = ",".join(f"{k}={v}" for k, v in MANAGED.items())
        self._caches = {
            kind: KindCache(api, kind, namespace, "" if kind in OWN_KINDS else managed, changed)
            for kind in (*OWN_KINDS, *MANAGED_KINDS)
        }

    @property
    def synced(self) -> bool:
        """Whether every kind was listed at least once."""
        return all(c.synced.is_set() for c in self._caches.values())

    async def wait_synced(self) -> None:
        """Wait until every kind was listed."""
        for cache in self._caches.values():
            await cache.synced.wait()

    async def run(self) -> None:
        """Keep all copies current until cancelled."""
        async with asyncio.TaskGroup() as group:
            for cache in self._caches.values():
                group.create_task(cache.run())

    def keys(self, kind: str) -> list[tuple[str, str]]:
        """Namespace and name of all objects of a kind."""
        return [_key(o) for o in self._caches[kind].select(None, {})]

    def copies(self, kind: str, namespace: str) -> list[Object]:
        """The copies of a namespace themselves, to look at only."""
        return self._caches[kind].select(namespace, {})

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """See ClusterApi."""
        cache = self._caches.get(kind)
        if cache is None:
            return await self._api.get(kind, namespace, name)
        found = cache.get(namespace, name)
        return copy.deepcopy(found) if found is not None else None

    async def select(
        self, kind: str, namespace: str | None = None, labels: Mapping[str, str] | None = None
    ) -> list[Object]:
        """See ClusterApi."""
        cache = self._caches.get(kind)
        if cache is None:
            return await self._api.select(kind, namespace, labels)
        return cache.select(namespace, labels or {})

    async def apply(self, obj: Object) -> Object:
        """See ClusterApi."""
        return await self._api.apply(obj)

    async def create(self, obj: Object) -> Object | None:
        """See ClusterApi."""
        return await self._api.create(obj)

    async def patch_spec(self, kind: str, namespace: str, name: str, spec: Object) -> Object:
        """See ClusterApi."""
        return await self._api.patch_spec(kind, namespace, name, spec)

    async def annotate(
        self, kind: str, namespace: str, name: str, annotations: Mapping[str, str]
    ) -> None:
        """See ClusterApi."""
        await self._api.annotate(kind, namespace, name, annotations)

    async def apply_status(self, obj: Object) -> Object:
        """See ClusterApi."""
        return await self._api.apply_status(obj)

    async def delete(self, kind: str, namespace: str, name: str) -> None:
        """See ClusterApi."""
        await self._api.delete(kind, namespace, name)
