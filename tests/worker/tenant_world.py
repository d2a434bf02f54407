"""A worker shared by two tenants in virtual time: the real scheduler, places and step costs.

A step takes what a fitted profile says; arrivals are given; the engine draws a token per decode.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from tandem_worker.errors import RequestError
from tandem_worker.scheduling.kv_blocks import BlockManager
from tandem_worker.scheduling.places import Places
from tandem_worker.scheduling.ranking import Order
from tandem_worker.scheduling.scheduler import Scheduler, SchedulerLimits
from tandem_worker.scheduling.sequence import Sequence
from tandem_worker.scheduling.tenants import StepCosts

CPU = StepCosts(0.002, 30e-6, 0.0, 500e-6, 0.0)
"""As a small model on two cores: 67 tokens of a prompt, or four decodes, cost as much as a step."""
GPU = StepCosts(0.01, 20e-6, 0.0, 30e-6, 0.0)


@dataclass(frozen=True)
class Ask:
    """One request: n sequences, as a body with so many choices makes them.

    stays_s: a client that leaves after this time, answered or not. text: what its prompt says;
    requests of the same text have the same prefix.
    """

    at_s: float
    tenant: str
    num_prompt: int
    num_answer: int
    n: int = 1
    stays_s: float | None = None
    text: int | None = None


@dataclass
class World:
    """One worker."""

    costs: StepCosts = CPU
    order: Order = "fcfs"
    max_num_seqs: int = 64
    max_batched_tokens: int = 1024
    max_waiting: int = 512
    num_blocks: int = 512
    shared: bool = True
    pinned: bool = False
    now_s: float = 0.0
    num_refused: dict[str, int] = field(default_factory=dict)
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            BlockManager(self.num_blocks),
            SchedulerLimits(self.max_num_seqs, self.max_batched_tokens),
            order=self.order,
            step_costs=lambda: self.costs,
        )
        self.places = Places(self.max_num_seqs, self.max_waiting)
        self._held: dict[int, list[contextlib.ExitStack]] = {}

    def run(self, asks: list[Ask]) -> Iterator[tuple[Ask, float]]:
        """Requests with their latencies, as they end; those that are refused do not."""
        coming = [(ask.at_s, number, ask) for number, ask in enumerate(asks)]
        heapq.heapify(coming)
        wanted: dict[str, tuple[int, int]] = {}  # id: request, tokens of its answer
        left: dict[int, int] = {}
        here: dict[int, list[Sequence]] = {}
        scheduler = self.scheduler
        while coming or scheduler.has_work:
            if not scheduler.has_work:
                self.now_s = max(self.now_s, coming[0][0])
            while coming and coming[0][0] <= self.now_s:
                _, number, ask = heapq.heappop(coming)
                stack = contextlib.ExitStack()
                tenant = ask.tenant if self.shared else ""
                try:
                    stack.enter_context(self.places.hold(tenant, ask.n))
                except RequestError:
                    self.num_refused[ask.tenant] = self.num_refused.get(ask.tenant, 0) + 1
                    continue
                self._held[number] = [stack]
                left[number] = ask.n
                for index in range(ask.n):
                    name = f"{number}-{index}"
                    wanted[name] = (number, ask.num_answer)
                    sequence = Sequence(
                        name,
                        [number % 100 if ask.text is None else ask.text, index]
                        + list(range(ask.num_prompt - 2)),
                        ask.num_prompt,
                        arrival_s=ask.at_s,
                        tenant=tenant,
                        pinned=self.pinned,
                        predicted_output_tokens=ask.num_answer,
                    )
                    scheduler.add(sequence, self.now_s)
                    if ask.stays_s is not None:
                        here.setdefault(number, []).append(sequence)
            for number in [n for n, own in here.items() if self._has_left(asks[n])]:
                for sequence in here.pop(number):
                    scheduler.finish(sequence)
                self._held.pop(number)[0].close()
            step = scheduler.schedule(self.now_s)
            if not step.chunks:
                if not coming:
                    assert not scheduler.has_work, "nothing can be computed any more"
                    break
                self.now_s = max(self.now_s + self.costs.base_s, coming[0][0])
                continue
            self.num_steps += 1
            scheduler.advance(step)
            self.now_s += self.costs.base_s + sum(
                self.costs.chunk_s(c.start, c.num_tokens, c.num_tokens == 1 and c.samples)
                for c in step.chunks
            )
            for chunk in step.chunks:
                sequence = chunk.sequence
                if sequence.num_uncomputed_tokens:
                    continue
                sequence.token_ids.append(7)
                number, num_answer = wanted[sequence.request_id]
                if len(sequence.token_ids) - sequence.num_prompt_tokens >= num_answer:
                    scheduler.finish(sequence)
                    left[number] -= 1
                    if not left[number]:
                        here.pop(number, None)
                        self._held.pop(number)[0].close()
                        yield asks[number], self.now_s - asks[number].at_s

    def _has_left(self, ask: Ask) -> bool:
        return ask.stays_s is not None and self.now_s - ask.at_s >= ask.stays_s


def p99(values: list[float]) -> float:
    """The 99th percentile."""
    return sorted(values)[int(0.99 * (len(values) - 1))]


def latencies(world: World, asks: list[Ask], tenant: str) -> list[float]:
    """Of one tenant, all of whose requests must be answered."""
    found: list[float] = []
    number = sum(ask.tenant == tenant for ask in asks)
    for ask, latency in world.run(asks):
        if ask.tenant == tenant:
            found.append(latency)
        if len(found) == number:
            return found
    raise AssertionError(f"{len(found)} of {number} are answered; refused: {world.num_refused}")
