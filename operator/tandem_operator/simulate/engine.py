"""A worker on virtual time: the production scheduler and block manager, and a model of its steps.

Runs of decode steps in which nothing arrives, finishes or needs a decision are taken at once
(`Scheduler.num_quiet_steps`): their end is computed, not stepped through. A request that arrives
meanwhile cuts the run at the step that is under way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tandem_operator.simulate.clock import VirtualClock
from tandem_operator.simulate.profiles import StepModel
from tandem_worker.scheduling.kv_blocks import BlockManager
from tandem_worker.scheduling.ranking import Order
from tandem_worker.scheduling.scheduler import PrefillChoice, Scheduler, SchedulerLimits
from tandem_worker.scheduling.sequence import Sequence as ScheduledSequence
from tandem_worker.scheduling.sequence import Step


class CountedTokens(list[int]):
    """Stands for a sequence's token ids where only their number and their prefix matter.

    Args:
        num_tokens: Prompt length.
        prefix: Ids of the prompt's blocks; equal ids in front stand for equal tokens.
        block_tokens: Tokens of one such block.
        unique: A number no other sequence has, for what is not in the prefix.
    """

    __slots__ = ("_block_tokens", "_prefix", "_unique")

    def __init__(
        self, num_tokens: int, prefix: tuple[int, ...], block_tokens: int, unique: int
    ) -> None:
        # A real list of zeros: eight bytes a token buy the interpreter's own len() and append().
        super().__init__(bytes(num_tokens))
        self._prefix = prefix
        self._block_tokens = block_tokens
        self._unique = unique

    def __getitem__(self, part: object) -> list[int]:  # type: ignore[override]
        """What stands for a block's tokens when it is hashed: equal for equal content only."""
        start = part.start or 0 if isinstance(part, slice) else 0
        index = start // self._block_tokens
        if index < len(self._prefix):
            return [self._prefix[index], start % self._block_tokens]
        return [-1 - self._unique, start]


@dataclass(eq=False, slots=True)
class Job:
    """One sequence at a worker, and who wants to know what becomes of it."""

    sequence: ScheduledSequence
    num_outputs: int
    on_first: Callable[[Job], None]
    on_done: Callable[[Job], None]
    on_reserved: Callable[[Job], None] | None = None
    hold: bool = False
    num_generated: int = 0
    last_token_s: float = math.nan
    payload: object = None


class GapHistogram:
    """Times between tokens, pooled over requests, in logarithmic bins of 1 %."""

    _PER_E = 100.0

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}

    def add(self, gap_s: float, times: int = 1) -> None:
        """Count a gap so many times."""
        key = round(self._PER_E * math.log(max(gap_s, 1e-9)))
        self.counts[key] = self.counts.get(key, 0) + times

    def percentile(self, percent: float) -> float:
        """Seconds; NaN without gaps."""
        total = sum(self.counts.values())
        seen = 0
        for key in sorted(self.counts):
            seen += self.counts[key]
            if seen >= total * percent / 100.0:
                return math.exp(key / self._PER_E)
        return math.nan


@dataclass(slots=True)
class EngineSettings:
    """What a worker's configuration says that matters to its schedule."""

    max_num_seqs: int = 64
    max_batched_tokens: int = 1024
    order: Order = "fcfs"
    kv_tokens: int = 65536
    block_size: int = 64
    prefix_cache: bool = True
    max_waiting: int = 512


@dataclass(eq=False, slots=True)
class _Run:
    """Quiet steps under way: step i (from 0) takes first + i * increase."""

    started_s: float
    first_s: float
    increase_s: float
    num_steps: int
    event: int

    def ends_s(self, num_steps: int) -> float:
        steps = float(num_steps)
        return self.started_s + steps * self.first_s + self.increase_s * steps * (steps - 1.0) / 2.0

    def steps_begun_by(self, now_s: float) -> int:
        """Steps that have begun at a time, at least one."""
        low, high = 1, self.num_steps
        while low < high:
            middle = (low + high) // 2
            if self.ends_s(middle) <= now_s:
                low = middle + 1
            else:
                high = middle
        return low


