"""The prefill side: compute a prompt, push each layer's blocks as they come, sample one token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from tandem_worker.disaggregation.protocol import PrefillOrder
from tandem_worker.engine.constraints import CreateConstraint, GrammarError
from tandem_worker.engine.requests import Constraint, EngineRequest, ErrorEvent, Event, TokenEvent
from tandem_worker.engine.thread import EngineThread
from tandem_worker.errors import RequestError
from tandem_worker.metrics import WorkerMetrics
from tandem_worker.scheduling.sequence import Sequence
from tandem_worker.transfer.errors import TransferError
from tandem_worker.transfer.interface import FinalState, KVSender, Push


class PrefillService:
    """Serves POST /internal/prefill and /internal/abort."""

    def __init__(
        self,
        engine: EngineThread,
        sender: KVSender,
        metrics: WorkerMetrics,
        *,
        create_constraint: CreateConstraint,
        vocab_size: int,
        max_model_len: int,
    ) -> None:
        self._engine = engine
        self._sender = sender
        self._metrics = metrics
        self._create_constraint = create_constraint
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._running: dict[str, tuple[int, asyncio.Task[Any]]] = {}
        self._endings: set[asyncio.Task[None]] = set()

    async def prefill(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Compute, push, and return once the push is acknowledged; cancelling aborts both.

        Raises:
            RequestError: the order is malformed, or the push failed (status 502).
        """
        order = PrefillOrder.parse(
            data, vocab_size=self._vocab_size, max_model_len=self._max_model_len
        )
        request_id = order.job.request_id
        task = asyncio.current_task()
        assert task is not None
        self._running[request_id] = (order.epoch, task)
        started = time.perf_counter()
        try:
            constraint = None
            if order.job.sampling.grammar:
                constraint = await asyncio.to_thread(self._create_constraint, order.job.sampling)
            return await self._run(order, constraint, started)
        except GrammarError as error:
            raise RequestError(f"the grammar cannot be used: {error}", param="sampling") from error
        except TransferError as error:
            raise RequestError(
                f"the KV push failed: {error}", status=502, type="server_error", code="kv_push"
            ) from error
        finally:
            if self._running.get(request_id, (None, None))[1] is task:
                del self._running[request_id]

    def abort(self, request_id: str, epoch: int) -> bool:
        """Stop a prefill of this epoch or an older one; says whether there was one."""
        running_epoch, task = self._running.get(request_id, (0, None))
        if task is None or running_epoch > epoch:
            return False
        task.cancel()
        return True

    async def _run(
        self, order: PrefillOrder, constraint: Constraint | None, started: float
    ) -> dict[str, Any]:
        push = await self._sender.open(order.kv_address, order.job.request_id, order.epoch)
        events: asyncio.Queue[Event] = asyncio.Queue()
        request_id = f"{order.job.request_id}#{order.epoch}"
        now_s = time.monotonic()
        sequence = Sequence(
            request_id=request_id,
            token_ids=list(order.job.token_ids),
            num_prompt_tokens=order.job.num_prompt_tokens,
            arrival_s=now_s,
            deadline_s=now_s + order.job.deadline_ms / 1e3 if order.job.deadline_ms else None,
            pinned=True,
            salt=order.job.cache_salt,
            tenant=order.job.tenant,
        )
        request = EngineRequest(
            sequence=sequence,
            sampling=order.job.sampling,
            sink=events.put_nowait,
            constraint=constraint,
            push=push,
            remote_block_ids=order.block_ids,
            push_from_tokens=order.num_computed_tokens,
        )
        self._engine.add(request)
        finished = False
        try:
            event = await events.get()
            if isinstance(event, ErrorEvent):
                raise RequestError(event.message, status=502, type="server_error")
            assert isinstance(event, TokenEvent)
            prefill_time_s = time.perf_counter() - started
            logprobs = event.logprobs
            await push.finish(
                FinalState(
                    first_token=event.token_id,
                    num_tokens=len(order.job.token_ids),
                    logprob=logprobs.logprob if logprobs else None,
                    top_logprobs=logprobs.top if logprobs else (),
                )
            )
            finished = True
        finally:
            # A task of its own: a peer that dies breaks the push and, a moment later, the HTTP
            # connection, whose cancellation must not stop the blocks from being given back.
            ending = asyncio.create_task(self._end(push, request_id, finished=finished))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)
            await asyncio.shield(ending)
        self._metrics.pushes.inc()
        return {
            "ok": True,
            "prefill_time_s": prefill_time_s,
            "num_cached_tokens": event.num_cached_tokens,
        }

    async def _end(self, push: Push, request_id: str, *, finished: bool) -> None:
        try:
            if not finished:
                push.abort("the prefill was given up")
                await push.aclose()
        finally:
            # Only now is nobody reading the blocks any more.
            self._engine.abort(request_id)
