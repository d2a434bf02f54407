"""Observe, plan, apply: idempotent, repairing, keeping counts; on the in-memory store."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from objects_table import GOOD, model
from stored_cluster import BOTH, SPLIT, Cluster
from tandem_operator.local.store import Store
from tandem_operator.plan.model_status import LinkTest
from tandem_operator.plan.objects import child
from tandem_operator.reconcile.children import UNSEEN_RETRY_S
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.reconcile.drift import contains
from tandem_operator.reconcile.owners import concerned
from tandem_operator.reconcile.reconciler import COST_ANNOTATION, LINK_RETRY_S
from tandem_operator.reconcile.requeue import Key
from tandem_operator.resources import Router
from tandem_operator.resources.base import Object

# Idempotence --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD)
async def test_a_second_pass_writes_nothing(name: str) -> None:
    cluster = Cluster(GOOD[name])

    await cluster.settle()
    before = cluster.store.num_writes
    await cluster.settle()

    assert cluster.store.num_writes == before


_ROLE = st.fixed_dictionaries(
    {"replicas": st.integers(1, 4), "gpus": st.sampled_from([0, 1])},
    optional={
        "usdPerHour": st.sampled_from(["0.5", "3"]),
        "nodeSelector": st.just({"gpu": "h100"}),
        "podPatch": st.just({"spec": {"hostNetwork": True}}),
        "resources": st.just({"cpu": "2", "memory": "4Gi"}),
    },
)


@settings(max_examples=20, deadline=None)
@given(role=_ROLE, other=_ROLE, split=st.booleans(), pods=st.booleans())
async def test_any_model_settles_in_two_rounds_with_pods_or_without(
    role: Object, other: Object, split: bool, pods: bool
) -> None:
    roles = {"prefill": role, "decode": other} if split else {"unified": role}
    cluster = Cluster(_model_yaml(roles))
    await cluster.reconcile()
    if pods:
        cluster.start_pods()

    assert await cluster.settle() <= 3


def _model_yaml(roles: Mapping[str, Object]) -> str:
    lines = "".join(f"  {name}: {json.dumps(role)}\n" for name, role in roles.items())
    return model(lines)


# Repair -------------------------------------------------------------------------------------


async def test_a_deleted_or_edited_child_comes_back() -> None:
    cluster = Cluster()
    await cluster.settle()
    wanted = cluster.get("Deployment", "m-decode")["spec"]

    cluster.store.remove("Service", "default", "m-decode")
    cluster.store.change("Deployment", "default", "m-decode", {"spec": {"replicas": 9}})
    cluster.store.change(
        "Deployment", "default", "m-prefill", {"metadata": {"labels": {"tandem.dev/model": None}}}
    )
    await cluster.settle()

    assert cluster.get("Service", "m-decode")
    assert cluster.get("Deployment", "m-decode")["spec"] == wanted
    assert cluster.get("Deployment", "m-prefill")["metadata"]["labels"]["tandem.dev/model"] == "m"


async def test_the_soonest_look_that_anything_asks_for_counts() -> None:
    """A pool that the list lacks is looked for sooner than a broken link is tried again."""
    cluster = Cluster()
    await cluster.settle()
    cluster.start_pods()
    cluster.link = LinkTest(False, "broken")
    assert (await cluster.reconcile()).again_s == LINK_RETRY_S

    hidden = {"metadata": {"labels": {"tandem.dev/model": None}}}
    cluster.store.change("WorkerPool", "default", "m-decode", hidden)

    assert (await cluster.reconcile()).again_s == UNSEEN_RETRY_S < LINK_RETRY_S


async def test_children_of_a_dropped_role_go_away() -> None:
    cluster = Cluster()
    await cluster.settle()

    cluster.apply(model("  unified: {replicas: 1}\n"))
    await cluster.settle()

    assert cluster.names("Deployment") == ["m-unified"]
    assert cluster.names("WorkerPool") == ["m-unified"]


async def test_configuration_of_a_revision_lives_as_long_as_its_pods() -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.start_pods()
    old = cluster.names("ConfigMap")

    cluster.apply(SPLIT + "  engine: {maxNumSeqs: 8}\n")
    await cluster.settle()
    both = cluster.names("ConfigMap")
    for pod in cluster.names("Pod"):
        cluster.store.remove("Pod", "default", pod)
    await cluster.settle()

    assert set(old) < set(both)
    assert set(cluster.names("ConfigMap")) == set(both) - set(old)


async def test_a_deleted_resource_takes_everything_with_it() -> None:
    cluster = Cluster(BOTH)
    await cluster.settle()

    for kind, name in (("Router", "r"), ("Model", "s"), ("Model", "l")):
        cluster.store.remove(kind, "default", name)
        await cluster.reconcile(kind, name)

    left = {o["kind"] for k in _ALL_KINDS for o in cluster.store.find(k)}
    assert left <= {"Event"}


_ALL_KINDS = (
    "Deployment Service ConfigMap Secret ServiceAccount WorkerPool PodDisruptionBudget "
    "NetworkPolicy Role RoleBinding Event"
).split()


async def test_what_is_remembered_of_a_router_goes_with_it() -> None:
    gone: list[tuple[str, str]] = []
    cluster = Cluster(BOTH)
    cluster.reconciler.forget = lambda namespace, name: gone.append((namespace, name))
    await cluster.settle()
    assert gone == []

    for kind, name in (("Router", "r"), ("Model", "s")):
        cluster.store.remove(kind, "default", name)
        await cluster.reconcile(kind, name)

    assert gone == [("default", "r")]


class Failing(Store):
    """A store that refuses some writes, as an apiserver under stress does."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def _fail(self) -> None:
        if self._random.random() < 0.3:
            raise ApiError(self._random.choice([0, 409, 429, 500, 503]), "no")

    async def apply(self, obj: Object) -> Object:
        self._fail()
        return await super().apply(obj)

    async def create(self, obj: Object) -> Object | None:
        self._fail()
        return await super().create(obj)

    async def apply_status(self, obj: Object) -> Object:
        self._fail()
        return await super().apply_status(obj)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