class SimulatedWorker:
    """One engine: takes sequences, computes steps, reports tokens.

    Args:
        clock: Virtual time.
        model: How long steps take.
        settings: As in the worker's configuration.
        gaps: Where times between tokens are counted.
    """

    def __init__(
        self,
        clock: VirtualClock,
        model: StepModel,
        settings: EngineSettings,
        gaps: GapHistogram,
        *,
        choose_remote: PrefillChoice | None = None,
    ) -> None:
        self._clock = clock
        self._model = model
        self._gaps = gaps
        self.settings = settings
        self.blocks = BlockManager(
            max(2, settings.kv_tokens // settings.block_size),
            block_size=settings.block_size,
            prefix_cache=settings.prefix_cache,
        )
        self.scheduler = Scheduler(
            self.blocks,
            SchedulerLimits(
                max_num_seqs=settings.max_num_seqs, max_batched_tokens=settings.max_batched_tokens
            ),
            order=settings.order,
            choose_remote=choose_remote,
        )
        self.jobs: dict[str, Job] = {}
        self.busy_s = 0.0
        self.num_steps = 0
        self.num_prefill_tokens = 0
        self._step: Step | None = None
        self._run: _Run | None = None
        self._event = 0
        self._inbox: list[Job] = []

    # -- what a cluster does with it ---------------------------------------------------------------

    @property
    def num_requests(self) -> int:
        """Sequences here, in whatever state."""
        return len(self.jobs)

    @property
    def is_full(self) -> bool:
        """Whether the waiting queue is at its limit: a live worker answers 429."""
        return len(self.scheduler.waiting) >= self.settings.max_waiting

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens can ever be held."""
        return num_tokens <= self.blocks.num_blocks * self.blocks.block_size

    def submit(self, job: Job) -> None:
        """A sequence arrives."""
        self.jobs[job.sequence.request_id] = job
        self.scheduler.add(job.sequence, self._clock.now)
        self._wake()

    def remote_done(self, job: Job) -> None:
        """The prefill worker has filled the blocks and sampled the first token."""
        # As in the live engine, what others say is read between two steps.
        self._inbox.append(job)
        self._wake()

    def let_go(self, job: Job) -> None:
        """A push has read the blocks of a held sequence."""
        self.scheduler.let_go(job.sequence.request_id)
        self._wake()

    # -- steps -----------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._run is not None:
            self._cut_run()
        elif self._step is None:
            self._begin()

    def _begin(self) -> None:
        """Start what comes next, if there is anything to compute."""
        scheduler, now = self.scheduler, self._clock.now
        while self._inbox:
            job = self._inbox.pop()
            scheduler.remote_done(job.sequence, 0)
            self._sampled(job, 1)
        while scheduler.has_work:
            if self._begin_run():
                return
            step = scheduler.schedule(now)
            for sequence in step.reserved:
                job = self.jobs[sequence.request_id]
                if job.on_reserved is not None:
                    job.on_reserved(job)
            if step.chunks:
                self._step = step
                took = self._step_s(step)
                self.busy_s += took
                self.num_steps += 1
                self._clock.at(now + took, self._end_step, step)
                return
            if not step.preempted and not step.reserved:
                return

    def _step_s(self, step: Step) -> float:
        contexts = []
        prompts = []
        for sequence, start, num_tokens in step.chunks:
            if num_tokens == 1 and start >= sequence.num_prompt_tokens:
                contexts.append(start + 1)
            else:
                prompts.append((start, num_tokens))
                self.num_prefill_tokens += num_tokens
        return self._model.step_s(prompts, contexts)

    def _end_step(self, step: Step) -> None:
        self.scheduler.advance(step)
        self._step = None
        now, jobs = self._clock.now, self.jobs
        # Nearly all tokens of a step have waited for the same other one: they are counted together.
        gap_s, times = -1.0, 0
        for sequence, start, num_tokens in step.chunks:
            if start + num_tokens != len(sequence.token_ids):
                continue
            sequence.token_ids.append(0)
            job = jobs[sequence.request_id]
            if 0 < job.num_generated < job.num_outputs - 1:
                job.num_generated += 1
                if now - job.last_token_s == gap_s:
                    times += 1
                else:
                    if times:
                        self._gaps.add(gap_s, times)
                    gap_s, times = now - job.last_token_s, 1
                job.last_token_s = now
            else:
                self._sampled(job, 1)
        if times:
            self._gaps.add(gap_s, times)
        if self._step is None and self._run is None:
            self._begin()

    def _sampled(self, job: Job, num_tokens: int) -> None:
        """Tokens of a job were sampled now; the last may be its last."""
        now = self._clock.now
        if job.num_generated == 0:
            job.num_generated = num_tokens
            job.last_token_s = now
            job.on_first(job)
        else:
            if num_tokens == 1:
                self._gaps.add(now - job.last_token_s)
            job.num_generated += num_tokens
            job.last_token_s = now
        if job.num_generated >= job.num_outputs:
            self.scheduler.finish(job.sequence, hold=job.hold)
            del self.jobs[job.sequence.request_id]
            job.on_done(job)

    # -- runs of quiet steps ----------------------------------------------------------------------

    def _begin_run(self) -> bool:
        """Take as many steps at once as nothing but decoding happens in."""
        running = self.scheduler.running
        if not running:
            return False
        jobs = self.jobs
        until_finish, context = 1 << 60, 0
        for sequence in running:
            job = jobs[sequence.request_id]
            left = job.num_outputs - job.num_generated
            if left < 2 or job.num_generated == 0:
                return False  # a prompt's last token may be computed alone: it samples the first
            if left < until_finish:
                until_finish = left
            context += len(sequence.token_ids)
        line = self._model.decode_line(len(running), context)
        if line is None:
            return False
        num_steps = self.scheduler.num_quiet_steps(until_finish)
        if num_steps < 2:
            return False
        self._event += 1
        self._run = run = _Run(self._clock.now, line[0], line[1], num_steps, self._event)
        self._clock.at(run.ends_s(num_steps), self._end_run, self._event)
        return True

    def _cut_run(self) -> None:
        """Somebody came: the run ends with the step that is under way."""
        run = self._run
        assert run is not None
        begun = run.steps_begun_by(self._clock.now)
        if begun < run.num_steps:
            run.num_steps = begun
            self._event += 1
            run.event = self._event
            self._clock.at(run.ends_s(begun), self._end_run, self._event)

    def _end_run(self, event: int) -> None:
        run = self._run
        if run is None or run.event != event:
            return  # it was cut, and another event ends it
        self._run = None
        self._take(run, run.num_steps)
        if self._step is None and self._run is None:
            self._begin()

    def _take(self, run: _Run, num_steps: int) -> None:
        """Book steps of a run: tokens, times between them, and who has finished."""
        last = run.first_s + run.increase_s * (num_steps - 1)
        took = num_steps * (run.first_s + last) / 2.0
        self.busy_s += took
        self.num_steps += num_steps
        running = self.scheduler.running
        sampled = bytes(num_steps)
        ends = run.ends_s(num_steps)
        finished = []
        for sequence in running:
            sequence.token_ids.extend(sampled)
            job = self.jobs[sequence.request_id]
            job.num_generated += num_steps
            job.last_token_s = ends
            if job.num_generated >= job.num_outputs:
                finished.append(job)
        self._count_gaps(run, num_steps, len(running))
        self.scheduler.advance_quiet(num_steps)
        for job in finished:
            self.scheduler.finish(job.sequence, hold=job.hold)
            del self.jobs[job.sequence.request_id]
            job.on_done(job)

    def _count_gaps(self, run: _Run, num_steps: int, batch: int) -> None:
        """The gaps of a run change slowly: a few pieces of it stand for all its steps."""
        pieces = min(num_steps, 1 + int(40.0 * run.increase_s * num_steps / run.first_s))
        done = 0
        for piece in range(pieces):
            count = (num_steps * (piece + 1)) // pieces - done
            middle = run.first_s + run.increase_s * (done + (count - 1) / 2.0)
            self._gaps.add(middle, count * batch)
            done += count
