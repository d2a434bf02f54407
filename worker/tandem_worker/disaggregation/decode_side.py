"""The decode side of a remote prefill: reserve, ask, await the blocks, and never fail for it.

Whatever goes wrong (refused, cut, slow, killed), the request is prefilled here instead: it is
delayed, nothing else. Blocks that a late write may still hit stay out of use until the transfer
says that none can come.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from tandem_worker.disaggregation.protocol import PrefillJob, PrefillOrder
from tandem_worker.engine.drawn import TokenLogprobs
from tandem_worker.engine.requests import ReservedEvent
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.engine.thread import EngineThread
from tandem_worker.errors import PeerError
from tandem_worker.metrics import WorkerMetrics
from tandem_worker.transfer.errors import TransferError
from tandem_worker.transfer.interface import FinalState, KVReceiver, Reservation

_LOOK_AFTER_S = 2.0
_HEALTH_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)

_GRACE_S = 5.0
"""How long blocks may lag behind the prefill worker's HTTP answer, and a quarantine last before a
second attempt is given up in favour of a local prefill."""


class RemoteCosts:
    """Measured costs of the two ways; decides which one a prompt takes.

    A remote prefill costs its round trip; a local one delays every sequence decoding here by its
    whole length. Local wins when it is cheaper in total waiting time.
    """

    def __init__(self) -> None:
        self._overhead_s = 0.0
        self._per_token_s = 0.0
        self._count = 0

    def observe(self, elapsed_s: float, prefill_s: float, num_tokens: int) -> None:
        """Record a finished remote prefill: total time, and the part spent computing."""
        # The first one also paid for connecting and warming up: the second takes its place.
        weight = 1.0 if self._count < 2 else max(0.1, 1.0 / self._count)
        self._overhead_s += weight * (max(0.0, elapsed_s - prefill_s) - self._overhead_s)
        self._per_token_s += weight * (prefill_s / max(1, num_tokens) - self._per_token_s)
        self._count += 1

    def remote_is_cheaper(self, num_tokens: int, local_s: float | None, num_running: int) -> bool:
        """Compare; before two remote prefills were measured, remote is tried.

        Where no local one was measured yet, the prefill worker's computing time stands for it.
        """
        if self._count < 2:
            return True
        compute_s = self._per_token_s * num_tokens
        remote_s = self._overhead_s + compute_s
        if local_s is None:
            local_s = compute_s
        return local_s * (1 + num_running) > remote_s


class PeerCall(Protocol):
    """Sends a request to a peer worker; cancelling it closes the connection.

    Raises PeerError where the peer cannot be reached or answers no JSON object.
    """

    async def __call__(
        self,
        method: str,
        url: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """The status code and the answer's object."""
        ...


