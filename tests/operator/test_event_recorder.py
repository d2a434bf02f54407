"""Events: what happens again is counted, and what is tried for long is said."""

from __future__ import annotations

from typing import Any

import pytest

from objects_table import MODEL
from stored_cluster import NOW, Cluster
from tandem_operator.local.store import Store
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.reconcile.event_recorder import EventRecorder
from tandem_operator.reconcile.events import News
from tandem_operator.reconcile.requeue import Key

LATER = "2026-01-01T00:01:00Z"


def crash(times: int, pod: str = "m-1") -> News:
    return News("Warning", "EngineCrash", f"pod {pod}, restarted {times} times: no memory")


@pytest.fixture
async def stored() -> Cluster:
    cluster = Cluster(MODEL)
    await cluster.settle()
    for event in cluster.store.find("Event"):
        cluster.store.drop("Event", "default", event["metadata"]["name"])
    return cluster


def events(store: Store) -> list[tuple[str, int, str]]:
    return [(e["message"], e["count"], e["lastTimestamp"]) for e in store.find("Event")]


async def test_what_happens_again_is_counted_on_the_event_that_told_of_it(stored: Cluster) -> None:
    model, tells = stored.get("Model", "m"), EventRecorder(stored.store)

    for times in (1, 2, 3):
        await tells.tell(model, News("Normal", "Starting", "pod m-1 is starting"), NOW)
        await tells.tell(model, crash(times), LATER)

    assert events(stored.store) == [
        ("pod m-1 is starting", 3, NOW),
        ("pod m-1, restarted 3 times: no memory", 3, LATER),
    ]


async def test_other_news_of_a_reason_are_told_beside_it(stored: Cluster) -> None:
    model, tells = stored.get("Model", "m"), EventRecorder(stored.store)

    await tells.tell(model, crash(1), NOW)
    await tells.tell(model, crash(1, pod="m-2"), NOW)
    await tells.tell({**model, "metadata": {**model["metadata"], "uid": "other"}}, crash(1), NOW)

    assert [count for _, count, _ in events(stored.store)] == [1, 1, 1]


async def test_an_event_that_the_cluster_has_forgotten_is_written_again(stored: Cluster) -> None:
    model, tells = stored.get("Model", "m"), EventRecorder(stored.store)
    await tells.tell(model, crash(1), NOW)
    (old,) = stored.store.find("Event")
    stored.store.drop("Event", "default", old["metadata"]["name"])

    await tells.tell(model, crash(2), LATER)

    assert events(stored.store) == [("pod m-1, restarted 2 times: no memory", 1, LATER)]


async def test_only_so_many_are_remembered(stored: Cluster) -> None:
    model, tells = stored.get("Model", "m"), EventRecorder(stored.store, max_remembered=2)

    for pod in ("m-1", "m-2", "m-1", "m-3", "m-1", "m-2"):
        await tells.tell(model, crash(1, pod), NOW)

    counts = {message.split()[1]: [] for message, _, _ in events(stored.store)}
    for message, count, _ in events(stored.store):
        counts[message.split()[1]].append(count)
    assert counts == {"m-1,": [3], "m-2,": [1, 1], "m-3,": [1]}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ApiError(500, "etcd is away"), "cannot be looked after: etcd is away; tried again in 2.0"),
        (KeyError("spec"), "a defect of the operator; see its log; tried again in 2.0 s"),
    ],
)
async def test_a_resource_whose_passes_fail_says_so_once(
    stored: Cluster, error: Any, said: str
) -> None:
    for again_s in (8.0, 2.0):
        await stored.reconciler.tell_of_failure(Key("Model", "default", "m"), error, again_s)
    await stored.reconciler.tell_of_failure(Key("Model", "default", "gone"), error, 2.0)

    ((message, count, _),) = events(stored.store)
    assert said in message
    assert count == 2
