"""In which order sequences are computed. Pure.

The orders: first come, first served; shortest first; least slack to the deadline; and feedback
levels, through which a sequence sinks with what it has been served.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable
from typing import Literal

from tandem_worker.scheduling.sequence import Chunk, Sequence, State

Order = Literal["fcfs", "mlfq", "sjf", "edf"]

ServiceTime = Callable[[Sequence], float]
"""sequence -> seconds that its tokens, predicted ones included, still take."""

_NUM_LEVELS = 8
_NOMINAL_TOKEN_S = 1e-3


def nominal_time(sequence: Sequence) -> float:
    """A millisecond per token: the service time where no step has been measured."""
    return _NOMINAL_TOKEN_S * (sequence.num_uncomputed_tokens + sequence.remaining_output_tokens)


class Ranking:
    """Who goes before whom.

    Args:
        order: fcfs; sjf (shortest prompt + predicted answer); edf (least slack to the deadline);
            mlfq (skip-join multi-level feedback queue, FastServe, Wu et al. 2023: a long prompt
            joins at the level that its first step would use up).
        quantum_tokens: Service that the highest MLFQ level gives before demotion; doubles with
            each level.
        starvation_s: A sequence waiting this long goes back to the highest MLFQ level.
        service_time: For edf.
    """

    def __init__(
        self, order: Order, quantum_tokens: int, starvation_s: float, service_time: ServiceTime
    ) -> None:
        self._order = order
        self._quantum_tokens = quantum_tokens
        self._starvation_s = starvation_s
        self._service_time = service_time
        self.has_levels = order == "mlfq"
        self.moves = order == "edf"
        """Ranks change while waiting, with what the measured steps take."""
        self._starves_at_s = math.inf
        """Nobody waits too long before."""

    def key(self, sequence: Sequence) -> tuple[float, ...]:
        """Sort key; the smallest goes first."""
        arrival = sequence.arrival_s
        if self._order == "sjf":
            length = sequence.num_uncomputed_tokens + sequence.remaining_output_tokens
            return (sequence.priority, length, arrival)
        if self._order == "edf":
            if sequence.deadline_s is None:
                return (sequence.priority, float("inf"), arrival)
            slack = sequence.deadline_s - self._service_time(sequence)
            return (sequence.priority, slack, arrival)
        if self._order == "mlfq":
            return (sequence.priority, sequence.level, arrival)
        return (sequence.priority, arrival)

    def insert(self, waiting: list[Sequence], sequence: Sequence) -> None:
        """Into a sorted list, at its place."""
        self._starves_at_s = min(self._starves_at_s, sequence.queued_since_s + self._starvation_s)
        bisect.insort_right(waiting, sequence, key=self.key)

    def join(self, sequence: Sequence) -> None:
        """Give a new sequence its level."""
        level, num_tokens = 0, len(sequence.token_ids)
        while level < _NUM_LEVELS - 1 and num_tokens > self._quantum_tokens << level:
            level += 1
        sequence.level = level

    def demote(self, chunks: Iterable[Chunk]) -> bool:
        """Count what a step has served; who has used a level up sinks to the next.

        Returns:
            Whether any has.
        """
        quantum, running, sank = self._quantum_tokens, State.RUNNING, False
        for sequence, _, num_tokens in chunks:
            if sequence.state is not running:
                continue
            served = sequence.served_tokens + num_tokens
            if served >= quantum << sequence.level and sequence.level < _NUM_LEVELS - 1:
                sequence.level += 1
                served, sank = 0, True
            sequence.served_tokens = served
        return sank

    def lift(self, waiting: list[Sequence], now_s: float) -> None:
        """Back to the highest level with who has waited too long, and to its place in the list."""
        if now_s <= self._starves_at_s:
            return
        for sequence in waiting:
            if now_s - sequence.queued_since_s > self._starvation_s:
                sequence.level = 0
                sequence.queued_since_s = now_s
        waiting.sort(key=self.key)
        since_s = min((sequence.queued_since_s for sequence in waiting), default=math.inf)
        self._starves_at_s = since_s + self._starvation_s

    def num_first(self, running: list[Sequence], waiting: list[Sequence], most: int) -> int:
        """How many of two sorted lists' first ``most`` are of the running ones, which win ties."""
        high = min(most, len(running))
        low = min(high, max(0, most - len(waiting)))
        while low < high:
            middle = (low + high) // 2
            # One more of the running ones goes before the last of the waiting ones?
            if self.key(waiting[most - middle - 1]) < self.key(running[middle]):
                high = middle
            else:
                low = middle + 1
        return low
