"""Where a Router's pods keep what outlives them: a claim, a database, or nowhere."""

from __future__ import annotations

from tandem_operator.plan.objects import Settings, child
from tandem_operator.resources import Router
from tandem_operator.resources.base import Object
from tandem_operator.resources.router import SqliteStore, Store

STORE_DIR = "/var/lib/tandem/store"
STORE_URL_DIR = "/etc/tandem/store"


def store_of(router: Router, settings: Settings) -> Store | None:
    """The store in effect: on one machine a file, where nothing else is said."""
    if router.spec.store is None and settings.endpoints == "file" and router.spec.replicas <= 1:
        return Store(sqlite=SqliteStore())
    return router.spec.store


def store_claims(router: Router, settings: Settings) -> list[Object]:
    """The claim of a SQLite file; it stays while the Router does."""
    store = store_of(router, settings)
    if store is None or store.sqlite is None:
        return []
    spec: Object = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": store.sqlite.size}},
    }
    if store.sqlite.storage_class_name:
        spec["storageClassName"] = store.sqlite.storage_class_name
    return [child(router, "v1", "PersistentVolumeClaim", _claim_name(router), {"spec": spec})]


def _claim_name(router: Router) -> str:
    return f"{router.metadata.name}-store"


def add_store(
    router: Router,
    settings: Settings,
    args: list[str],
    mounts: list[Object],
    volumes: list[Object],
) -> None:
    """What a router pod needs to reach its store."""
    store = store_of(router, settings)
    if store is None:
        return
    if store.sqlite is not None:
        args += ["--store-file", f"{STORE_DIR}/router.db"]
        mounts.append({"name": "store", "mountPath": STORE_DIR})
        claim = {"claimName": _claim_name(router)}
        volumes.append({"name": "store", "persistentVolumeClaim": claim})
    elif store.postgres is not None:
        ref = store.postgres.secret_ref
        args += ["--store-url-file", f"{STORE_URL_DIR}/{ref.key}"]
        mounts.append({"name": "store-url", "mountPath": STORE_URL_DIR, "readOnly": True})
        volumes.append({"name": "store-url", "secret": {"secretName": ref.name}})


def store_config(router: Router, settings: Settings) -> Object | None:
    """The store as the router's configuration names it; None for memory."""
    store = store_of(router, settings)
    if store is None:
        return None
    return {"type": "sqlite" if store.sqlite is not None else "postgres"}


def strategy(router: Router, settings: Settings) -> Object:
    """How router pods are replaced: a file has one writer, so the old pod goes first."""
    store = store_of(router, settings)
    if store is not None and store.sqlite is not None:
        return {"type": "Recreate"}
    return {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
