"""Which release looks after a namespace, so that two of them never write the same objects.

The first one to find a Model or Router in a namespace leaves a ConfigMap with its name there.
Another release stands still in that namespace, says whose it is in an Event, and takes it over when
no pod of that release is left.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tandem_operator.plan.objects import MANAGED
from tandem_operator.reconcile.cluster_api import ClusterApi
from tandem_operator.resources.base import Object

CLAIM = "tandem-operator"
TAKEN_RETRY_S = 30.0


@dataclass(frozen=True)
class Release:
    """An installation of the chart."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"release {self.name} in namespace {self.namespace}"


Runs = Callable[[Release], Awaitable[bool]]


class NamespaceClaims:
    """Takes namespaces for one release, and gives them back.

    runs: whether a release still has an operator, as far as this one may know.
    """

    def __init__(self, api: ClusterApi, own: Release, runs: Runs) -> None:
        self._api = api
        self._own = own
        self._runs = runs
        self._told: set[tuple[str, Release]] = set()

    async def taken(self, namespace: str) -> Release | None:
        """The other release that looks after a namespace; None where this one does from now on."""
        found = await self._api.get("ConfigMap", namespace, CLAIM)
        if found is None:
            if await self._api.create(self._claim(namespace)) is not None:
                return None
            # There, but not among the copies: they lag, or its label is gone.
            found = await self._api.named("ConfigMap", namespace, CLAIM)
        other = _release(found)
        if other == self._own:
            return None
        if other is not None and await self._runs(other):
            return other
        claim = self._claim(namespace)
        if found is not None:
            claim["metadata"]["uid"] = found["metadata"]["uid"]
        await self._api.apply(claim)
        return None

    async def release(self, namespace: str) -> None:
        """Give a namespace back whose last resource is gone."""
        if _release(await self._api.get("ConfigMap", namespace, CLAIM)) == self._own:
            await self._api.delete("ConfigMap", namespace, CLAIM)

    def news(self, uid: str, other: Release) -> str | None:
        """What to tell of a resource that another release looks after; None once it was told."""
        if (uid, other) in self._told:
            return None
        self._told.add((uid, other))
        return (
            f"{other} looks after this namespace, so {self._own} leaves it alone; uninstall one of "
            "them, or give them different watchNamespaces. Where that release is gone and this "
            f"one may not see so: kubectl delete configmap {CLAIM}"
        )

    def _claim(self, namespace: str) -> Object:
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": CLAIM, "namespace": namespace, "labels": dict(MANAGED)},
            "data": {"namespace": self._own.namespace, "release": self._own.name},
        }


def _release(claim: Object | None) -> Release | None:
    data = (claim or {}).get("data") or {}
    if not data.get("release"):
        return None
    return Release(str(data.get("namespace", "")), str(data["release"]))
