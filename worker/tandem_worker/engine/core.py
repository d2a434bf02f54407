"""The engine without its thread: requests in, one step at a time, events out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tandem_worker.engine.drawn import Drawn, Failed, Pooled, Sampled, TokenLogprobs
from tandem_worker.engine.profile import StepProfile
from tandem_worker.engine.requests import (
    BlockPush,
    EngineRequest,
    ErrorEvent,
    Event,
    FinishReason,
    PromptLogprobsEvent,
    ReservedEvent,
    Runner,
    Sink,
    TokenEvent,
    VectorEvent,
    Work,
)
from tandem_worker.scheduling.scheduler import Scheduler
from tandem_worker.scheduling.sequence import Chunk, State, Step

logger = logging.getLogger(__name__)

Delivery = tuple[Sink, Event]


@dataclass
class EngineCounters:
    """Totals since the start; read by metrics from another thread."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    step_time_s: float = 0.0
    finished: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    """Requests that no token could be drawn for, by reason."""


class EngineCore:
    """Requests, scheduler and runner, driven by :meth:`step` from one thread.

    Args:
        runner: Computes.
        scheduler: Decides.
        eos_token_ids: Tokens that end an answer unless ``ignore_eos``.
        profile: Learns what steps cost.
        clock: Seconds; monotonic.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        eos_token_ids: frozenset[int],
        profile: StepProfile | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.profile = StepProfile() if profile is None else profile
        self.counters = EngineCounters()
        self.num_failed_steps = 0
        """Steps that failed since one succeeded."""
        self.progress_s = clock()
        """When a step began or a layer of it was last done."""
        self.eos_token_ids = eos_token_ids
        self._clock = clock
        self._requests: dict[str, EngineRequest] = {}

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` could compute something."""
        return self.scheduler.has_work

    @property
    def num_requests(self) -> int:
        """Requests not yet finished, those awaiting blocks included."""
        return len(self._requests)

    def add(self, request: EngineRequest) -> None:
        """Take a request; its events follow from :meth:`step`."""
        self._requests[request.request_id] = request
        self.scheduler.add(request.sequence, self._clock())

    def abort(self, request_id: str, reason: FinishReason = "abort") -> tuple[int, ...]:
        """Stop a request; unknown ids are ignored.

        Returns:
            Reserved blocks that a transfer may still write to; release them when it cannot.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            self.scheduler.let_go(request_id)
            return ()
        self._count(reason)
        if request.sequence.state is State.AWAITING_KV:
            return tuple(self.scheduler.remote_abandoned(request.sequence))
        self.scheduler.finish(request.sequence)
        return ()

    def remote_done(
        self, request_id: str, token_id: int, logprobs: TokenLogprobs | None
    ) -> list[Delivery]:
        """The reserved blocks are filled and the first token is drawn."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        self.scheduler.remote_done(request.sequence, token_id)
        return [self._emit(request, Sampled(token_id, logprobs))]

    def remote_failed(self, request_id: str) -> tuple[int, ...]:
        """Prefill here instead; returns blocks to release once no write can come."""
        request = self._requests.get(request_id)
        if request is None or request.sequence.state is not State.AWAITING_KV:
            return ()
        return tuple(self.scheduler.remote_failed(request.sequence, self._clock()))

    def release_blocks(self, block_ids: Sequence[int]) -> None:
        """End of a quarantine: no transfer can write to these blocks any more."""
        self.scheduler.blocks.release(block_ids)

    def let_go(self, request_id: str) -> None:
        """End of a push: nothing reads the held blocks any more."""
        self.scheduler.let_go(request_id)

    def fail_all(self, message: str) -> list[Delivery]:
        """Give up every request that no transfer works for (one that does reports by itself)."""
        return self._fail(
            [r for r in self._requests.values() if r.sequence.state is not State.AWAITING_KV],
            message,
        )

    def _fail(self, requests: Iterable[EngineRequest], message: str) -> list[Delivery]:
        deliveries: list[Delivery] = []
        for request in requests:
            del self._requests[request.request_id]
            self.scheduler.finish(request.sequence)
            self._count("error")
            deliveries.append((request.sink, ErrorEvent(message)))
        return deliveries

    def step(self) -> list[Delivery]:
        """Schedule and compute one step."""
        self.progress_s = self._clock()
        step = self.scheduler.schedule(self.progress_s)
        self.counters.num_preemptions += len(step.preempted)
        deliveries = [self._announce(self._requests[s.request_id]) for s in step.reserved]
        for preempted in step.preempted:
            request = self._requests[preempted.request_id]
            request.collected_logprobs.clear()
            if request.pooling is not None:
                request.pooling.restart()
        if not step.chunks:
            return deliveries
        work = [Work(chunk, self._requests[chunk.sequence.request_id]) for chunk in step.chunks]
        started = time.perf_counter()
        try:
            drawn = self.runner.execute(work, step.num_decodes, self._pusher(work))
        except Exception as error:
            logger.exception("a step failed; its requests end with an error")
            self.num_failed_steps += 1
            message = f"the step failed: {type(error).__name__}"
            return deliveries + self._fail((item.request for item in work), message)
        self.num_failed_steps = 0
        elapsed = time.perf_counter() - started
        self._account(step, elapsed)
        self.scheduler.advance(step)
        for item, token in zip(work, drawn, strict=True):
            deliveries += self._collect(item, token)
        return deliveries

    # -- the parts of a step ---------------------------------------------------------------------

    def _announce(self, request: EngineRequest) -> Delivery:
        sequence = request.sequence
        first = sequence.num_computed_tokens // self.scheduler.blocks.block_size
        return request.sink, ReservedEvent(
            tuple(sequence.token_ids),
            tuple(sequence.block_ids[first:]),
            sequence.num_computed_tokens,
        )

    def _pusher(self, work: Sequence[Work]) -> Callable[[int], None]:
        """What to call after each layer: finished blocks leave at once, and progress is seen."""
        pushes: list[tuple[BlockPush, list[int], list[int]]] = []
        for item in work:
            request = item.request
            if request.push is None:
                continue
            local, remote = self._take_pushable(item.chunk, request)
            if local:
                pushes.append((request.push, local, remote))

        def on_layer(layer: int) -> None:
            self.progress_s = self._clock()
            for push, local, remote in pushes:
                push.layer_blocks_nowait(layer, local, remote)

        return on_layer

    def _take_pushable(self, chunk: Chunk, request: EngineRequest) -> tuple[list[int], list[int]]:
        """Blocks that are full after this chunk, and the partial last one with the last chunk."""
        size = self.scheduler.blocks.block_size
        end = chunk.start + chunk.num_tokens
        stop = -(-end // size) if chunk.samples else end // size
        first = request.push_from_tokens // size
        begin = first + request.num_pushed_blocks
        if stop <= begin:
            return [], []
        request.num_pushed_blocks = stop - first
        local = chunk.sequence.block_ids[begin:stop]
        return local, list(request.remote_block_ids[begin - first : stop - first])

    def _account(self, step: Step, elapsed: float) -> None:
        counters = self.counters
        counters.num_steps += 1
        weight = 0.1 if counters.step_time_s else 1.0
        counters.step_time_s += weight * (elapsed - counters.step_time_s)
        for chunk in step.chunks[step.num_decodes :]:
            counters.num_prompt_tokens += chunk.num_tokens
        self.profile.observe(
            elapsed,
            decode_contexts=[c.start + 1 for c in step.chunks[: step.num_decodes]],
            prefills=[(c.start, c.num_tokens) for c in step.chunks[step.num_decodes :]],
        )

    def _collect(self, item: Work, token: Drawn) -> list[Delivery]:
        request = item.request
        if request.request_id not in self._requests:
            return []
        if request.push is not None and request.push.failure is not None:
            del self._requests[request.request_id]
            self.scheduler.finish(request.sequence)
            self._count("error")
            return [(request.sink, ErrorEvent(f"push failed: {request.push.failure}"))]
        if token is None:
            return []
        if isinstance(token, Failed):
            return self._fail_one(request, token)
        if isinstance(token, Pooled):
            self._finish(request, "stop")
            return [(request.sink, VectorEvent(token.vector))]
        deliveries: list[Delivery] = []
        finished_by_prompt = request.sampling.max_tokens == 0 and request.push is None
        if request.prompt_logprobs is not None:
            scores = tuple(request.collected_logprobs)
            reason: FinishReason | None = "length" if finished_by_prompt else None
            deliveries.append((request.sink, PromptLogprobsEvent(scores, reason)))
            request.prompt_logprobs = None
        if finished_by_prompt:
            if not deliveries:
                deliveries.append((request.sink, PromptLogprobsEvent((), "length")))
            self._finish(request, "length")
            return deliveries
        request.sequence.token_ids.append(token.token_id)
        deliveries.append(self._emit(request, token))
        return deliveries

    def _fail_one(self, request: EngineRequest, failed: Failed) -> list[Delivery]:
        del self._requests[request.request_id]
        self.scheduler.finish(request.sequence)
        if failed.code == "logits_not_finite":
            # Its keys and values may be as broken as its logits: nobody is to hit them.
            self.scheduler.blocks.forget_cached()
        self._count("error")
        self.counters.failed[failed.code] = self.counters.failed.get(failed.code, 0) + 1
        return [(request.sink, ErrorEvent(failed.message, failed.code, failed.status))]

    def _emit(self, request: EngineRequest, token: Sampled) -> Delivery:
        """Announce a token that was just appended, and finish the request if it is the last."""
        self.counters.num_generated_tokens += 1
        # A prefill worker's part ends with its first token, whatever that is.
        reason: FinishReason | None = "stop"
        if request.push is None:
            reason = request.sampling.finish_reason(
                token.token_id, request.num_generated, self.eos_token_ids
            )
        if reason is not None:
            self._finish(request, reason)
        cached = request.sequence.num_cached_tokens
        return request.sink, TokenEvent(token.token_id, token.logprobs, reason, cached)

    def _finish(self, request: EngineRequest, reason: FinishReason) -> None:
        del self._requests[request.request_id]
        self.scheduler.finish(request.sequence, hold=request.push is not None)
        self._count(reason)

    def _count(self, reason: FinishReason) -> None:
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1
