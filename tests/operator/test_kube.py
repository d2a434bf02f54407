"""Kubernetes parts without a cluster: election on a fake clock, caches on a scripted apiserver."""

from __future__ import annotations

import asyncio
import copy
import logging
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_operator.__main__ import log_as
from tandem_operator.kube.cache import RETRY_FIRST_S, KindCache
from tandem_operator.kube.client import Gone, path
from tandem_operator.kube.leader import Elector, LeaseTimes
from tandem_operator.kube.operator import build_parser
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.resources.allow_list import AllowList
from tandem_operator.resources.base import Object


class Clock:
    """Virtual time: sleepers wake in order, nothing waits for real."""

    def __init__(self) -> None:
        self.now = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Event]] = []
        self._count = 0

    async def sleep(self, seconds: float) -> None:
        self._count += 1
        event = asyncio.Event()
        self._sleepers.append((self.now + seconds, self._count, event))
        await event.wait()

    async def advance(self, until: float) -> None:
        while True:
            await self._settle()
            due = min(self._sleepers, default=None)
            if due is None or due[0] > until:
                self.now = until
                return
            self._sleepers.remove(due)
            self.now = max(self.now, due[0])
            due[2].set()

    @staticmethod
    async def _settle() -> None:
        for _ in range(20):
            await asyncio.sleep(0)


