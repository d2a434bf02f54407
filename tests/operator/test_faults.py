"""Whatever fails on the way, reconciling ends at the planned objects: none lost, none doubled."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faults_kit import CHILD_KINDS, CancelAt, Faulty, damage, shape
from stored_cluster import NOW, pair, write
from tandem_operator.local.store import Store
from tandem_operator.plan import Settings
from tandem_operator.plan.objects import PEER_SECRET
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.reconcile.drift import contains
from tandem_operator.reconcile.reconciler import Reconciler
from tandem_operator.reconcile.requeue import Key
from tandem_operator.resources.base import Object

PAIR = pair(
    "  unified: {replicas: 2}\n", "  prefill: {replicas: 1}\n  decode: {replicas: 2}\n"
).replace('"file:///models/s"', '"hf://org/s", cache: {size: 8Gi, reclaim: Delete}')
CHANGED = PAIR.replace("prefill: {replicas: 1}\n  decode: {replicas: 2}", "unified: {replicas: 3}")
KEYS = [Key("Model", "default", "s"), Key("Model", "default", "l"), Key("Router", "default", "r")]


def reconciler(api: Any) -> Reconciler:
    return Reconciler(api=api, settings=Settings(), now=lambda: NOW)


async def passes(api: Any, most: int, keys: Sequence[Key] = KEYS) -> int:
    """Passes over the resources until one writes nothing; the number of passes."""
    subject = reconciler(api)
    for number in range(1, most + 1):
        writes = 0
        for key in keys:
            writes += (await subject.reconcile(key)).writes
        if writes == 0:
            return number
    raise AssertionError(f"still writing after {most} passes")


_CALM: dict[str, dict[str, Object]] = {}


async def calm(text: str) -> dict[str, Object]:
    """What a cluster without faults ends with."""
    if text not in _CALM:
        store = Store()
        write(store, text)
        await passes(store, 4)
        _CALM[text] = shape(store)
    return _CALM[text]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), rate=st.sampled_from([0.05, 0.2, 0.5]))
async def test_once_faults_stop_the_planned_objects_are_there(seed: int, rate: float) -> None:
    """Refused calls, lost answers, lagging copies and damaged children, then four calm passes."""
    store, rng = Store(), random.Random(seed)
    write(store, PAIR)
    faulty = Faulty(store, seed, rate)
    subject = reconciler(faulty)
    for step in range(12):
        if step == 6:
            write(store, CHANGED)
        for key in rng.sample(KEYS, len(KEYS)):
            try:
                await subject.reconcile(key)
            except ApiError:
                continue
            if rng.random() < 0.5:
                damage(store, rng, planned=set(await calm(CHANGED)))

    faulty.rate = 0.0
    await passes(faulty, 6)
    written = store.num_writes
    await passes(faulty, 1)

    assert store.num_writes == written
    assert shape(store) == await calm(CHANGED)


@pytest.mark.parametrize("after", [False, True], ids=["before its effect", "after its effect"])
@pytest.mark.parametrize("key", KEYS[1:], ids=str)
async def test_cancelled_at_every_call_it_goes_on_from_there(key: Key, after: bool) -> None:
    """From nothing, and through a change: two roles become one, a Router loses a tier."""
    changed = CHANGED.replace("  - {name: small, modelRef: {name: s}}\n", "")
    changed = changed.replace(', maxShare: "0.5"', "")
    others = [k for k in KEYS if k != key]

    async def run(store: Store, api: Any) -> dict[str, Object]:
        for text in (PAIR, changed):
            write(store, text)
            try:
                await passes(api, 4, [key])
            except asyncio.CancelledError:
                await passes(store, 4, [key])
        await passes(store, 4, others)
        return shape(store)

    wanted = await run(calm_store := Store(), calm_store)
    for cancel_at in range(1, 1000):
        store = Store()
        api = CancelAt(store, cancel_at, after)
        found = await run(store, api)
        if api.num_calls < cancel_at:
            break

        assert found == wanted, f"cancelled at call {cancel_at}"
        assert [o["metadata"]["name"] for o in store.find("Secret")] == [PEER_SECRET]

    assert 60 < cancel_at < 999


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), times=st.integers(1, 6))
async def test_damaged_children_are_repaired(seed: int, times: int) -> None:
    store, rng = Store(), random.Random(seed)
    write(store, PAIR)
    await passes(store, 4)
    before = shape(store)

    done = [damage(store, rng, planned=set(before)) for _ in range(times)]
    await passes(store, 4)

    assert shape(store) == before, done


@pytest.mark.parametrize("kind", CHILD_KINDS)
async def test_every_child_names_its_one_owner(kind: str) -> None:
    store = Store()
    write(store, PAIR)
    await passes(store, 4)

    for obj in store.find(kind):
        (owner,) = obj["metadata"]["ownerReferences"]
        found = store.read(owner["kind"], "default", owner["name"])
        assert found is not None
        assert owner["uid"] == found["metadata"]["uid"]
        assert owner["controller"] is True


async def test_a_scaled_pool_that_loses_its_labels_keeps_its_workers() -> None:
    """Without its labels the pool is not listed; its count must not be taken from the Model."""
    store = Store()
    write(store, PAIR)
    await passes(store, 4)
    store.change("WorkerPool", "default", "s-unified", {"spec": {"replicas": 7}})
    await passes(store, 4)
    pool = store.read("WorkerPool", "default", "s-unified")
    assert pool is not None
    counts = set()

    def note(event: Any) -> None:
        if (event.object["kind"], event.object["metadata"]["name"]) == ("Deployment", "s-unified"):
            counts.add(event.object["spec"]["replicas"])

    store.listen(note)
    stripped = {"metadata": {"labels": dict.fromkeys(pool["metadata"]["labels"])}}
    store.change("WorkerPool", "default", "s-unified", stripped)
    # Another change of the Deployment, so that it is written in the same pass.
    store.change("Deployment", "default", "s-unified", {"spec": {"strategy": None}})
    await passes(store, 4)

    assert counts == {7}


async def test_a_deleted_peer_secret_comes_back_for_pods_that_wait_for_it() -> None:
    """A kubelet says only that the container is being created; the Secret itself is not watched."""
    store = Store()
    write(store, PAIR)
    await passes(store, 4)
    deployment = store.find("Deployment")[0]
    store.remove("Secret", "default", PEER_SECRET)
    store.add(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": "p",
                "namespace": "default",
                "labels": deployment["spec"]["template"]["metadata"]["labels"],
            },
            "spec": {"containers": []},
            "status": {
                "containerStatuses": [
                    {"name": "worker", "state": {"waiting": {"reason": "ContainerCreating"}}}
                ]
            },
        }
    )

    await passes(store, 4)

    assert store.read("Secret", "default", PEER_SECRET) is not None


def test_entries_that_others_add_to_a_named_list_are_theirs() -> None:
    """Server-side apply merges such lists by name; asking for equality would write for ever."""
    mine = {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]}
    theirs = {"name": "SIDECAR", "value": "x"}

    assert contains({"env": [theirs, *mine["env"]]}, mine)
    assert not contains({"env": [theirs, mine["env"][0]]}, mine)
    assert not contains({"env": [{"name": "A", "value": "9"}, mine["env"][1]]}, mine)
    assert contains(
        {"ownerReferences": [{"uid": "u", "name": "m"}, {"uid": "v", "name": "other"}]},
        {"ownerReferences": [{"uid": "u", "name": "m"}]},
    )
    assert not contains({"args": ["a", "b", "c"]}, {"args": ["a", "b"]})
