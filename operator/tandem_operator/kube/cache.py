"""Copies of the objects that the operator works on, kept current by list and watch.

A reconcile reads the copies instead of a dozen lists, so that a thousand Models cost the apiserver
one watch per kind. A stale copy does no harm: writes are idempotent or checked by version, and the
change that is on its way wakes the reconcile again. After a broken watch or a 410 the list
replaces all copies, so that an object deleted meanwhile is gone here too.

kopf watches the custom resources (`watches.py`); their children are watched here, by label: one
stream per kind.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping

from tandem_operator.kube.client import Gone, KubeApi
from tandem_operator.plan.objects import MANAGED, MODEL_LABEL, ROUTER_LABEL
from tandem_operator.reconcile.cluster_api import KIND_INFO, ApiError
from tandem_operator.reconcile.owners import RECONCILED
from tandem_operator.resources.base import Object

logger = logging.getLogger("tandem.operator")

# What a copy does not need; managedFields alone are half of an object.
_DROPPED_ANNOTATIONS = ("kubectl.kubernetes.io/last-applied-configuration",)
RETRY_FIRST_S, RETRY_MAX_S = 0.2, 10.0
# A watch that ends before this and told nothing would otherwise be asked for without a pause.
SHORT_WATCH_S = 1.0
RELIST_S = 600.0
# Nobody may list Secrets, so each pass that needs one asks for it: a thousand Models in a second.
SECRET_S = 10.0

# The namespaces that are watched, each by itself; None stands for all.
Namespaces = tuple[str | None, ...]
EVERYWHERE: Namespaces = (None,)

CUSTOM_KINDS = (*RECONCILED, "WorkerPool")
MANAGED_KINDS = (
    "Deployment",
    "Service",
    "ConfigMap",
    "PodDisruptionBudget",
    "NetworkPolicy",
    "ServiceAccount",
    "PersistentVolumeClaim",
    "Role",
    "RoleBinding",
    "Job",
    "Pod",
)
_INDEXED = (MODEL_LABEL, ROUTER_LABEL)


class Copies:
    """The copies of one kind; `changed` is told of every object that comes, changes or goes."""

    def __init__(
        self,
        kind: str,
        changed: Callable[[Object], None],
        namespaces: Namespaces = EVERYWHERE,
    ) -> None:
        self._unlisted = set(namespaces)
        self._kind = kind
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

    def replace(self, items: Iterable[Object], namespace: str | None = None) -> None:
        """Take a whole list, of one namespace or of all: what is not in it is gone."""
        seen = set()
        for obj in items:
            key = _key(obj)
            seen.add(key)
            old = self._objects.get(key)
            if (
                old is None
                or old["metadata"]["resourceVersion"] != obj["metadata"]["resourceVersion"]
            ):
                self.take("MODIFIED", obj)
        for key in set(self._objects) - seen:
            if namespace in (None, key[0]):
                self.take("DELETED", self._objects[key])
        self._unlisted.discard(namespace)
        if not self._unlisted:
            self.synced.set()

    def take(self, what: str, obj: Object) -> None:
        """Take one event of a watch: ADDED, MODIFIED or DELETED."""
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


class KindCache(Copies):
    """The copies of one kind, listed and watched by a selector.

    Listed again after `relist_s`, because an event that never came leaves no trace in a watch.
    """

    def __init__(
        self,
        api: KubeApi,
        kind: str,
        namespaces: Namespaces,
        selector: str,
        changed: Callable[[Object], None],
        relist_s: float = RELIST_S,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        super().__init__(kind, changed, namespaces)
        self._sleep = sleep
        self._relist_s = relist_s
        self._api = api
        self._namespaces = namespaces
        self._selector = selector

    async def run(self) -> None:
        """Keep the copies current until cancelled."""
        async with asyncio.TaskGroup() as group:
            for namespace in self._namespaces:
                group.create_task(self._follow(namespace))

    async def _follow(self, namespace: str | None) -> None:
        delay = RETRY_FIRST_S
        version = ""
        clock = asyncio.get_running_loop().time
        fresh_until = 0.0
        while True:
            began, news, failed = clock(), False, False
            try:
                if not version:
                    version = await self._relist(namespace)
                    fresh_until = clock() + self._relist_s
                async with asyncio.timeout_at(fresh_until):
                    async for what, obj in self._api.watch(
                        self._kind, namespace, self._selector, version
                    ):
                        version, news = obj["metadata"]["resourceVersion"], True
                        if what != "BOOKMARK":
                            self.take(what, obj)
                problem = "the watch ended at once"
            except TimeoutError:
                version = ""
                continue
            except Gone:
                version, problem = "", "the listed version is gone at once"
            except ApiError as error:
                failed, problem = True, str(error)
                if error.status != 0:
                    version = ""
            useful = news or clock() - began >= SHORT_WATCH_S
            if useful:
                delay = RETRY_FIRST_S
            if failed or not useful:
                logger.warning("%s: %s; again in %.1f s", self._kind, problem, delay)
                await self._sleep(delay)
                delay = min(2 * delay, RETRY_MAX_S)

    async def _relist(self, namespace: str | None) -> str:
        items, version = await self._api.list_page(self._kind, namespace, self._selector)
        self.replace(items, namespace)
        return version


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
        self,
        api: KubeApi,
        namespaces: Namespaces,
        changed: Callable[[Object], None],
        relist_s: float = RELIST_S,
        clock: Callable[[], float] = time.monotonic,
        more: Iterable[str] = (),
    ) -> None:
        """more: kinds of children besides MANAGED_KINDS that the installation makes."""
        self._api = api
        self._clock = clock
        self._secrets: dict[tuple[str, str], float] = {}
        self._labels: dict[tuple[str, str], tuple[float, Mapping[str, str] | None]] = {}
        managed = ",".join(f"{k}={v}" for k, v in MANAGED.items())
        self._watched = {
            kind: KindCache(api, kind, namespaces, managed, changed, relist_s)
            for kind in (*MANAGED_KINDS, *more)
        }
        self.custom = {kind: Copies(kind, changed, namespaces) for kind in CUSTOM_KINDS}
        self._caches: dict[str, Copies] = {**self.custom, **self._watched}

    @property
    def synced(self) -> bool:
        """Whether every kind was listed at least once."""
        return all(c.synced.is_set() for c in self._caches.values())

    async def wait_synced(self) -> None:
        """Wait until every kind was listed."""
        for cache in self._caches.values():
            await cache.synced.wait()

    async def run(self) -> None:
        """Keep the copies of children current until cancelled; `custom` are fed from outside."""
        async with asyncio.TaskGroup() as group:
            for cache in self._watched.values():
                group.create_task(cache.run())

    def copies(self, kind: str, namespace: str | None) -> list[Object]:
        """The copies of a namespace, or of all, themselves: to look at only."""
        return self._caches[kind].select(namespace, {})

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """See ClusterApi."""
        cache = self._caches.get(kind)
        if cache is None:
            return await self._api.get(kind, namespace, name)
        found = cache.get(namespace, name)
        return copy.deepcopy(found) if found is not None else None

    async def named(self, kind: str, namespace: str, name: str) -> Object | None:
        """See ClusterApi."""
        return await self._api.named(kind, namespace, name)

    async def version(self, kind: str, namespace: str, name: str) -> str | None:
        """See ClusterApi."""
        return await self._api.version(kind, namespace, name)

    async def secret_labels(self, namespace: str, name: str) -> Mapping[str, str] | None:
        """See ClusterApi. Asked for at most once in a while."""
        key, now = (namespace, name), self._clock()
        asked, labels = self._labels.get(key, (-SECRET_S, None))
        if now - asked >= SECRET_S:
            labels = await self._api.secret_labels(namespace, name)
            self._labels = {k: v for k, v in self._labels.items() if now - v[0] < SECRET_S}
            self._labels[key] = (now, labels)
        return labels

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
        """See ClusterApi. A Secret that was there a moment ago is taken to be there still."""
        if obj["kind"] != "Secret":
            return await self._api.create(obj)
        key, now = _key(obj), self._clock()
        if now - self._secrets.get(key, -SECRET_S) < SECRET_S:
            return None
        made = await self._api.create(obj)
        self._secrets[key] = now
        return made

    async def patch_spec(self, kind: str, namespace: str, name: str, spec: Object) -> Object:
        """See ClusterApi."""
        return await self._api.patch_spec(kind, namespace, name, spec)

    async def merge(self, kind: str, namespace: str, name: str, body: Object) -> bool:
        """See ClusterApi."""
        return await self._api.merge(kind, namespace, name, body)

    async def patch_secret(self, namespace: str, name: str, body: Object) -> None:
        """See ClusterApi."""
        await self._api.patch_secret(namespace, name, body)

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
        if kind == "Secret":
            self._secrets.pop((namespace, name), None)
        await self._api.delete(kind, namespace, name)
