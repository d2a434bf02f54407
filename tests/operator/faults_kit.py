"""An unreliable way to an in-memory cluster: what an apiserver and a network do on a bad day.

`Faulty` stands between a reconciler and a store. Calls are refused, answers are lost after the
call took effect, reads come from copies that lag behind, the caller is cancelled inside a call.
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from tandem_operator.local.store import Store
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.resources.base import Object

# Refusals that did nothing, and 0: the connection broke. 422 is what a webhook may answer.
REFUSALS = (0, 409, 422, 429, 500, 503)
CHILD_KINDS = (
    "WorkerPool",
    "Deployment",
    "Service",
    "ConfigMap",
    "ServiceAccount",
    "PodDisruptionBudget",
    "NetworkPolicy",
    "Role",
    "RoleBinding",
    "PersistentVolumeClaim",
)


class Faulty:
    """A ClusterApi that fails at random while `rate` is above zero.

    Args:
        store: the cluster behind it.
        seed: of the faults.
        rate: probability that a call meets a fault.
    """

    def __init__(self, store: Store, seed: int, rate: float) -> None:
        self.store = store
        self.rate = rate
        self.random = random.Random(seed)
        self._copies: dict[str, list[Object]] = {}

    def _hit(self) -> bool:
        return self.random.random() < self.rate

    async def _write(self, call: Callable[[], Awaitable[Any]]) -> Any:
        if self._hit():
            raise ApiError(self.random.choice(REFUSALS), "refused")
        done = await call()
        if self._hit():
            raise ApiError(0, "the answer was lost")
        return done

    def _lagging(self, kind: str) -> list[Object]:
        """All objects of a kind: as they are, or while a fault lasts as they were."""
        if self._hit() and kind in self._copies:
            return copy.deepcopy(self._copies[kind])
        self._copies[kind] = self.store.find(kind)
        return copy.deepcopy(self._copies[kind])

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        if kind == "Secret" and self._hit():
            raise ApiError(self.random.choice((0, 429, 500)), "refused")
        for obj in self._lagging(kind):
            if (obj["metadata"]["namespace"], obj["metadata"]["name"]) == (namespace, name):
                return obj
        return None

    async def named(self, kind: str, namespace: str, name: str) -> Object | None:
        if self._hit():
            raise ApiError(self.random.choice((0, 429, 500)), "refused")
        return self.store.read(kind, namespace, name)

    async def version(self, kind: str, namespace: str, name: str) -> str | None:
        found = await self.named(kind, namespace, name)
        return None if found is None else str(found["metadata"]["resourceVersion"])

    async def secret_labels(self, namespace: str, name: str) -> Mapping[str, str] | None:
        found = await self.named("Secret", namespace, name)
        return None if found is None else found["metadata"].get("labels") or {}

    async def select(
        self, kind: str, namespace: str | None = None, labels: Mapping[str, str] | None = None
    ) -> list[Object]:
        found = []
        for obj in self._lagging(kind):
            own = obj["metadata"].get("labels") or {}
            if namespace in (None, obj["metadata"]["namespace"]) and all(
                own.get(k) == v for k, v in (labels or {}).items()
            ):
                found.append(obj)
        return found

    async def apply(self, obj: Object) -> Object:
        found: Object = await self._write(lambda: self.store.apply(obj))
        return found

    async def create(self, obj: Object) -> Object | None:
        found: Object | None = await self._write(lambda: self.store.create(obj))
        return found

    async def patch_spec(self, kind: str, namespace: str, name: str, spec: Object) -> Object:
        found: Object = await self._write(
            lambda: self.store.patch_spec(kind, namespace, name, spec)
        )
        return found

    async def annotate(
        self, kind: str, namespace: str, name: str, annotations: Mapping[str, str]
    ) -> None:
        await self._write(lambda: self.store.annotate(kind, namespace, name, annotations))

    async def merge(self, kind: str, namespace: str, name: str, body: Object) -> bool:
        found: bool = await self._write(lambda: self.store.merge(kind, namespace, name, body))
        return found

    async def patch_secret(self, namespace: str, name: str, body: Object) -> None:
        await self._write(lambda: self.store.patch_secret(namespace, name, body))

    async def apply_status(self, obj: Object) -> Object:
        found: Object = await self._write(lambda: self.store.apply_status(obj))
        return found

    async def delete(self, kind: str, namespace: str, name: str) -> None:
        await self._write(lambda: self.store.delete(kind, namespace, name))


class CancelAt:
    """A ClusterApi whose caller is cancelled inside its k-th call, before or after its effect."""

    def __init__(self, store: Store, cancel_at: int, after: bool) -> None:
        self._store = store
        self._cancel_at, self._after = cancel_at, after
        self.num_calls = 0

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)

        async def counted(*args: Any, **named: Any) -> Any:
            self.num_calls += 1
            hit = self.num_calls == self._cancel_at
            if hit and not self._after:
                raise asyncio.CancelledError
            result = await call(*args, **named)
            if hit:
                raise asyncio.CancelledError
            return result

        return counted


def damage(store: Store, rng: random.Random, planned: set[str]) -> str:
    """Do to one child what people and controllers do; a sentence about it.

    Labels are taken only from `planned` children ("Kind/name"): one that is no longer planned and
    has no labels is out of the operator's sight, and goes with its owner.
    """
    children = [o for kind in CHILD_KINDS for o in store.find(kind)]
    if not children:
        return "nothing to damage"
    child = rng.choice(children)
    kind, metadata = child["kind"], child["metadata"]
    key = kind, metadata["namespace"], metadata["name"]
    how = rng.choice(("delete", "labels", "edit"))
    if how == "delete":
        store.remove(*key)
    elif how == "labels" and f"{kind}/{metadata['name']}" in planned:
        store.change(*key, {"metadata": {"labels": dict.fromkeys(metadata["labels"])}})
    elif kind == "Deployment":
        # A field that nobody planned would be the editor's own: server-side apply lets it be.
        pod = {"serviceAccountName": "other"}
        store.change(*key, {"spec": {"replicas": 9, "template": {"spec": pod}}})
    elif kind == "WorkerPool":
        store.change(*key, {"spec": {"maxReplicas": 999}})
    elif kind == "Service":
        store.change(*key, {"spec": {"selector": {"tandem.dev/model": "other"}}})
    elif kind in ("NetworkPolicy", "PodDisruptionBudget"):
        store.change(*key, {"spec": None})
    return f"{how} {kind}/{metadata['name']}"


def shape(store: Store) -> dict[str, Object]:
    """What matters of all children, by kind and name; uids and versions left out."""
    found = {}
    for kind in CHILD_KINDS:
        for obj in store.find(kind):
            metadata = obj["metadata"]
            owners = [
                {k: v for k, v in owner.items() if k != "uid"}
                for owner in metadata.get("ownerReferences") or []
            ]
            found[f"{kind}/{metadata['name']}"] = {
                "labels": metadata.get("labels"),
                "owners": owners,
                **{k: obj[k] for k in ("spec", "data", "rules", "roleRef", "subjects") if k in obj},
            }
    return found
