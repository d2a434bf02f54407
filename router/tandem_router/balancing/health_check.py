"""Asks each worker how loaded it is, so that picking knows more than this router's own traffic.

A worker that answers is alive again at once, whatever its back-off; one that does not answer is
backed off from before a request has to find out.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable

from tandem_router.balancing.endpoint_picker import Picker
from tandem_router.balancing.worker import Load, Worker
from tandem_router.errors import UpstreamError
from tandem_router.http.client import UpstreamClient

logger = logging.getLogger("tandem.router")

DOWN_POLL_S = 0.25


async def poll_loads(
    picker: Picker,
    client: UpstreamClient,
    *,
    poll_s: float,
    peer_token: Callable[[], str | None],
    skip_tiers: frozenset[str],
    dead_after_s: float,
    on_change: Callable[[], None],
) -> None:
    """Keep one polling task per worker until cancelled; skip_tiers are not ours to ask."""
    tasks: dict[Worker, asyncio.Task[None]] = {}
    try:
        while True:
            present = {worker for worker in picker.workers if worker.tier not in skip_tiers}
            for worker in [known for known in tasks if known not in present]:
                tasks.pop(worker).cancel()
            for worker in present - tasks.keys():
                tasks[worker] = asyncio.ensure_future(
                    _poll(worker, picker, client, poll_s, peer_token, dead_after_s, on_change)
                )
            await asyncio.sleep(min(poll_s, DOWN_POLL_S))
    finally:
        for task in tasks.values():
            task.cancel()


async def _poll(
    worker: Worker,
    picker: Picker,
    client: UpstreamClient,
    poll_s: float,
    peer_token: Callable[[], str | None],
    dead_after_s: float,
    on_change: Callable[[], None],
) -> None:
    loop = asyncio.get_running_loop()
    last_answer = loop.time()
    while True:
        was_usable = worker.load is not None and worker.num_failures == 0
        token = peer_token()
        headers = [(b"x-tandem-peer-token", token.encode())] if token else []
        try:
            status, body = await client.get(
                worker.url + "/v1/load", headers=headers, timeout_s=max(2.0, poll_s)
            )
            if status != 200:
                raise UpstreamError(f"GET /v1/load answered {status}")
            picker.observed(worker, Load.parse(json.loads(body)))
            last_answer = loop.time()
            if not was_usable:
                on_change()
        except (UpstreamError, ValueError) as error:
            picker.failed(worker, str(error))
            if was_usable:
                logger.warning("worker %s: %s", worker.url, error)
            if loop.time() - last_answer > dead_after_s:
                # Stopped or cut off: its sockets stay open, so its streams would wait for long.
                client.abandon(worker.url, f"no load report for {dead_after_s:g} s")
                last_answer = loop.time()
        await asyncio.sleep(poll_s if worker.num_failures == 0 else min(poll_s, DOWN_POLL_S))