async def test_failing_writes_delay_and_change_nothing(seed: int) -> None:
    calm, cluster = Cluster(), Cluster()
    await calm.settle()
    failing = Failing(seed)
    cluster.store = failing
    cluster.reconciler.api = failing
    cluster.apply(SPLIT)

    for _ in range(200):
        try:
            if (await cluster.reconcile()).writes == 0:
                break
        except ApiError:
            continue

    for kind in ("Deployment", "Service", "ConfigMap", "WorkerPool", "ServiceAccount"):
        assert cluster.names(kind) == calm.names(kind)
    assert cluster.get("Deployment", "m-decode")["spec"]["replicas"] == 2


def test_live_objects_may_hold_more_than_was_planned() -> None:
    assert contains(
        {"a": {"b": 1, "c": 2}, "l": [{"x": 1, "y": 2}]}, {"a": {"b": 1}, "l": [{"x": 1}]}
    )
    assert not contains({"a": 1}, {"a": 2})
    assert not contains({"l": [1, 2]}, {"l": [1]})


# Replicas -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "given", "said"),
    [
        (
            9,
            4,
            "0 of 4 workers are ready; 9 were asked for, maxReplicas of unified in Model m is 4",
        ),
        (
            1,
            2,
            "0 of 2 workers are ready; 1 were asked for, minReplicas of unified in Model m is 2",
        ),
        (3, 3, "0 of 3 workers are ready"),
        (0, 0, "0 of 0 workers are ready"),
    ],
)
async def test_a_pool_stays_within_its_bounds_and_may_always_be_stopped(
    asked: int, given: int, said: str
) -> None:
    cluster = Cluster(model("  unified: {replicas: 2, minReplicas: 2, maxReplicas: 4}\n"))
    await cluster.settle()

    cluster.store.change("WorkerPool", "default", "m-unified", {"spec": {"replicas": asked}})
    await cluster.settle()

    assert cluster.get("Deployment", "m-unified")["spec"]["replicas"] == given
    assert cluster.condition("WorkerPool", "m-unified", "Ready")["message"] == said


