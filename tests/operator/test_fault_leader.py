"""At no time may two replicas write: paused processes, slow networks, clocks that run and jump."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_operator.kube.leader import Elector, LeaseTimes, steady_clock
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.resources.base import Object

TIMES = LeaseTimes(15.0, 10.0, 2.0)


class World:
    """True time; what is due happens in order, nothing waits for real."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, asyncio.Event]] = []
        self._count = 0

    async def sleep_until(self, when: float) -> None:
        self._count += 1
        event = asyncio.Event()
        self._due.append((when, self._count, event))
        await event.wait()

    async def advance(self, until: float) -> None:
        while True:
            for _ in range(15):
                await asyncio.sleep(0)
            due = min(self._due, default=None)
            if due is None or due[0] > until:
                self.now = until
                return
            self._due.remove(due)
            self.now = max(self.now, due[0])
            due[2].set()


class Lease:
    """The apiserver's one Lease with its version."""

    def __init__(self) -> None:
        self.stored: Object | None = None
        self.version = 0

    def get(self) -> Object | None:
        return copy.deepcopy(self.stored)

    def create(self, obj: Object) -> Object | None:
        return None if self.stored is not None else self._store(obj)

    def replace(self, obj: Object) -> Object:
        assert self.stored is not None
        if obj["metadata"]["resourceVersion"] != self.stored["metadata"]["resourceVersion"]:
            raise ApiError(409, "someone else wrote")
        return self._store(obj)

    def _store(self, obj: Object) -> Object:
        self.version += 1
        self.stored = copy.deepcopy(obj)
        self.stored["metadata"]["resourceVersion"] = str(self.version)
        return copy.deepcopy(self.stored)


class Replica:
    """One process: its clock has an offset and a rate, its wall clock jumps, it can be paused."""

    def __init__(self, name: str, world: World, lease: Lease, rng: random.Random) -> None:
        self.world, self.lease, self.rng = world, lease, rng
        self.rate = rng.uniform(0.9, 1.1)
        self.offset = rng.uniform(0.0, 1e6)
        self.paused_until = 0.0
        self.bad = 0.0  # probability that a message is lost or late
        self.elector = Elector(self, "ns", "lease", name, TIMES, self.clock, self.sleep, self.wall)
        self.task = asyncio.create_task(self._run())

    def clock(self) -> float:
        return self.offset + self.rate * self.world.now

    def wall(self) -> float:
        return self.rng.uniform(0.0, 4e9)

    async def sleep(self, seconds: float) -> None:
        await self._resume_at(self.world.now + seconds / self.rate)

    async def _resume_at(self, when: float) -> None:
        await self.world.sleep_until(when)
        while self.paused:
            await self.world.sleep_until(self.paused_until)

    @property
    def paused(self) -> bool:
        return self.world.now < self.paused_until

    @property
    def writes(self) -> bool:
        return not self.paused and self.elector.may_write()

    async def _run(self) -> None:
        while True:
            await self.elector.acquire()
            await self.elector.hold()

    async def _leg(self) -> None:
        """One way of a message: at once, or late, or never."""
        if self.rng.random() < self.bad:
            if self.rng.random() < 0.5:
                await self._resume_at(self.world.now + 5.0)
                raise ApiError(0, "lost")
            await self._resume_at(self.world.now + self.rng.uniform(0.0, 12.0))

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        await self._leg()
        found = self.lease.get()
        await self._leg()
        return found

    async def create(self, obj: Object) -> Object | None:
        await self._leg()
        found = self.lease.create(obj)
        await self._leg()
        return found

    async def replace(self, obj: Object) -> Object:
        await self._leg()
        found = self.lease.replace(obj)
        await self._leg()
        return found


async def end(replicas: list[Replica]) -> None:
    for replica in replicas:
        replica.task.cancel()
    await asyncio.gather(*(r.task for r in replicas), return_exceptions=True)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
async def test_never_two_writers_and_one_again_once_all_is_well(seed: int) -> None:
    rng, world, lease = random.Random(seed), World(), Lease()
    replicas = [Replica(name, world, lease, rng) for name in "ab"]
    led = 0
    for _ in range(40):
        for replica in replicas:
            replica.bad = rng.choice([0.0, 0.0, 0.3, 0.9])
            if rng.random() < 0.1:
                replica.paused_until = world.now + rng.choice([1.0, 8.0, 14.0, 20.0, 90.0])
        ends = world.now + rng.choice([1.0, 5.0, 20.0])
        while world.now < ends:
            await world.advance(world.now + 0.5)
            writers = [r for r in replicas if r.writes]
            assert len(writers) <= 1, f"two writers at {world.now}"
            led += len(writers)

    for replica in replicas:
        replica.bad = 0.0
    # Whoever is paused goes on when its pause ends, and then the lease may have to run out.
    await world.advance(max(world.now, *(r.paused_until for r in replicas)) + 60.0)
    writers = [r for r in replicas if r.writes]
    await end(replicas)

    assert len(writers) == 1
    assert led


async def test_a_stopped_process_may_not_write_when_it_goes_on() -> None:
    """It has not run since, so nothing has told it yet that it no longer leads."""
    rng, world, lease = random.Random(0), World(), Lease()
    replicas = [Replica(name, world, lease, rng) for name in "ab"]
    await world.advance(5.0)
    leader, other = replicas if replicas[0].writes else replicas[::-1]

    leader.paused_until = 40.0
    world.now = 40.0  # nothing of the leader ran meanwhile
    still_believes = leader.elector.leading
    may = leader.elector.may_write()
    await world.advance(80.0)
    after = leader.writes + other.writes
    await end(replicas)

    assert still_believes
    assert not may
    assert after == 1


async def test_the_wall_clock_is_only_written_never_compared() -> None:
    """Replica a lives in 1970 and b in 2096: the lead stays where it was."""
    rng, world, lease = random.Random(1), World(), Lease()
    replicas = [Replica(name, world, lease, rng) for name in "ab"]
    await world.advance(5.0)
    leader = next(r for r in replicas if r.writes)

    for when in range(6, 120):
        await world.advance(float(when))
        assert leader.writes
    with contextlib.suppress(ApiError):
        await leader.elector.release()
    assert not leader.writes
    await end(replicas)


def test_the_operators_clock_counts_from_boot_whatever_the_wall_clock_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    said = steady_clock()
    after = time.clock_gettime(time.CLOCK_BOOTTIME)

    assert before <= said <= after