class Leases:
    """One Lease, with versions; `down` holds the identities that cannot reach it."""

    def __init__(self) -> None:
        self.lease: Object | None = None
        self.version = 0

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        assert (kind, namespace, name) == ("Lease", "ns", "lease")
        return copy.deepcopy(self.lease)

    async def create(self, obj: Object) -> Object | None:
        if self.lease is not None:
            return None
        return self._store(obj)

    async def replace(self, obj: Object) -> Object:
        assert self.lease is not None
        if obj["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise ApiError(409, "someone else wrote")
        return self._store(obj)

    def _store(self, obj: Object) -> Object:
        self.version += 1
        stored = copy.deepcopy(obj)
        stored["metadata"]["resourceVersion"] = str(self.version)
        self.lease = stored
        return copy.deepcopy(stored)


class Flaky:
    """A replica's own way to the Lease, which a test can cut."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self.up = True

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._leases, name)

        async def guarded(*args: Any) -> Any:
            if not self.up:
                raise ApiError(0, "no answer")
            return await call(*args)

        return guarded


class Replica:
    """Takes part in the election again and again, as a restarted pod would."""

    def __init__(self, name: str, leases: Leases, clock: Clock) -> None:
        self.name, self.clock = name, clock
        self.api = Flaky(leases)
        self.elector = self._elector()
        self.task = asyncio.create_task(self._run())

    def _elector(self) -> Elector:
        return Elector(
            self.api,
            "ns",
            "lease",
            self.name,
            LeaseTimes(15, 10, 2),
            lambda: self.clock.now,
            self.clock.sleep,
        )

    async def _run(self) -> None:
        while True:
            await self.elector.acquire()
            await self.elector.hold()
            self.elector = self._elector()

    def kill(self) -> None:
        self.task.cancel()
        self.elector.leading = False


async def test_one_leads_and_the_other_takes_over_when_it_dies() -> None:
    clock, leases = Clock(), Leases()
    first, second = Replica("a", leases, clock), Replica("b", leases, clock)
    await clock.advance(30)
    leader, other = (first, second) if first.elector.leading else (second, first)
    assert leader.elector.leading != other.elector.leading

    leader.kill()
    died = clock.now
    await clock.advance(died + 12)
    assert not other.elector.leading
    await clock.advance(died + 20)

    assert other.elector.leading
    other.kill()


async def test_a_leader_that_is_cut_off_gives_up_before_another_leads() -> None:
    clock, leases = Clock(), Leases()
    first, second = Replica("a", leases, clock), Replica("b", leases, clock)
    await clock.advance(20)
    leader, other = (first, second) if first.elector.leading else (second, first)

    leader.api.up = False
    for step in range(1, 40):
        await clock.advance(20 + step)
        assert not (leader.elector.leading and other.elector.leading)

    assert other.elector.leading
    first.kill()
    second.kill()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
async def test_never_two_leaders_whatever_is_cut(seed: int) -> None:
    rng = random.Random(seed)
    clock, leases = Clock(), Leases()
    replicas = [Replica(name, leases, clock) for name in "abc"]
    led = 0
    for step in range(120):
        for replica in replicas:
            replica.api.up = rng.random() < (0.6 if step < 80 else 1.0)
        await clock.advance(clock.now + rng.choice([0.5, 1, 3, 9]))
        leaders = [r.name for r in replicas if r.elector.leading]
        assert len(leaders) <= 1
        led += len(leaders)
    for replica in replicas:
        replica.kill()

    assert led


async def test_a_released_lease_is_taken_at_once() -> None:
    clock, leases = Clock(), Leases()
    first = Replica("a", leases, clock)
    await clock.advance(5)
    second = Replica("b", leases, clock)
    await clock.advance(6)

    await first.elector.release()
    first.kill()
    await clock.advance(9)

    assert second.elector.leading
    second.kill()


async def test_a_lease_that_cannot_be_given_back_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """The end goes on all the same: others take the lead when it has been silent long enough."""
    clock, leases = Clock(), Leases()
    replica = Replica("a", leases, clock)
    await clock.advance(5)

    async def refuse(*_: str) -> None:
        raise ApiError(503, "the apiserver is away")

    leases.get = refuse  # type: ignore[assignment]
    await replica.elector.release()
    replica.kill()

    assert not replica.elector.leading
    assert "others wait up to 15 s: the apiserver is away" in caplog.text


@pytest.mark.parametrize("times", [(15, 15, 2), (10, 12, 2), (15, 10, 10), (15, 10, 0)])
def test_lease_times_that_allow_two_leaders_are_refused(times: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must rise"):
        LeaseTimes(*times)


# Caches -------------------------------------------------------------------------------------


def pod(name: str, version: int, **labels: str) -> Object:
    return {
        "metadata": {
            "name": name,
            "namespace": "default",
            "resourceVersion": str(version),
            "labels": {"tandem.dev/model": "m", **labels},
            "managedFields": [{"much": "text"}],
        }
    }


class Server:
    """Lists and watch streams in the order in which a test gives them."""

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.watched_from: list[str] = []
        self.done = asyncio.Event()

    async def list_page(self, *_: Any) -> tuple[list[Object], str]:
        await asyncio.sleep(0)
        found = self.script.pop(0)
        if isinstance(found, Exception):
            raise found
        items: tuple[list[Object], str] = found
        return items

    async def watch(self, *args: Any) -> AsyncIterator[tuple[str, Object]]:
        self.watched_from.append(args[-1])
        if not self.script:
            self.done.set()
            await asyncio.Event().wait()
        events = self.script.pop(0)
        for event in events:
            if isinstance(event, Exception):
                raise event
            yield event


async def follow(
    *script: Any, waits: list[float] | None = None
) -> tuple[KindCache, Server, list[str]]:
    server, seen = Server(*script), list[str]()

    async def sleep(seconds: float) -> None:
        (waits if waits is not None else []).append(seconds)

    cache = KindCache(
        server,  # type: ignore[arg-type]
        "Pod",
        (None,),
        "",
        lambda o: seen.append(o["metadata"]["name"]),
        sleep=sleep,
    )
    task = asyncio.create_task(cache.run())
    async with asyncio.timeout(5):
        await server.done.wait()
    task.cancel()
    return cache, server, seen


def names(cache: KindCache) -> list[str]:
    return [o["metadata"]["name"] for o in cache.select("default", {"tandem.dev/model": "m"})]


async def test_a_cache_follows_every_change() -> None:
    cache, _, seen = await follow(
        ([pod("a", 1), pod("b", 2)], "2"),
        [("ADDED", pod("c", 3)), ("DELETED", pod("a", 4)), ("MODIFIED", pod("b", 5))],
    )

    assert names(cache) == ["b", "c"]
    assert seen == ["a", "b", "c", "a", "b"]
    assert "managedFields" not in cache.select(None, {})[0]["metadata"]


async def test_a_cut_watch_goes_on_where_it_was() -> None:
    _, server, _ = await follow(
        ([pod("a", 1)], "1"),
        [("ADDED", pod("b", 7)), ApiError(0, "cut")],
        [("BOOKMARK", pod("x", 9))],
    )

    assert server.watched_from == ["1", "7", "9"]


async def test_what_was_deleted_during_an_outage_goes_after_a_410() -> None:
    cache, server, seen = await follow(
        ([pod("a", 1), pod("b", 2)], "2"),
        [Gone()],
        ([pod("b", 2), pod("c", 8)], "8"),
    )

    assert names(cache) == ["b", "c"]
    assert seen == ["a", "b", "c", "a"]
    assert server.watched_from == ["2", "8"]


async def test_a_refused_list_is_tried_again() -> None:
    cache, _, _ = await follow(ApiError(500, "later"), ([pod("a", 1)], "1"))

    assert names(cache) == ["a"]
    assert cache.synced.is_set()


LISTED: tuple[list[Object], str] = ([], "1")


@pytest.mark.parametrize(
    "script",
    [
        pytest.param([LISTED, [], [], [], []], id="watches that end at once"),
        pytest.param([LISTED, [Gone()]] * 4 + [LISTED], id="versions that are gone at once"),
        pytest.param([LISTED, [ApiError(403, "no")]] * 4 + [LISTED], id="watches that are refused"),
        pytest.param([ApiError(500, "no")] * 4 + [LISTED], id="lists that are refused"),
    ],
)
async def test_a_watch_that_tells_nothing_is_asked_for_more_and_more_rarely(
    script: list[Any],
) -> None:
    waits: list[float] = []

    await follow(*script, waits=waits)

    assert waits == [RETRY_FIRST_S * 2**i for i in range(4)]


async def test_a_watch_that_tells_something_is_asked_for_again_at_once() -> None:
    waits: list[float] = []

    await follow(LISTED, [], [], [("ADDED", pod("a", 7))], [], waits=waits)

    assert waits == [RETRY_FIRST_S, 2 * RETRY_FIRST_S, RETRY_FIRST_S]


async def test_an_object_that_loses_its_labels_leaves_the_index() -> None:
    moved = pod("a", 2)
    moved["metadata"]["labels"] = {}
    cache, _, _ = await follow(([pod("a", 1)], "1"), [("MODIFIED", moved)])

    assert names(cache) == []
    assert cache.get("default", "a") is not None


def test_paths_follow_the_api() -> None:
    assert path("Pod", None) == "/api/v1/pods"
    assert path("Model", "ns", "m") == "/apis/tandem.dev/v1alpha1/namespaces/ns/models/m"
    assert path("Deployment", "ns") == "/apis/apps/v1/namespaces/ns/deployments"


def test_the_operator_takes_the_arguments_that_the_chart_gives() -> None:
    args = build_parser().parse_args(
        "--lease-namespace=ns --lease-name=t --lease-seconds=15 --router-image=r --worker-image=w "
        "--image-pull-policy=Always --cluster-domain=c --log-level=info --own-namespace=o "
        '--allow={"podFields":["command"]} --network-policies={"enabled":false} '
        "--namespace=n --prometheus-url=http://prometheus:9090".split()
    )

    assert args.lease_seconds == 15
    assert args.prometheus_url == "http://prometheus:9090"
    assert args.network_policies.enabled is False
    assert args.network_policies.metrics_from
    assert args.allow.pod_fields == ("command",)
    assert build_parser().parse_args([]).allow == AllowList()


def test_an_allow_list_that_is_misspelt_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(['--allow={"image": ["x"]}'])

    assert "argument --allow: image: Extra inputs are not permitted" in capsys.readouterr().err


@pytest.mark.parametrize(("level", "quiet"), [("info", True), ("debug", False)])
def test_each_question_to_a_pod_is_a_line_only_where_everything_is(level: str, quiet: bool) -> None:
    asking = logging.getLogger("httpx")
    before, root = asking.level, logging.getLogger().level
    asking.setLevel(logging.NOTSET)
    try:
        logging.getLogger().setLevel(level.upper())
        log_as(level, "text")
        assert asking.isEnabledFor(logging.INFO) is not quiet
    finally:
        asking.setLevel(before)
        logging.getLogger().setLevel(root)
