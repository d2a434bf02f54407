"""The in-process cluster's parts: store, rollouts, endpoints, work queue, mounts, environment."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_operator.local.controllers import rollout_step, serving_endpoints
from tandem_operator.local.state_dir import RunDir, RunDirError, find_cluster, running_clusters
from tandem_operator.local.store import Store
from tandem_operator.node.environment import environment, expand
from tandem_operator.node.images import ImageTable, UnknownImageError
from tandem_operator.node.probes import ProbeCounter
from tandem_operator.node.volumes import Mounts, PodVolumes, write_files
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.reconcile.requeue import Key
from tandem_operator.reconcile.work_queue import WorkQueue
from tandem_operator.resources.base import Object


def config_map(name: str = "c", **data: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": "default"},
        "data": data,
    }


# Store --------------------------------------------------------------------------------------


def test_applying_twice_changes_nothing() -> None:
    store = Store()
    first = store.write(config_map(a="1"))

    second = store.write(config_map(a="1"))

    assert second["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    assert store.num_writes == 1


def test_a_field_left_out_of_the_next_apply_goes_away() -> None:
    store = Store()
    store.write(config_map(a="1", b="2"))

    store.write(config_map(a="1"))

    assert store.read("ConfigMap", "default", "c")["data"] == {"a": "1"}  # type: ignore[index]


def test_a_field_of_another_manager_stays() -> None:
    store = Store()
    store.write(config_map(a="1"), manager="one")
    store.write(config_map(b="2"), manager="two")

    store.write(config_map(), manager="one")

    assert store.read("ConfigMap", "default", "c")["data"] == {"b": "2"}  # type: ignore[index]


def test_a_change_without_owning_survives_the_next_apply() -> None:
    store = Store()
    store.write(config_map(a="1"))
    store.change("ConfigMap", "default", "c", {"data": {"z": "9"}})

    store.write(config_map(a="2"))

    assert store.read("ConfigMap", "default", "c")["data"] == {  # type: ignore[index]
        "a": "2",
        "z": "9",
    }


def test_deleting_an_owner_deletes_what_it_owns() -> None:
    store = Store()
    owner = store.write(config_map("owner"))
    child = config_map("child")
    child["metadata"]["ownerReferences"] = [{"uid": owner["metadata"]["uid"]}]
    store.write(child)

    store.remove("ConfigMap", "default", "owner")

    assert store.find("ConfigMap") == []


def test_generation_rises_with_the_spec_and_not_with_the_status() -> None:
    store = Store()
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "namespace": "default"},
        "spec": {"a": 1},
    }
    store.write(pod)
    store.change("Pod", "default", "p", {"status": {"phase": "Running"}})
    store.write({**pod, "spec": {"a": 2}})

    assert store.read("Pod", "default", "p")["metadata"]["generation"] == 2  # type: ignore[index]


def test_immutable_configuration_is_refused() -> None:
    store = Store()
    store.write({**config_map(a="1"), "immutable": True})

    with pytest.raises(ApiError, match="immutable"):
        store.write({**config_map(a="2"), "immutable": True})


def test_bad_custom_resources_are_refused_as_an_apiserver_would() -> None:
    store = Store()
    model = {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "Model",
        "metadata": {"name": "m", "namespace": "default"},
        "spec": {"weights": {"source": "file:///m"}, "prefill": {}},
    }

    with pytest.raises(ApiError, match="prefill and decode go together"):
        store.write(model)


async def test_a_watch_tells_what_exists_and_then_every_change() -> None:
    store = Store()
    store.write(config_map(a="1"))
    watch = store.watch("ConfigMap")

    first = await anext(watch)
    store.write(config_map(a="2"))
    second = await anext(watch)
    store.remove("ConfigMap", "default", "c")
    third = await anext(watch)

    assert [first.type, second.type, third.type] == ["ADDED", "MODIFIED", "DELETED"]


def test_what_a_reader_does_to_its_copy_stays_its_own() -> None:
    store = Store()
    store.write(config_map(a="1"))

    store.find("ConfigMap")[0]["data"]["a"] = "changed"

    assert store.find("ConfigMap")[0]["data"] == {"a": "1"}


# Rollouts -----------------------------------------------------------------------------------


def pod(
    name: str,
    *,
    ready: bool = True,
    role: str = "decode",
    revision: str = "r1",
    version: int = 1,
    created: str = "2026-01-01T00:00:00Z",
    ip: str = "127.9.0.2",
) -> Object:
    return {
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": name,
            "resourceVersion": str(version),
            "creationTimestamp": created,
            "labels": {"tandem.dev/role": role, "tandem.dev/revision": revision},
        },
        "spec": {"containers": []},
        "status": {
            "podIP": ip,
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


@settings(max_examples=300, deadline=None)
@given(
    replicas=st.integers(0, 6),
    surge=st.integers(0, 3),
    unavailable=st.integers(0, 3),
    num_old=st.integers(0, 6),
    seed=st.integers(0, 2**32),
)
def test_a_rollout_keeps_its_bounds_and_ends(
    replicas: int, surge: int, unavailable: int, num_old: int, seed: int
) -> None:
    """Never more than replicas + surge pods made, ready ones never below the floor, in the end
    exactly the new ones."""
    if surge + unavailable == 0:
        surge = 1
    rng = random.Random(seed)
    old = [pod(f"old{i}") for i in range(num_old)]
    new: list[Object] = []
    made = 0
    for _ in range(200):
        before = sum(_is_ready(p) for p in [*old, *new])
        step = rollout_step(replicas, surge, unavailable, new, old)
        gone = {p["metadata"]["name"] for p in step.delete}
        old = [p for p in old if p["metadata"]["name"] not in gone]
        new = [p for p in new if p["metadata"]["name"] not in gone]
        if step.num_create:
            assert len(old) + len(new) + step.num_create <= max(replicas + surge, num_old)
        after = sum(_is_ready(p) for p in [*old, *new])
        assert after >= min(before, replicas - unavailable)
        for _ in range(step.num_create):
            made += 1
            new.append(pod(f"new{made}", ready=False))
        for p in new:
            if rng.random() < 0.4:
                p["status"]["conditions"][0]["status"] = "True"
        if not old and len(new) == replicas and all(_is_ready(p) for p in new):
            break

    assert not old
    assert len(new) == replicas


def _is_ready(p: Object) -> bool:
    return bool(p["status"]["conditions"][0]["status"] == "True")


def test_the_cheapest_pod_goes_first() -> None:
    pods = [pod("busy"), pod("idle"), pod("broken", ready=False)]
    pods[0]["metadata"]["annotations"] = {"controller.kubernetes.io/pod-deletion-cost": "9"}

    step = rollout_step(1, 1, 0, pods, [])

    assert [p["metadata"]["name"] for p in step.delete] == ["broken", "idle"]


# Endpoints ----------------------------------------------------------------------------------


def test_workers_of_different_revisions_never_meet() -> None:
    pods = [
        pod("p1", role="prefill", revision="old", ip="127.9.0.2"),
        pod("d1", role="decode", revision="old", ip="127.9.0.3"),
        pod("p2", role="prefill", revision="new", ip="127.9.0.4", created="2026-01-02T00:00:00Z"),
    ]

    before = serving_endpoints(pods, 8100)
    pods.append(
        pod("d2", role="decode", revision="new", ip="127.9.0.5", created="2026-01-02T00:00:00Z")
    )
    after = serving_endpoints(pods, 8100)

    assert before == {"prefill": ["http://127.9.0.2:8100"], "decode": ["http://127.9.0.3:8100"]}
    assert after == {"prefill": ["http://127.9.0.4:8100"], "decode": ["http://127.9.0.5:8100"]}


def test_decode_workers_serve_alone_while_no_revision_is_whole() -> None:
    pods = [
        pod("p1", role="prefill", revision="old"),
        pod("d2", role="decode", revision="new", ip="127.9.0.5"),
    ]

    assert serving_endpoints(pods, 8100) == {"decode": ["http://127.9.0.5:8100"]}


def test_a_pod_that_is_not_ready_or_about_to_go_gets_nothing() -> None:
    going = pod("d2", role="unified")
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"

    assert serving_endpoints([pod("d1", role="unified", ready=False), going], 8100) == {}


# Mounts, environment, images ----------------------------------------------------------------


def test_mount_paths_are_rewritten_where_they_stand_as_paths() -> None:
    mounts = Mounts({"/etc/tandem": "/run/x", "/etc/tandem/peer": "/run/peer", "/w": "/etc/tandem"})

    assert mounts.rewrite("/etc/tandem/config.json") == "/run/x/config.json"
    assert mounts.rewrite("/etc/tandem/peer/token") == "/run/peer/token"
    assert mounts.rewrite("--dir=/etc/tandem") == "--dir=/run/x"
    assert mounts.rewrite("/etc/tandem2 /my/etc/tandem") == "/etc/tandem2 /my/etc/tandem"
    assert mounts.rewrite('{"a": "/w/b"}') == '{"a": "/etc/tandem/b"}'


def test_references_expand_as_in_kubernetes() -> None:
    assert expand("$(A)-$(B)-$$(A)-$C", {"A": "1"}) == "1-$(B)-$(A)-$C"


async def test_the_environment_comes_from_values_maps_secrets_and_the_pod() -> None:
    objects: dict[tuple[str, str], Object] = {
        ("ConfigMap", "c"): {"kind": "ConfigMap", "data": {"x": "1"}},
        ("Secret", "s"): {"kind": "Secret", "data": {"TOKEN": "c2VjcmV0"}},
    }

    async def lookup(kind: str, _: str, name: str) -> Object | None:
        return objects.get((kind, name))

    container = {
        "envFrom": [{"secretRef": {"name": "s"}}],
        "env": [
            {"name": "A", "value": "a"},
            {"name": "B", "value": "$(A)b"},
            {"name": "X", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "x"}}},
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "L", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['l']"}}},
        ],
    }
    owner = {"metadata": {"name": "p", "labels": {"l": "v"}}, "spec": {}}

    env = await environment(owner, container, ["127.1.2.3", "fd00::3"], lookup)

    assert env == {
        "TOKEN": "secret",
        "A": "a",
        "B": "ab",
        "X": "1",
        "IP": "127.1.2.3",
        "L": "v",
    }


async def test_a_changed_configmap_changes_the_mounted_file(tmp_path: Path) -> None:
    data = {"a": "1"}

    async def lookup(kind: str, _: str, name: str) -> Object | None:
        return {"kind": kind, "data": dict(data)}

    spec = {"volumes": [{"name": "v", "configMap": {"name": "c"}}], "containers": []}
    volumes = PodVolumes(
        {"metadata": {"name": "p"}, "spec": spec}, tmp_path / "v", tmp_path / "claims", lookup
    )
    await volumes.prepare()
    data.update(a="2", b="3")
    await volumes.prepare()

    assert (tmp_path / "v" / "v" / "a").read_text() == "2"
    assert volumes.uses("ConfigMap", "c")
    assert not volumes.uses("Secret", "c")


def test_secret_files_are_for_the_owner_only(tmp_path: Path) -> None:
    write_files(tmp_path / "s", {"token": b"x"}, None, secret=True)

    assert (tmp_path / "s" / "token").stat().st_mode & 0o077 == 0


def test_images_are_found_whatever_their_registry_and_tag() -> None:
    table = ImageTable({"tandem/worker": ("run", "worker")}, {"python": ("/py",)})

    assert table.command("registry:5000/tandem/worker:1@sha256:ab", [], ["-x"]) == [
        "run",
        "worker",
        "-x",
    ]
    assert table.command("any", ["python", "-m"], ["m"]) == ["/py", "-m", "m"]
    with pytest.raises(UnknownImageError, match="no local command"):
        table.command("nginx", [], [])


def test_probe_verdicts_need_their_thresholds() -> None:
    counter = ProbeCounter(success_threshold=2, failure_threshold=3)

    results = [counter.record(ok) for ok in (True, True, False, False, True, False, False, False)]

    assert results == [None, True, True, True, True, True, True, False]


# Run folders --------------------------------------------------------------------------------


def test_two_clusters_get_different_names_and_addresses(tmp_path: Path) -> None:
    first, second = RunDir("a", tmp_path), RunDir("a-2", tmp_path)
    try:
        assert first.subnet != second.subnet
        assert {c.name for c in running_clusters(tmp_path)} == {"a", "a-2"}
        assert find_cluster("a", tmp_path).subnet == first.subnet
        with pytest.raises(RunDirError, match="choose with --cluster: a, a-2"):
            find_cluster(None, tmp_path)
        with pytest.raises(RunDirError, match="running already"):
            RunDir("a", tmp_path, exact=True)
    finally:
        first.close()
        second.close()
    with pytest.raises(RunDirError, match="start one with"):
        find_cluster(None, tmp_path)


def test_what_a_dead_cluster_left_is_removed(tmp_path: Path) -> None:
    dead = tmp_path / "old.1"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "state.json").write_text("{}")

    assert running_clusters(tmp_path) == []
    assert not dead.exists()


async def test_events_of_a_burst_become_one_entry() -> None:
    loop = asyncio.get_running_loop()
    queue = WorkQueue(loop.call_later, loop.time)
    for i in range(100):
        queue.add(Key("Model", "default", f"m{i % 3}"))

    assert len(queue) == 3
