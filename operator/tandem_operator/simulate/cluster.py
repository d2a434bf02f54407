"""Pools of simulated workers: requests are picked, prefilled here or there, pushed and decoded.

The picker is the router's own and sees what it would see live: load reports as old as its polls.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from tandem_operator.simulate.arrivals import Arrival
from tandem_operator.simulate.clock import VirtualClock
from tandem_operator.simulate.engine import (
    CountedTokens,
    EngineSettings,
    GapHistogram,
    Job,
    SimulatedWorker,
)
from tandem_operator.simulate.profiles import Profile
from tandem_router.balancing.endpoint_picker import UNKNOWN_OUTPUT_TOKENS, Picker
from tandem_router.balancing.endpoint_picker import Pick as WorkerPick
from tandem_router.balancing.worker import Load
from tandem_router.config import PickingConfig
from tandem_worker.scheduling.scheduler import PrefillChoice
from tandem_worker.scheduling.sequence import Sequence as ScheduledSequence

Role = Literal["unified", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """One pool of a plan.

    Attributes:
        local_prefill_max_tokens: Decode workers prefill up to this many uncached tokens themselves;
            None compares measured costs, as the live worker does.
    """

    tier: str
    role: Role
    replicas: int
    profile: Profile
    settings: EngineSettings
    usd_per_hour: float = 0.0
    gpus: int = 0
    minimum: int = 0
    maximum: int = 64
    local_prefill_max_tokens: int | None = None

    @property
    def key(self) -> tuple[str, Role]:
        """Name of the pool in every mapping."""
        return self.tier, self.role


@dataclass(eq=False)
class Pod:
    """A worker of a pool from its start to its end."""

    url: str
    pool: PoolPlan
    worker: SimulatedWorker
    started_s: float
    ready_s: float
    draining: bool = False
    link_free_s: float = 0.0
    gone: bool = False


@dataclass(eq=False, slots=True)
class Running:
    """A request at its workers."""

    arrival: Arrival
    tier: str
    on_first: Callable[[float], None]
    on_done: Callable[[float], None]
    pick: WorkerPick | None = None
    decode: Pod | None = None
    prefill: Pod | None = None
    job: Job | None = None
    num_outputs: int = 1


@dataclass
class Usage:
    """What pods have held so far."""

    pod_s: dict[tuple[str, Role], float] = field(default_factory=dict)
    gpu_s: float = 0.0
    usd: float = 0.0


class SimulatedCluster:
    """All pods of all tiers behind one picker.

    Args:
        pools: What runs at the start.
        clock: Virtual time.
        seed: For the picker's choices.
        startup_s: From a pod's creation until it serves.
        picking: The router's settings.
    """

    def __init__(
        self,
        pools: Mapping[tuple[str, Role], PoolPlan],
        clock: VirtualClock,
        *,
        seed: int = 0,
        startup_s: float = 60.0,
        picking: PickingConfig | None = None,
    ) -> None:
        self._clock = clock
        self.pools = dict(pools)
        self._startup_s = startup_s
        self._picking = picking or PickingConfig()
        self.picker = Picker(self._picking, random.Random(seed), clock)
        self.pods: dict[str, Pod] = {}
        self.gaps = GapHistogram()
        self.usage = Usage()
        self._counted_at = 0.0
        self._names = itertools.count(1)
        self._numbers = itertools.count(1)
        self._reported_at = -1.0
        for pool in self.pools.values():
            for _ in range(pool.replicas):
                self._start(pool, 0.0)
        self._list()

    # -- pods ------------------------------------------------------------------------------------

    def _start(self, pool: PoolPlan, startup_s: float) -> None:
        number = next(self._names)
        url = f"http://{pool.tier}-{pool.role}-{number}:8100"
        worker = SimulatedWorker(
            self._clock,
            pool.profile,
            pool.settings,
            self.gaps,
            choose_remote=self._remote_choice(pool, url),
        )
        now = self._clock.now
        self.pods[url] = Pod(url, pool, worker, now, now + startup_s)
        if startup_s > 0.0:
            self._clock.after(startup_s, self._list)

    def _remote_choice(self, pool: PoolPlan, url: str) -> PrefillChoice | None:
        if pool.role != "decode":
            return None
        most = pool.local_prefill_max_tokens
        if most is not None:
            return lambda sequence, uncached: uncached > most
        profile = pool.profile

        def cheaper(sequence: ScheduledSequence, uncached: int) -> bool:
            running = len(self.pods[url].worker.scheduler.running)
            return remote_is_cheaper(profile, uncached, running)

        return cheaper

    def _list(self) -> None:
        """Tell the picker which pods are ready; as EndpointSlices do."""
        now = self._clock.now
        table: dict[str, dict[Role, list[str]]] = {}
        for pod in self.pods.values():
            if pod.ready_s <= now and not pod.draining:
                table.setdefault(pod.pool.tier, {}).setdefault(pod.pool.role, []).append(pod.url)
        self.picker.set_table(
            {t: {r: tuple(urls) for r, urls in roles.items()} for t, roles in table.items()}
        )
        self._reported_at = -1.0

    def count_usage(self) -> Usage:
        """Bring pod seconds, GPU seconds and dollars up to now."""
        elapsed = self._clock.now - self._counted_at
        self._counted_at = self._clock.now
        if elapsed > 0.0:
            for pod in self.pods.values():
                key, pool = pod.pool.key, pod.pool
                self.usage.pod_s[key] = self.usage.pod_s.get(key, 0.0) + elapsed
                self.usage.gpu_s += elapsed * pool.gpus
                self.usage.usd += elapsed * pool.usd_per_hour / 3600.0
        return self.usage

    def num_workers(self, key: tuple[str, Role]) -> int:
        """Pods of a pool that are wanted, ready or starting."""
        return sum(p.pool.key == key and not p.draining for p in self.pods.values())

    def scale(self, key: tuple[str, Role], replicas: int) -> None:
        """Start or drain pods until so many are wanted; a draining pod finishes what it has."""
        pool = self.pools[key]
        current = [p for p in self.pods.values() if p.pool.key == key and not p.draining]
        self.count_usage()
        for _ in range(replicas - len(current)):
            self._start(pool, self._startup_s)
        # As pod deletion costs say: those not ready first, then the idlest.
        now = self._clock.now
        order = sorted(
            current, key=lambda p: (p.ready_s <= now, p.worker.num_requests, -p.started_s)
        )
        for pod in order[: max(0, len(current) - replicas)]:
            pod.draining = True
            self._retire(pod)
        self._list()

    def _retire(self, pod: Pod) -> None:
        if pod.draining and not pod.gone and pod.worker.num_requests == 0:
            self.count_usage()
            pod.gone = True
            self.pods.pop(pod.url, None)

    # -- requests --------------------------------------------------------------------------------

    def _report(self) -> None:
        """Load reports, as old as the router's polls are."""
        now = self._clock.now
        if self._reported_at >= 0.0 and now - self._reported_at < self._picking.load_poll_s:
            return
        self._reported_at = now
        for known in self.picker.workers:
            worker = self.pods[known.url].worker
            blocks = worker.blocks
            load = Load(
                num_requests=worker.num_requests,
                pending_prefill_tokens=worker.scheduler.num_pending_prefill_tokens,
                expected_tokens=float(worker.scheduler.num_expected_tokens),
                kv_free_share=blocks.num_available / blocks.num_blocks,
            )
            self.picker.observed(known, load)

    def submit(self, running: Running) -> bool:
        """Pick workers and send; False when no worker of the tier could take it."""
        arrival = running.arrival
        self._report()
        per_block = self._picking.prefix_block_bytes / 4.0
        chain = _chain(arrival, per_block, self._picking.max_prefix_blocks)
        refused: set[str] = set()
        expected = arrival.expected_tokens
        while True:
            pick = self.picker.pick(
                running.tier,
                chain,
                float(arrival.prompt_tokens),
                refused,
                expected_tokens=expected,
            )
            if pick is None:
                return False
            decode = self.pods[pick.decode.url]
            if not decode.worker.is_full:
                break
            self.picker.finished(pick)
            refused.add(pick.decode.url)
        running.pick = pick
        running.decode = decode
        running.prefill = self.pods[pick.prefill.url] if pick.prefill is not None else None
        running.num_outputs = arrival.output_of(running.tier)
        number = next(self._numbers)
        sequence = self._sequence(arrival, f"r{number}", number)
        sequence.remote_prefill = running.prefill is not None
        sequence.predicted_output_tokens = expected or int(UNKNOWN_OUTPUT_TOKENS)
        running.job = Job(
            sequence,
            running.num_outputs,
            on_first=lambda job: self._first(running),
            on_done=lambda job: self._done(running),
            on_reserved=lambda job: self._order_prefill(running, number),
        )
        decode.worker.submit(running.job)
        return True

    def _sequence(self, arrival: Arrival, name: str, number: int) -> ScheduledSequence:
        tokens = CountedTokens(arrival.prompt_tokens, arrival.prefix, arrival.block_tokens, number)
        return ScheduledSequence(name, tokens, arrival.prompt_tokens, arrival_s=self._clock.now)

    def _order_prefill(self, running: Running, number: int) -> None:
        """The decode worker has reserved blocks: the prefill worker computes and pushes."""
        assert running.prefill is not None
        sequence = self._sequence(running.arrival, f"p{number}", number)
        sequence.pinned = True
        pod = running.prefill
        pod.worker.submit(
            Job(
                sequence,
                1,
                on_first=lambda job: None,
                on_done=lambda job: self._push(running, pod, job),
                hold=True,
            )
        )

    def _push(self, running: Running, pod: Pod, prefilled: Job) -> None:
        """Layers have travelled while later ones were computed: the tail and a busy link remain."""
        assert running.job is not None
        profile = pod.pool.profile
        cached = running.job.sequence.num_computed_tokens
        tokens = running.arrival.prompt_tokens - cached
        whole_s = tokens * profile.kv_bytes_per_token / profile.link_bytes_per_s
        computed_s = profile.step_s([(0, tokens)])
        now = self._clock.now
        # Overlapped with computing, the transfer began a prefill ago unless the link was busy.
        begun = max(pod.link_free_s, now - computed_s)
        pod.link_free_s = max(begun + whole_s, now)
        arrives = pod.link_free_s + profile.link_latency_s
        self._clock.at(arrives, self._pushed, running, pod, prefilled)

    def _pushed(self, running: Running, pod: Pod, prefilled: Job) -> None:
        pod.worker.let_go(prefilled)
        assert running.job is not None
        assert running.decode is not None
        running.decode.worker.remote_done(running.job)
        self._retire(pod)

    def _first(self, running: Running) -> None:
        assert running.pick is not None
        self.picker.first_token(running.pick)
        running.on_first(self._clock.now)

    def _done(self, running: Running) -> None:
        assert running.pick is not None
        assert running.decode is not None
        self.picker.finished(running.pick)
        running.on_done(self._clock.now)
        self._clock.after(0.0, self._retire, running.decode)


def remote_is_cheaper(profile: Profile, uncached: int, num_running: int) -> bool:
    """What a live decode worker decides once it has measured both ways (`RemoteCosts`).

    A local prefill delays every sequence that decodes there, a remote one costs its round trip.
    """
    compute_s = profile.step_s([(0, uncached)])
    return compute_s * (1 + num_running) > compute_s + profile.link_latency_s


def _chain(arrival: Arrival, per_block: float, most: int) -> list[int]:
    """What the picker's block hashes would say: equal for equal prefixes."""
    if not arrival.prefix:
        return []
    chain = []
    previous = 0
    for index in range(min(most, int(arrival.prompt_tokens / per_block))):
        start = int(index * per_block)
        block = start // arrival.block_tokens
        if block >= len(arrival.prefix):
            break
        previous = hash((previous, arrival.prefix[block], start % arrival.block_tokens))
        chain.append(previous)
    return chain
