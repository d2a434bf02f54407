"""What many resources cost in writes; benchmarks/operator measures the same on a real apiserver."""

from __future__ import annotations

from typing import Any

import pytest

from tandem_operator.local.store import Store
from tandem_operator.plan import Settings
from tandem_operator.reconcile import reconciler as reconcile
from tandem_operator.reconcile.children import OBSERVED_KINDS
from tandem_operator.reconcile.reconciler import Reconciler
from tandem_operator.reconcile.requeue import Key
from tandem_operator.resources.base import Object

API_VERSION = "tandem.dev/v1alpha1"
NUM_MODELS, NUM_ROUTERS = 20, 4


def model(index: int) -> Object:
    roles: Object = {"prefill": {}, "decode": {}} if index % 2 == 0 else {"unified": {}}
    return {
        "apiVersion": API_VERSION,
        "kind": "Model",
        "metadata": {"name": f"m{index}", "namespace": "default"},
        "spec": {"weights": {"source": "file:///models/m"}, **roles},
    }


def router(index: int) -> Object:
    tiers = [{"name": f"t{i}", "modelRef": {"name": f"m{index + i}"}} for i in range(2)]
    return {
        "apiVersion": API_VERSION,
        "kind": "Router",
        "metadata": {"name": f"r{index}", "namespace": "default"},
        "spec": {"tiers": tiers},
    }


async def sweep(reconciler: Reconciler) -> int:
    """One pass over everything; the number of writes."""
    keys = [Key("Model", "default", f"m{i}") for i in range(NUM_MODELS)]
    keys += [Key("Router", "default", f"r{i}") for i in range(NUM_ROUTERS)]
    return sum([(await reconciler.reconcile(key)).writes for key in keys])


async def test_a_resource_costs_as_many_writes_as_it_has_children_and_nothing_at_rest() -> None:
    store = Store()
    for obj in [*map(model, range(NUM_MODELS)), *map(router, range(NUM_ROUTERS))]:
        store.write(obj, manager="user")
    before = store.num_writes
    reconciler = Reconciler(api=store, settings=Settings(), now=lambda: "2026-01-01T00:00:00Z")

    await sweep(reconciler)
    first = store.num_writes - before
    await sweep(reconciler)
    settled = store.num_writes
    children = sum(len(store.find(kind)) for kind in (*OBSERVED_KINDS, "Secret", "Event"))
    rest = await sweep(reconciler)

    # Each child once, a WorkerPool twice (created, then owned), a status for each resource; what
    # pools say comes with the second pass.
    pools = len(store.find("WorkerPool"))
    assert first <= children + pools + NUM_MODELS + NUM_ROUTERS
    assert rest == 0
    assert store.num_writes == settled


async def test_a_managed_router_reads_only_routers_that_share_a_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pass every few seconds for each of a thousand Routers must not parse the other 999."""
    store = Store()
    for obj in [*map(model, range(NUM_MODELS)), *map(router, range(NUM_MODELS - 1))]:
        if obj["kind"] == "Router":
            obj["spec"]["scaling"] = {"mode": "Managed"}
        store.write(obj, manager="user")
    parsed: list[str] = []

    def counting(obj: Object) -> Any:
        parsed.append(obj["metadata"]["name"])
        return parse(obj)

    parse = reconcile.parse
    monkeypatch.setattr(reconcile, "parse", counting)
    reconciler = Reconciler(api=store, settings=Settings(), now=lambda: "2026-01-01T00:00:00Z")
    await reconciler.reconcile(Key("Router", "default", "r7"))

    # Itself, its two Models, and the Routers that use one of them: itself and two neighbours.
    assert sorted(parsed) == ["m7", "m8", "r6", "r7", "r7", "r8"]
