"""The scheduler's short cuts keep to plain rules: the queue's order, decodes, quiet steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tandem_worker.scheduling.kv_blocks import BlockManager
from tandem_worker.scheduling.ranking import Order, Ranking, nominal_time
from tandem_worker.scheduling.scheduler import Scheduler, SchedulerLimits
from tandem_worker.scheduling.sequence import Sequence, Step

BLOCK = 4
ORDERS: tuple[Order, ...] = ("fcfs", "mlfq", "sjf", "edf")


@dataclass
class Life:
    """A scheduler amid arrivals, steps, failures and ends; steps grow slower and faster."""

    order: Order
    num_blocks: int
    prefix_cache: bool = True
    token_s: float = 0.001
    now_s: float = 0.0
    num_added: int = 0
    scheduler: Scheduler = field(init=False)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            BlockManager(self.num_blocks, block_size=BLOCK, prefix_cache=self.prefix_cache),
            SchedulerLimits(3, 10, mlfq_quantum_tokens=4, mlfq_starvation_s=0.5),
            order=self.order,
            service_time=self.service_time_s,
        )

    def service_time_s(self, sequence: Sequence) -> float:
        """What the engine's profile says, which every step may change."""
        return self.token_s * (sequence.num_uncomputed_tokens + sequence.predicted_output_tokens)

    def add(self, seed: int) -> None:
        length = 1 + seed % 11
        self.num_added += 1
        self.scheduler.add(
            Sequence(
                str(self.num_added),
                [seed % 3] * length,
                length,
                # Resumed and remotely prefilled requests do not come in order of arrival.
                arrival_s=self.now_s + seed % 7 * 0.001,
                deadline_s=None if seed % 5 == 0 else self.now_s + seed % 4 * 0.02,
                priority=seed % 13 == 0,
                predicted_output_tokens=seed % 30,
                remote_prefill=seed % 4 == 0,
            ),
            self.now_s,
        )

    def begin(self) -> Step:
        self.now_s += 0.1
        return self.scheduler.schedule(self.now_s)

    def end(self, step: Step) -> None:
        self.scheduler.advance(step)
        for chunk in step.chunks:
            if not chunk.sequence.num_uncomputed_tokens:
                chunk.sequence.token_ids.append(1)

    def step(self) -> Step:
        step = self.begin()
        self.end(step)
        return step

    def act(self, seed: int) -> None:
        """Something other than a step."""
        kind, seed = seed % 5, seed // 5
        running, remote = self.scheduler.running, list(self.scheduler.awaiting_kv.values())
        if kind == 0 and running:
            self.scheduler.finish(running[seed % len(running)])
        elif kind == 1 and remote:
            exposed = self.scheduler.remote_failed(remote[seed % len(remote)], self.now_s)
            self.scheduler.blocks.release(exposed)
        elif kind == 2 and remote:
            self.scheduler.remote_done(remote[seed % len(remote)], 1)
        else:
            self.token_s = (0.0001, 0.001, 0.05)[seed % 3]
            self.add(seed)

    def rank(self, sequence: Sequence) -> tuple[float, ...]:
        """The order as the documentation says it."""
        predicted = sequence.num_uncomputed_tokens + sequence.remaining_output_tokens
        by: dict[Order, tuple[float, ...]] = {
            "fcfs": (),
            "sjf": (predicted,),
            "mlfq": (sequence.level,),
            "edf": (
                float("inf")
                if sequence.deadline_s is None
                else sequence.deadline_s - self.service_time_s(sequence),
            ),
        }
        return (sequence.priority, *by[self.order], sequence.arrival_s)


