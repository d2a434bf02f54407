"""What keeps the operator calm, on virtual time: who comes next, rests, waits, is asked again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_operator.kube.cache import SECRET_S, CachedApi
from tandem_operator.kube.traffic import SampledTraffic
from tandem_operator.plan.objects import ROUTER_LABEL
from tandem_operator.plan.router_facts import TrafficFacts
from tandem_operator.reconcile.requeue import SETTLE_S, Key
from tandem_operator.reconcile.work_queue import MAX_DELAY_S, REST_S, WorkQueue
from tandem_operator.resources.base import Object

A, B = Key("Model", "ns", "a"), Key("Model", "ns", "b")


Due = tuple[float, int, Callable[..., None], tuple[Any, ...]]


class Timer:
    """What call_later gives."""

    def __init__(self, due: list[Due], entry: Due) -> None:
        self._due, self._entry = due, entry

    def cancel(self) -> None:
        if self._entry in self._due:
            self._due.remove(self._entry)


class Timers:
    """call_later on a clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self._count = 0
        self._due: list[Due] = []

    def call_later(self, delay: float, call: Callable[..., None], *args: Any) -> Timer:
        self._count += 1
        entry = (self.now + delay, self._count, call, args)
        self._due.append(entry)
        return Timer(self._due, entry)

    def advance(self, seconds: float) -> None:
        until = self.now + seconds
        while due := [d for d in self._due if d[0] <= until]:
            first = min(due, key=lambda d: d[:2])
            self._due.remove(first)
            self.now = first[0]
            first[2](*first[3])
        self.now = until


def queue_on(timers: Timers) -> WorkQueue:
    return WorkQueue(timers.call_later, lambda: timers.now)


def taken(queue: WorkQueue) -> list[Key]:
    """Everything that can be taken now."""
    found = []
    while True:
        attempt = queue.take()
        try:
            attempt.send(None)
        except StopIteration as end:
            found.append(end.value)
        else:
            attempt.close()
            return found


async def test_many_events_of_a_resource_make_one_pass() -> None:
    queue = queue_on(Timers())
    for key in (A, B, A, A):
        queue.add(key)

    assert taken(queue) == [A, B]


async def test_what_changes_during_a_pass_is_looked_at_again_after_a_rest() -> None:
    timers = Timers()
    queue = queue_on(timers)
    queue.add(A)
    taken(queue)
    queue.add(A)
    queue.done(A)

    assert taken(queue) == []
    timers.advance(REST_S)
    assert taken(queue) == [A]


async def test_events_after_a_pass_wait_together_for_the_end_of_the_rest() -> None:
    timers = Timers()
    queue = queue_on(timers)
    queue.add(A)
    taken(queue)
    queue.done(A)
    timers.advance(REST_S / 2)
    queue.add(A)
    queue.add(A)

    assert taken(queue) == []
    assert len(queue) == 1
    timers.advance(REST_S / 2)
    assert taken(queue) == [A]
    queue.done(A)
    timers.advance(REST_S)
    assert taken(queue) == []
    assert len(queue) == 0


async def test_failures_wait_longer_and_longer_and_a_success_forgets_them() -> None:
    timers = Timers()
    queue = queue_on(timers)
    delays = []
    queue.add(A)
    for _ in range(10):
        assert taken(queue) == [A]
        delays.append(queue.failed(A))
        timers.advance(max(delays[-1], REST_S))

    assert delays == sorted(delays)
    assert delays[0] < delays[-1] == MAX_DELAY_S
    assert taken(queue) == [A]
    queue.done(A)
    timers.advance(REST_S)
    queue.add(A)
    taken(queue)
    assert queue.failed(A) == delays[0]


async def test_failures_that_events_provoke_do_not_put_the_next_try_off() -> None:
    timers = Timers()
    queue = queue_on(timers)
    queue.add(A)
    taken(queue)
    first = queue.failed(A)
    for _ in range(8):
        queue.add(A)
        timers.advance(REST_S / 10)
    timers.advance(REST_S)
    delays = []
    for _ in range(4):
        queue.add(A)
        assert taken(queue) == [A]
        delays.append(queue.failed(A))
        timers.advance(REST_S)

    assert max(delays) <= 4 * first


async def test_a_success_ends_the_waiting_for_the_next_try() -> None:
    """A new failure is tried again within its own delay, not with the last one of a bad hour."""
    timers = Timers()
    queue = queue_on(timers)
    queue.add(A)
    for _ in range(10):
        taken(queue)
        timers.advance(max(queue.failed(A), REST_S))
    taken(queue)
    queue.failed(A)
    timers.advance(REST_S)
    queue.add(A)
    taken(queue)
    queue.done(A)
    timers.advance(REST_S)
    queue.add(A)
    taken(queue)
    delay = queue.failed(A)

    assert taken(queue) == []
    timers.advance(max(delay, REST_S))
    assert taken(queue) == [A]


