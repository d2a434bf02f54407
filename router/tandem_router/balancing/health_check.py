"""Asks each worker how loaded it is, so that picking knows more than this router's own traffic.

A worker that answers is alive again at once, whatever its back-off; one that does not answer is
backed off from before a request has to find out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from tandem_router.balancing.endpoint_picker import Picker
from tandem_router.balancing.worker import Load, Worker
from tandem_router.config import TierConfig
from tandem_router.engines import Ask, Engine, LoadReader, engine_of
from tandem_router.errors import UpstreamError
from tandem_router.http.client import UpstreamClient

logger = logging.getLogger("tandem.router")

DOWN_POLL_S = 0.25
ASK_TIMEOUT_S = 30.0  # of a question that makes the engine compute


async def poll_loads(
    picker: Picker,
    client: UpstreamClient,
    *,
    poll_s: float,
    peer_token: Callable[[], str | None],
    pools: Callable[[], Mapping[str, TierConfig]],
    dead_after_s: Callable[[], float],
    on_change: Callable[[], None],
) -> None:
    """Keep one polling task per worker until cancelled; pools: tiers whose workers are asked."""
    tasks: dict[Worker, asyncio.Task[None]] = {}
    asked: Mapping[Worker, tuple[str, str]] = {}  # as whose: engine and model
    try:
        while True:
            tiers = pools()
            present = {
                worker: (tiers[worker.tier].engine, tiers[worker.tier].served_model)
                for worker in picker.workers
                if worker.tier in tiers
            }
            for worker in [known for known, task in tasks.items() if task.done()]:
                _say_why(worker, tasks.pop(worker))
            for worker in [known for known in tasks if present.get(known) != asked[known]]:
                tasks.pop(worker).cancel()
            asked = present
            for worker in present.keys() - tasks.keys():
                tier = tiers[worker.tier]
                ask = _asker(client, worker.url, engine_of(tier.engine), peer_token, poll_s)
                reader = engine_of(tier.engine).reader(tier.served_model, worker.role)
                tasks[worker] = asyncio.ensure_future(
                    _poll(worker, picker, client, reader, ask, poll_s, dead_after_s, on_change)
                )
            await asyncio.sleep(min(poll_s, DOWN_POLL_S))
    finally:
        for task in tasks.values():
            task.cancel()


def _asker(
    client: UpstreamClient,
    url: str,
    engine: Engine,
    peer_token: Callable[[], str | None],
    poll_s: float,
) -> Ask:
    async def ask(path: str, body: bytes = b"") -> tuple[int, bytes]:
        headers = engine.auth(peer_token())
        if not body:
            return await client.get(url + path, headers=headers, timeout_s=max(2.0, poll_s))
        response = await client.request(
            "POST",
            url + path,
            headers=[(b"content-type", b"application/json"), *headers],
            body=body,
            stall_timeout_s=ASK_TIMEOUT_S,
        )
        return response.status, await response.read_all()

    return ask


async def _poll(
    worker: Worker,
    picker: Picker,
    client: UpstreamClient,
    reader: LoadReader,
    ask: Ask,
    poll_s: float,
    dead_after_s: Callable[[], float],
    on_change: Callable[[], None],
) -> None:
    loop = asyncio.get_running_loop()
    last_answer, said = loop.time(), None
    while True:
        was_usable = worker.load is not None and worker.num_failures == 0
        try:
            report = await reader.read(ask)
            picker.observed(worker, Load.parse(report))
            last_answer = loop.time()
            problem = report.get("problem")
            if problem and problem != said:
                logger.warning("worker %s is not used: it %s", worker.url, problem)
            said = problem
            if not was_usable:
                on_change()
        except (UpstreamError, ValueError) as error:
            picker.failed(worker, str(error))
            if was_usable:
                logger.warning("worker %s: %s", worker.url, error)
            silent_s = dead_after_s()
            if loop.time() - last_answer > silent_s:
                # Stopped or cut off: its sockets stay open, so its streams would wait for long.
                client.abandon(worker.url, f"no load report for {silent_s:g} s")
                last_answer = loop.time()
        except Exception as error:
            # Our own mistake about one report must not end the reports, and with them the worker.
            picker.failed(worker, f"its load report cannot be read: {type(error).__name__}")
            if (why := f"{type(error).__name__}: {error}") != said:
                logger.exception("worker %s: its load report cannot be read", worker.url)
                said = why
        await asyncio.sleep(poll_s if worker.num_failures == 0 else min(poll_s, DOWN_POLL_S))


def _say_why(worker: Worker, ended: asyncio.Task[None]) -> None:
    """A poll that ended by itself is a mistake of ours; another one takes its place."""
    error = None if ended.cancelled() else ended.exception()
    logger.error(
        "worker %s: asking for its load ended; it begins again", worker.url, exc_info=error
    )