def lives(
    order: Order, seeds: list[int], num_blocks: int, prefix_cache: bool = True
) -> Iterator[Life]:
    """A life just before each of its steps."""
    life = Life(order, num_blocks, prefix_cache)
    for seed in seeds:
        if seed % 3:
            life.act(seed // 3)
        else:
            yield life
            life.scheduler.blocks.check()


seeds = st.lists(st.integers(0, 100_000), min_size=10, max_size=60)
num_blocks = st.integers(5, 16)


@pytest.mark.parametrize("order", ORDERS)
@given(seeds=seeds, num_blocks=num_blocks)
@settings(max_examples=40, deadline=None)
def test_nobody_who_waits_ranks_before_one_that_is_admitted(
    order: Order, seeds: list[int], num_blocks: int
) -> None:
    for life in lives(order, seeds, num_blocks):
        waiting = list(life.scheduler.waiting)
        ranks = {s.request_id: life.rank(s) for s in waiting}

        step = life.begin()

        if order == "mlfq":  # who starved has risen in this very step
            ranks = {s.request_id: life.rank(s) for s in waiting}
        if not step.preempted:
            still = {s.request_id for s in life.scheduler.waiting}
            admitted = [rank for name, rank in ranks.items() if name not in still]
            left = [rank for name, rank in ranks.items() if name in still]
            assert not admitted or not left or max(admitted) <= min(left)
        life.end(step)


@pytest.mark.parametrize("order", ORDERS)
@given(seeds=seeds, num_blocks=num_blocks)
@settings(max_examples=40, deadline=None)
def test_decodes_stand_first_and_are_counted_whoever_is_preempted(
    order: Order, seeds: list[int], num_blocks: int
) -> None:
    for life in lives(order, seeds, num_blocks):
        decoding = {s.request_id for s in life.scheduler.running if s.num_uncomputed_tokens == 1}

        step = life.step()

        decodes = [c.sequence.request_id in decoding for c in step.chunks]
        assert decodes == sorted(decodes, reverse=True)
        assert step.num_decodes == sum(decodes)


def standing(scheduler: Scheduler) -> object:
    blocks = scheduler.blocks
    return (
        [
            (s.request_id, s.num_computed_tokens, s.served_tokens, len(s.block_ids), s.token_ids)
            for s in scheduler.running
        ],
        [s.request_id for s in scheduler.waiting],
        (blocks.num_used, blocks.num_available),
    )


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@given(seeds=seeds, num_blocks=num_blocks, most=st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_quiet_steps_at_once_are_those_one_by_one(
    order: Order, prefix_cache: bool, seeds: list[int], num_blocks: int, most: int
) -> None:
    for life in lives(order, seeds, num_blocks, prefix_cache):
        num_steps = life.scheduler.num_quiet_steps(most)
        assert 0 <= num_steps <= most
        if num_steps:
            single, at_once = copy.deepcopy(life), copy.deepcopy(life).scheduler
            for _ in range(num_steps):
                everyone = [s.request_id for s in single.scheduler.running]
                step = single.step()
                assert [c.sequence.request_id for c in step.chunks] == everyone
                assert step.num_decodes == len(everyone)
                assert not step.preempted
                assert not step.reserved
            for sequence in at_once.running:
                sequence.token_ids += [1] * num_steps
            at_once.advance_quiet(num_steps)

            assert standing(at_once) == standing(single.scheduler)
            at_once.blocks.check()
            if num_steps < most:  # as many as there could be
                assert single.step().preempted
        life.step()


@given(
    ranks=st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.integers(0, 3)), max_size=30),
    most=st.integers(0, 12),
)
def test_whoever_takes_part_under_levels_is_the_first_of_all_and_running_ones_win_ties(
    ranks: list[tuple[bool, int, int]], most: int
) -> None:
    ranking = Ranking("mlfq", 4, 0.5, nominal_time)
    everyone = [
        (runs, Sequence(str(number), [1], 1, level=level, arrival_s=float(arrival)))
        for number, (runs, level, arrival) in enumerate(ranks)
    ]
    running, waiting = (
        sorted((s for runs, s in everyone if runs is which), key=ranking.key)
        for which in (True, False)
    )

    best = sorted(running + waiting, key=ranking.key)[:most]

    assert ranking.num_first(running, waiting, most) == sum(s in running for s in best)


@given(seeds=seeds, num_blocks=num_blocks)
@settings(max_examples=40, deadline=None)
def test_under_levels_only_the_first_of_all_take_part_in_a_step(
    seeds: list[int], num_blocks: int
) -> None:
    for life in lives("mlfq", seeds, num_blocks):
        scheduler = life.scheduler
        step = life.begin()

        computed = {c.sequence.request_id for c in step.chunks}
        sat_out = [s for s in scheduler.running if s.request_id not in computed]
        others = [s for s in scheduler.running if s.request_id in computed]
        if not step.preempted and sum(c.num_tokens for c in step.chunks) < 10:  # of its budget
            assert len(computed) <= 3
            if len(scheduler.awaiting_kv) < 3:  # whose prompts are computed elsewhere hold slots
                assert not sat_out or max(map(life.rank, others)) <= min(map(life.rank, sat_out))
        assert scheduler.waiting == sorted(scheduler.waiting, key=life.rank)
        life.end(step)
