"""Work beside the requests, whose failure somebody hears of."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger("tandem.router")


def begin(work: Coroutine[Any, Any, None], if_it_fails: str) -> asyncio.Task[None]:
    """Start a piece of work; the log says `if_it_fails` and why, should it end by an error."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            logger.error(if_it_fails, exc_info=task.exception())

    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(ended)
    return task