async def test_a_scaled_pool_keeps_its_count() -> None:
    cluster = Cluster()
    await cluster.settle()

    cluster.store.change("WorkerPool", "default", "m-decode", {"spec": {"replicas": 5}})
    await cluster.settle()

    assert cluster.get("WorkerPool", "m-decode")["spec"]["replicas"] == 5
    last = cluster.get("WorkerPool", "m-decode")["status"]["lastScale"]
    assert (last["before"], last["after"], last["reason"]) == (2, 5, "set through /scale")
    assert cluster.get("Deployment", "m-decode")["spec"]["replicas"] == 5


async def test_a_count_changed_in_the_model_resets_the_pool_once() -> None:
    cluster = Cluster()
    await cluster.settle()
    cluster.store.change("WorkerPool", "default", "m-decode", {"spec": {"replicas": 5}})

    cluster.apply(SPLIT.replace("decode: {replicas: 2", "decode: {replicas: 3"))
    await cluster.settle()
    assert cluster.get("Deployment", "m-decode")["spec"]["replicas"] == 3

    cluster.store.change("WorkerPool", "default", "m-decode", {"spec": {"replicas": 1}})
    await cluster.settle()
    assert cluster.get("Deployment", "m-decode")["spec"]["replicas"] == 1


async def test_before_a_pool_shrinks_its_pods_say_how_busy_they_are() -> None:
    cluster = Cluster(SPLIT.replace("decode: {replicas: 2", "decode: {replicas: 3"))
    await cluster.settle()
    cluster.start_pods()

    async def busy(pods: list[Object]) -> dict[str, int]:
        return {p["metadata"]["name"]: len(pods) - i for i, p in enumerate(pods)}

    cluster.reconciler.busy = busy
    await cluster.settle()
    calm = cluster.get("Pod", "m-decode-0")["metadata"].get("annotations")
    cluster.store.change("WorkerPool", "default", "m-decode", {"spec": {"replicas": 1}})
    await cluster.reconcile()

    costs = [
        cluster.get("Pod", f"m-decode-{i}")["metadata"]["annotations"][COST_ANNOTATION]
        for i in range(3)
    ]
    assert calm is None
    assert costs == ["3", "2", "1"]


async def test_what_a_control_loop_learnt_stays_while_there_is_one() -> None:
    managed = BOTH + "  scaling: {mode: Managed}\n"
    cluster = Cluster(managed)
    await cluster.settle()
    router = Router.model_validate(
        {name: cluster.get("Router", "r")[name] for name in ("metadata", "spec")}
    )
    await cluster.store.apply(
        child(router, "v1", "ConfigMap", "r-hourly-rates", {"data": {"hourly": "[]"}})
    )

    await cluster.settle()
    assert "r-hourly-rates" in cluster.names("ConfigMap")

    cluster.apply(BOTH + "  scaling: {mode: Advise}\n")
    await cluster.settle()
    assert "r-hourly-rates" in cluster.names("ConfigMap")

    cluster.apply(BOTH)
    await cluster.settle()
    assert "r-hourly-rates" not in cluster.names("ConfigMap")


async def test_a_pool_by_hand_is_told_that_no_worker_follows_from_it() -> None:
    cluster = Cluster()
    await cluster.settle()
    made = cluster.get("WorkerPool", "m-decode")
    name = {"name": "m-unified", "namespace": "default"}
    spec = {"modelRef": {"name": "m"}, "role": "unified"}
    by_hand = {**made, "metadata": name, "spec": spec, "status": {}}
    cluster.store.write(by_hand, manager="user")
    noticed = concerned(cluster.get("WorkerPool", "m-unified"), lambda _: [])

    for _ in range(2):
        last = await cluster.reconcile("WorkerPool", "m-unified")
        await cluster.reconcile("WorkerPool", "m-decode")

    assert noticed == [Key("WorkerPool", "default", "m-unified")]
    ready = cluster.condition("WorkerPool", "m-unified", "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "MadeByHand")
    assert "delete it, and scale the pools of Model m" in ready["message"]
    assert last.writes == 0
    assert cluster.get("WorkerPool", "m-decode")["status"] == made["status"]
