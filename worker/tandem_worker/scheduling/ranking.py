"""In which order sequences are computed. Pure.

The orders: first come, first served; shortest first; least slack to the deadline; and feedback
levels, through which a sequence sinks with what it has been served.
"""

from __future__ import annotations

import bisect
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
        self.moves = order in ("mlfq", "edf")
        """Ranks change while waiting: by starvation, and with what the measured steps take."""

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
        bisect.insort_right(waiting, sequence, key=self.key)

    def join(self, sequence: Sequence) -> None:
        """Give a new sequence its level."""
        level, num_tokens = 0, len(sequence.token_ids)
        while level < _NUM_LEVELS - 1 and num_tokens > self._quantum_tokens << level:
            level += 1
        sequence.level = level

    def demote(self, chunks: Iterable[Chunk]) -> None:
        """Count what a step has served; who has used a level up sinks to the next."""
        quantum, running = self._quantum_tokens, State.RUNNING
        for sequence, _, num_tokens in chunks:
            if sequence.state is not running:
                continue
            served = sequence.served_tokens + num_tokens
            if served >= quantum << sequence.level and sequence.level < _NUM_LEVELS - 1:
                sequence.level += 1
                served = 0
            sequence.served_tokens = served

    def lift(self, waiting: Iterable[Sequence], now_s: float) -> None:
        """Back to the highest level with who has waited too long."""
        for sequence in waiting:
            if now_s - sequence.queued_since_s > self._starvation_s:
                sequence.level = 0
                sequence.queued_since_s = now_s