class RemotePrefill:
    """Runs remote prefills of one decode worker."""

    def __init__(
        self,
        engine: EngineThread,
        receiver: KVReceiver,
        metrics: WorkerMetrics,
        *,
        call: PeerCall,
        headers: Callable[[str], dict[str, str]],
        attempts: int,
        reserve_timeout_s: float,
    ) -> None:
        self._engine = engine
        self._receiver = receiver
        self._metrics = metrics
        self._call = call
        self._headers = headers
        self._attempts = attempts
        self._timeout_s = reserve_timeout_s
        self.costs = RemoteCosts()
        # Epochs grow across restarts of this process, so that a late push to a predecessor's
        # blocks is refused.
        self._epochs = itertools.count(time.time_ns())
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, url: str, job: PrefillJob, reserved: ReservedEvent) -> asyncio.Task[None]:
        """Begin; cancelling the task also aborts the request in the engine."""
        begun = False

        async def run() -> None:
            nonlocal begun
            begun = True
            await self._run(url, job, reserved)

        def ended(_: asyncio.Task[None]) -> None:
            if not begun:  # cancelled before its first line: nobody was told of the blocks yet
                self._engine.abort(job.request_id)

        task = self._keep(asyncio.create_task(run()))
        task.add_done_callback(ended)
        return task

    async def _run(self, url: str, job: PrefillJob, reserved: ReservedEvent) -> None:
        reservation: Reservation | None = None
        try:
            for attempt in range(self._attempts):
                reservation = None
                epoch = next(self._epochs)
                try:
                    reservation = self._receiver.reserve(
                        job.request_id,
                        epoch,
                        reserved.block_ids,
                        time.monotonic() + self._timeout_s,
                    )
                    await self._attempt(url, job, reserved, reservation)
                except (TransferError, PeerError, TimeoutError) as error:
                    self._metrics.remote_failures.inc()
                    logger.warning(
                        "remote prefill of %s at %s failed (attempt %d of %d): %s",
                        job.request_id,
                        url,
                        attempt + 1,
                        self._attempts,
                        error or type(error).__name__,
                    )
                    if reservation is None:
                        break
                    reservation.abort("the remote prefill failed")
                    if attempt + 1 == self._attempts:
                        break
                    try:
                        await asyncio.wait_for(reservation.released(), _GRACE_S)
                    except TimeoutError:
                        break
                    continue
                return
        except asyncio.CancelledError:
            if reservation is not None:
                reservation.abort("the request was cancelled")
            self._engine.abort(job.request_id, partial(self._release_later, reservation))
            raise
        except Exception:
            # A bug here must not cost the request either.
            logger.exception("remote prefill of %s failed", job.request_id)
            if reservation is not None:
                reservation.abort("the remote prefill failed")
        self._metrics.local_fallbacks.inc()
        self._engine.remote_failed(job.request_id, partial(self._release_later, reservation))

    async def _attempt(
        self,
        url: str,
        job: PrefillJob,
        reserved: ReservedEvent,
        reservation: Reservation,
    ) -> None:
        """Have the blocks filled, tell the engine, learn what it cost."""
        started = time.perf_counter()
        order = PrefillOrder(
            job,
            reservation.epoch,
            reserved.num_computed_tokens,
            self._receiver.address,
            tuple(reserved.block_ids),
        )
        post = asyncio.create_task(
            self._call(
                "POST",
                f"{url.rstrip('/')}/internal/prefill",
                order.to_wire(),
                headers=self._headers(job.request_id),
            )
        )
        arrival = asyncio.create_task(reservation.completed())
        try:
            await self._wait(url, {post, arrival})
            if not arrival.done():
                status, answer = post.result()
                if status != 200 or not answer.get("ok"):
                    raise PeerError(f"it answered {status}: {_message(answer)}")
            final = await asyncio.wait_for(arrival, _GRACE_S)
            if final.num_tokens != len(job.token_ids):
                raise PeerError(f"it computed {final.num_tokens} tokens of {len(job.token_ids)}")
            self._engine.remote_done(
                job.request_id, final.first_token, _logprobs(job.sampling, final)
            )
            elapsed = time.perf_counter() - started
            self._metrics.remote_prefills.inc()
            self._metrics.remote_prefill_s.observe(elapsed)
            # The answer follows the last frame at once; its time tells compute from overhead.
            prefill_s = 0.0
            try:
                _, answer = await asyncio.wait_for(asyncio.shield(post), 0.05)
                prefill_s = float(answer.get("prefill_time_s") or 0.0)
            except (TimeoutError, PeerError, TypeError, ValueError):
                pass  # the blocks are here: nothing else matters
            num_tokens = len(job.token_ids) - reserved.num_computed_tokens
            self.costs.observe(elapsed, prefill_s, num_tokens)
        finally:
            for task in (post, arrival):
                task.cancel()
            await asyncio.gather(post, arrival, return_exceptions=True)

    async def _wait(self, url: str, tasks: set[asyncio.Task[Any]]) -> None:
        """Wait for the first of the tasks, looking now and then whether the peer still lives.

        A stopped process or a cut cable closes no connection: without this look, only the
        reservation's deadline would end the wait.
        """
        failures = 0
        while True:
            done, _ = await asyncio.wait(
                tasks, timeout=_LOOK_AFTER_S, return_when=asyncio.FIRST_COMPLETED
            )
            if done:
                return
            failures = 0 if await self._is_alive(url) else failures + 1
            if failures == 2 and not any(task.done() for task in tasks):
                raise PeerError(f"{url} has stopped answering")

    async def _is_alive(self, url: str) -> bool:
        """Whether the peer answers GET /health in time."""
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                status, _ = await self._call("GET", f"{url.rstrip('/')}/health")
        except (PeerError, TimeoutError):
            return False
        return status == 200

    def _release_later(self, reservation: Reservation | None, block_ids: tuple[int, ...]) -> None:
        """Give blocks back to the engine once no write can reach them."""
        if not block_ids:
            return

        async def release() -> None:
            if reservation is not None:
                await reservation.released()
            self._engine.release_blocks(block_ids)

        self._keep(asyncio.create_task(release()))

    def _keep(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def aclose(self) -> None:
        """Cancel what runs."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _logprobs(sampling: SamplingParams, final: FinalState) -> TokenLogprobs | None:
    if sampling.num_logprobs is None or final.logprob is None:
        return None
    return TokenLogprobs(final.logprob, final.top_logprobs)


def _message(answer: dict[str, object]) -> str:
    error = answer.get("error")
    return str(error.get("message")) if isinstance(error, dict) else str(answer)
