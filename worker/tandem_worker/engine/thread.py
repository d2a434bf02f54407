"""Runs the engine in a thread of its own, so that HTTP and detokenisation never stall a step.

Commands go in through a mailbox and run between two steps; events come out in one batch per step
and are delivered in the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tandem_worker.engine.core import Delivery, EngineCore
from tandem_worker.engine.drawn import TokenLogprobs
from tandem_worker.engine.requests import EngineRequest, FinishReason
from tandem_worker.errors import InvariantError

CHECK_EVERY_S = 10.0
EXPECTED_EVERY_S = 0.2
HANG_S = 60.0
"""A step without progress for this long hangs: a layer takes far less on any device."""
_MAX_FAILED_STEPS = 3
"""A device that has failed (a CUDA error is sticky) fails every step: the worker must be restarted,
while one step may fail for what a single request asked."""

logger = logging.getLogger(__name__)

Command = Callable[[], Sequence[Delivery] | None]


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A snapshot of the engine between two steps."""

    num_running: int = 0
    num_waiting: int = 0
    num_awaiting_kv: int = 0
    pending_prefill_tokens: int = 0
    expected_tokens: int = 0
    blocks_total: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0
    blocks_used: int = 0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0

    @property
    def is_idle(self) -> bool:
        """Nothing is computed, waiting or arriving."""
        return not (self.num_running or self.num_waiting or self.num_awaiting_kv)


class EngineThread:
    """Owns an :class:`EngineCore`; every method may be called from the event loop's thread."""

    def __init__(self, core: EngineCore, loop: asyncio.AbstractEventLoop) -> None:
        self.core = core
        self._loop = loop
        self._mailbox: deque[Command] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._next_check_s = 0.0
        self._is_stepping = False
        self.broken: str | None = None
        """Why this engine can never serve again, or None."""
        self._next_expected_s = 0.0
        self._expected_tokens = 0
        self.load = self._snapshot()

    def start(self) -> None:
        """Start stepping."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the current step and wait for the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs; a dead one makes the worker unhealthy."""
        return self._thread.is_alive()

    @property
    def is_hanging(self) -> bool:
        """Whether the step that runs has made no progress for too long."""
        return self._is_stepping and time.monotonic() - self.core.progress_s > HANG_S

    # -- commands --------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Take a request."""
        self._post(lambda: self.core.add(request))

    def abort(
        self,
        request_id: str,
        on_exposed: Callable[[tuple[int, ...]], None] | None = None,
        *,
        reason: FinishReason = "abort",
    ) -> None:
        """Stop a request.

        ``on_exposed`` receives, in the loop's thread, reserved blocks that a transfer may still
        write to; without it they are released at once.
        """

        def command() -> None:
            self._hand_over(self.core.abort(request_id, reason), on_exposed)

        self._post(command)

    def remote_done(self, request_id: str, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Reserved blocks are filled and the first token is drawn."""
        self._post(lambda: self.core.remote_done(request_id, token_id, logprobs))

    def remote_failed(self, request_id: str, on_exposed: Callable[[tuple[int, ...]], None]) -> None:
        """Prefill here instead; ``on_exposed`` as in :meth:`abort`."""

        def command() -> None:
            self._hand_over(self.core.remote_failed(request_id), on_exposed)

        self._post(command)

    def release_blocks(self, block_ids: Sequence[int]) -> None:
        """End of a quarantine."""
        self._post(lambda: self.core.release_blocks(block_ids))

    def let_go(self, request_id: str) -> None:
        """End of a push."""
        self._post(lambda: self.core.let_go(request_id))

    async def call(self, function: Callable[[EngineCore], Any]) -> Any:
        """Run a function between two steps and return its result."""
        future: asyncio.Future[Any] = self._loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        def command() -> None:
            try:
                result, error = function(self.core), None
            except Exception as caught:  # handed to the caller
                result, error = None, caught
            self._in_loop(settle, result, error)

        self._post(command)
        return await future

    # -- the thread ------------------------------------------------------------------------------

    def _post(self, command: Command) -> None:
        with self._wake:
            self._mailbox.append(command)
            self._wake.notify()

    def _hand_over(
        self,
        exposed: tuple[int, ...],
        on_exposed: Callable[[tuple[int, ...]], None] | None,
    ) -> None:
        if on_exposed is not None:
            self._in_loop(on_exposed, exposed)
        elif exposed:
            self.core.release_blocks(exposed)

    def _run(self) -> None:
        stalled = False
        while True:
            with self._wake:
                while not self._stopping and not self._mailbox:
                    if self.core.has_work and not stalled:
                        break
                    # A stalled step (no blocks free until a transfer ends) is retried soon.
                    self._wake.wait(0.01 if stalled else None)
                    stalled = False
                if self._stopping:
                    return
            deliveries: list[Delivery] = []
            while self._mailbox:
                try:
                    deliveries += self._mailbox.popleft()() or ()
                except Exception:
                    logger.exception("an engine command failed")
            if self.core.has_work:
                steps = self.core.counters.num_steps
                self.core.progress_s = time.monotonic()
                self._is_stepping = True
                try:
                    deliveries += self.core.step()
                except Exception as error:
                    logger.exception("scheduling failed; every request ends with an error")
                    self.core.num_failed_steps += 1
                    deliveries += self.core.fail_all(f"the step failed: {type(error).__name__}")
                self._is_stepping = False
                if self.core.num_failed_steps >= _MAX_FAILED_STEPS:
                    self.broken = f"{self.core.num_failed_steps} steps in a row have failed"
                stalled = self.core.counters.num_steps == steps and not deliveries
            self.load = self._snapshot()
            if self.load.is_idle:
                self._check_blocks()
            if deliveries:
                self._in_loop(_deliver, deliveries)

    def _check_blocks(self) -> None:
        """Recount the KV blocks now and then while nothing waits for it."""
        now_s = time.monotonic()
        if now_s < self._next_check_s:
            return
        self._next_check_s = now_s + CHECK_EVERY_S
        try:
            self.core.scheduler.blocks.check()
        except InvariantError as error:
            logger.exception("the KV blocks are inconsistent; this worker has to be restarted")
            self.broken = f"the KV blocks are inconsistent: {error}"

    def _in_loop(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            logger.debug("an event had no loop to go to")

    def _snapshot(self) -> EngineLoad:
        scheduler = self.core.scheduler
        blocks = scheduler.blocks
        now_s = time.monotonic()
        # A walk over all sequences, for those who poll every second: not with every step.
        if now_s >= self._next_expected_s or not scheduler.running:
            self._next_expected_s = now_s + EXPECTED_EVERY_S
            self._expected_tokens = scheduler.num_expected_tokens
        return EngineLoad(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_awaiting_kv=len(scheduler.awaiting_kv),
            pending_prefill_tokens=scheduler.num_pending_prefill_tokens,
            expected_tokens=self._expected_tokens,
            blocks_total=blocks.num_blocks,
            blocks_free=blocks.num_free,
            blocks_cached=blocks.num_cached,
            blocks_used=blocks.num_used,
            num_prefix_queries=scheduler.num_prefix_queries,
            num_prefix_hits=scheduler.num_prefix_hits,
        )


def _deliver(deliveries: Sequence[Delivery]) -> None:
    for sink, event in deliveries:
        try:
            sink(event)
        except Exception:
            logger.exception("an event's receiver failed")
