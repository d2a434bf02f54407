"""The prefill side: compute a prompt, push each layer's blocks as they come, sample one token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tandem_worker.config import BLOCK_SIZE
from tandem_worker.disaggregation.decode_side import PROTOCOL_VERSION
from tandem_worker.engine.requests import EngineRequest, ErrorEvent, Event, TokenEvent
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.engine.thread import EngineThread
from tandem_worker.errors import RequestError
from tandem_worker.metrics import WorkerMetrics
from tandem_worker.openai.request import MAX_LOGPROBS, Fields, parse_biases, parse_sampling
from tandem_worker.scheduling.scheduler import Sequence
from tandem_worker.transfer.errors import TransferError
from tandem_worker.transfer.interface import FinalState, KVSender, Push


@dataclass(frozen=True, slots=True)
class _Order:
    peer_request_id: str
    epoch: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_computed_tokens: int
    sampling: SamplingParams
    deadline_ms: int | None
    cache_salt: bytes
    address: str
    block_ids: tuple[int, ...]


class PrefillService:
    """Serves POST /internal/prefill and /internal/abort."""

    def __init__(
        self,
        engine: EngineThread,
        sender: KVSender,
        metrics: WorkerMetrics,
        *,
        vocab_size: int,
        max_model_len: int,
    ) -> None:
        self._engine = engine
        self._sender = sender
        self._metrics = metrics
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._running: dict[str, tuple[int, asyncio.Task[Any]]] = {}
        self._endings: set[asyncio.Task[None]] = set()

    async def prefill(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Compute, push, and return once the push is acknowledged; cancelling aborts both.

        Raises:
            RequestError: the order is malformed, or the push failed (status 502).
        """
        order = self._parse(data)
        task = asyncio.current_task()
        assert task is not None
        self._running[order.peer_request_id] = (order.epoch, task)
        started = time.perf_counter()
        try:
            return await self._run(order, started)
        except TransferError as error:
            raise RequestError(
                f"the KV push failed: {error}", status=502, type="server_error", code="kv_push"
            ) from error
        finally:
            if self._running.get(order.peer_request_id, (None, None))[1] is task:
                del self._running[order.peer_request_id]

    def abort(self, request_id: str, epoch: int) -> bool:
        """Stop a prefill of this epoch or an older one; says whether there was one."""
        running_epoch, task = self._running.get(request_id, (0, None))
        if task is None or running_epoch > epoch:
            return False
        task.cancel()
        return True

    async def _run(self, order: _Order, started: float) -> dict[str, Any]:
        push = await self._sender.open(order.address, order.peer_request_id, order.epoch)
        events: asyncio.Queue[Event] = asyncio.Queue()
        request_id = f"{order.peer_request_id}#{order.epoch}"
        now_s = time.monotonic()
        sequence = Sequence(
            request_id=request_id,
            token_ids=list(order.token_ids),
            num_prompt_tokens=order.num_prompt_tokens,
            arrival_s=now_s,
            deadline_s=now_s + order.deadline_ms / 1e3 if order.deadline_ms else None,
            pinned=True,
            salt=order.cache_salt,
        )
        request = EngineRequest(
            sequence=sequence,
            sampling=order.sampling,
            sink=events.put_nowait,
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
                    num_tokens=len(order.token_ids),
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

    def _sampling(self, fields: Fields) -> SamplingParams:
        """What the order says about drawing; unknown keys are a newer peer's and are ignored."""
        biases = parse_biases(fields.raw("logit_bias") or [])
        highest = max((token for token, _ in biases), default=0)
        if highest >= self._vocab_size:
            raise RequestError(
                f"logit_bias names token {highest}; the vocabulary ends at {self._vocab_size - 1}",
                param="sampling",
            )
        return parse_sampling(
            fields,
            num_logprobs=fields.integer("num_logprobs", 0, MAX_LOGPROBS),
            logit_bias=biases,
        )

    def _parse(self, data: Mapping[str, Any]) -> _Order:
        fields = Fields(data)
        version = fields.integer("version", 0, 2**31 - 1)
        if version != PROTOCOL_VERSION:
            raise RequestError(
                f"version={version} is not spoken here; this worker speaks {PROTOCOL_VERSION}",
                param="version",
                code="version_mismatch",
            )
        request_id = fields.raw("request_id")
        if not isinstance(request_id, str) or not 0 < len(request_id) <= 256:
            raise RequestError("request_id must be a string of 1 to 256 characters")
        token_ids = fields.token_ids("token_ids", self._max_model_len)
        if not token_ids:
            raise RequestError("token_ids must hold at least one token", param="token_ids")
        highest = max(token_ids)
        if highest >= self._vocab_size:
            raise RequestError(
                f"token_ids holds {highest}; the vocabulary ends at {self._vocab_size - 1}",
                param="token_ids",
            )
        computed = fields.integer("num_computed_tokens", 0, len(token_ids) - 1) or 0
        if computed % BLOCK_SIZE:
            raise RequestError(
                f"num_computed_tokens={computed} must be a multiple of {BLOCK_SIZE}",
                param="num_computed_tokens",
            )
        kv = fields.raw("kv")
        if not isinstance(kv, dict) or not isinstance(kv.get("address"), str):
            raise RequestError("kv must be an object with an address", param="kv")
        block_ids = Fields(kv).token_ids("block_ids", 2**24)
        wanted = -(-len(token_ids) // BLOCK_SIZE) - computed // BLOCK_SIZE
        if len(block_ids) != wanted:
            raise RequestError(
                f"kv.block_ids holds {len(block_ids)} blocks; {len(token_ids)} tokens of which "
                f"{computed} are computed need {wanted}",
                param="kv.block_ids",
            )
        sampling = fields.raw("sampling")
        if not isinstance(sampling, dict):
            raise RequestError("sampling must be an object", param="sampling")
        params = self._sampling(Fields(sampling))
        seed = fields.integer("seed", -(1 << 63), (1 << 64) - 1)
        if seed is not None:
            params = replace(params, seed=seed & ((1 << 64) - 1))
        position = fields.integer("position", 0, 2**31 - 1)
        if position is not None and position != len(token_ids):
            raise RequestError(
                f"position={position} must equal the number of tokens, {len(token_ids)}",
                param="position",
            )
        num_prompt = Fields(sampling).integer("num_prompt_tokens", 1, len(token_ids))
        return _Order(
            peer_request_id=request_id,
            epoch=fields.integer("epoch", 0, (1 << 64) - 1) or 0,
            token_ids=token_ids,
            num_prompt_tokens=num_prompt or len(token_ids),
            num_computed_tokens=computed,
            sampling=params,
            deadline_ms=fields.integer("deadline_ms", 0, 2**31 - 1),
            cache_salt=_salt(fields.raw("cache_salt")),
            address=kv["address"],
            block_ids=block_ids,
        )


def _salt(value: Any) -> bytes:
    try:
        salt = bytes.fromhex(value or "")
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"cache_salt={value!r} must be hex digits", param="cache_salt"
        ) from error
    if len(salt) > 64:
        raise RequestError(f"cache_salt has {len(salt)} bytes; at most 64", param="cache_salt")
    return salt