async def test_of_two_appointments_the_sooner_one_counts_and_there_is_one() -> None:
    timers = Timers()
    queue = queue_on(timers)
    queue.add_later(A, 30.0)
    queue.add_later(A, 5.0)
    queue.add_later(A, 20.0)

    timers.advance(4.9)
    assert taken(queue) == []
    timers.advance(0.1)
    assert taken(queue) == [A]
    queue.done(A)
    timers.advance(60.0)
    assert taken(queue) == []


@given(st.lists(st.sampled_from(["add a", "add b", "take", "done", "fail", "wait"]), max_size=40))
async def test_no_event_is_lost_and_nothing_runs_twice_at_once(steps: list[str]) -> None:
    timers = Timers()
    queue = queue_on(timers)
    running: list[Key] = []
    wanted: set[Key] = set()
    for step in steps:
        if step.startswith("add"):
            key = A if step.endswith("a") else B
            queue.add(key)
            wanted.add(key)
        elif step == "take":
            for key in taken(queue):
                assert key not in running
                running.append(key)
                wanted.discard(key)
        elif step == "wait":
            timers.advance(REST_S)
        elif running:
            key = running.pop()
            if step == "done":
                queue.done(key)
            else:
                queue.failed(key)
                wanted.add(key)
    for key in running:
        queue.done(key)
    timers.advance(MAX_DELAY_S)

    assert wanted <= set(taken(queue))


class Api:
    """Counts what is created and deleted."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def create(self, obj: Object) -> Object | None:
        self.calls.append(f"create {obj['metadata']['namespace']}")
        return None

    async def delete(self, kind: str, namespace: str, name: str) -> None:
        self.calls.append(f"delete {namespace}")


async def test_a_shared_secret_is_asked_for_once_in_a_while() -> None:
    """Nobody may list Secrets, and every pass over a starting Model needs to know."""
    api, timers = Api(), Timers()
    cached = CachedApi(api, (None,), lambda _: None, clock=lambda: timers.now)  # type: ignore[arg-type]

    def secret(namespace: str) -> Object:
        return {"kind": "Secret", "metadata": {"name": "s", "namespace": namespace}}

    for _ in range(3):
        await cached.create(secret("one"))
    await cached.create(secret("two"))
    assert api.calls == ["create one", "create two"]

    timers.advance(SECRET_S)
    await cached.create(secret("one"))
    assert api.calls[2:] == ["create one"]

    await cached.delete("Secret", "one", "s")
    await cached.create(secret("one"))
    assert api.calls[3:] == ["delete one", "create one"]


# What Routers measured ------------------------------------------------------------------------


def router_pod(router: str, uid: str, ready: bool = True) -> Object:
    labels = {ROUTER_LABEL: router}
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    return {
        "metadata": {"name": uid, "uid": uid, "namespace": "ns", "labels": labels},
        "status": {"conditions": conditions},
    }


class Looks:
    """Counts how often each Router is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, pods: list[Object]) -> TrafficFacts | None:
        self.asked.append(pods[0]["metadata"]["labels"][ROUTER_LABEL])
        return TrafficFacts(threshold=len(self.asked) / 10)


@pytest.mark.parametrize("num_routers", [1, 20, 100, 300])
async def test_however_many_routers_there_are_they_are_asked_less_than_once_a_second(
    num_routers: int,
) -> None:
    looks, timers = Looks(), Timers()
    traffic = SampledTraffic(looks, 30.0, lambda: timers.now)
    pods = [[router_pod(f"r{i}", f"u{i}")] for i in range(num_routers)]

    async def rest(seconds: int) -> None:
        for _ in range(0, seconds, 5):  # a managed Router is looked at every five seconds
            for own in pods:
                await traffic(own)
            timers.advance(5)

    await rest(1200)
    looks.asked.clear()
    for _ in range(20):
        before = len(looks.asked)
        await rest(60)
        assert len(looks.asked) - before < 60

    assert len(set(looks.asked)) == num_routers


async def test_a_routers_new_pod_is_asked_at_once() -> None:
    looks = Looks()
    traffic = SampledTraffic(looks, 30.0, lambda: 0.0)

    assert await traffic([router_pod("r", "a", ready=False)]) is None
    first = await traffic([router_pod("r", "a")])
    assert await traffic([router_pod("r", "a")]) == first
    assert await traffic([router_pod("r", "a"), router_pod("r", "b")]) != first
    assert len(looks.asked) == 2


async def test_pods_that_were_given_something_new_are_asked_again_once_they_had_time() -> None:
    looks, timers = Looks(), Timers()
    traffic = SampledTraffic(looks, 30.0, lambda: timers.now)
    pods = [router_pod("r", "a")]
    namespace = pods[0]["metadata"]["namespace"]
    first = await traffic(pods)

    traffic.ask_again(namespace, "r")
    at_once = await traffic(pods)
    timers.advance(SETTLE_S)
    settled = await traffic(pods)

    assert at_once == first
    assert settled != first
    assert await traffic(pods) == settled
