"""From changes to passes, for the local cluster and Kubernetes alike."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.reconcile.owners import RECONCILED, concerned
from tandem_operator.reconcile.reconciler import Reconciler
from tandem_operator.reconcile.requeue import Key
from tandem_operator.reconcile.work_queue import REST_S, WorkQueue
from tandem_operator.resources.base import Object

logger = logging.getLogger("tandem.operator")

NUM_WORKERS = 8
# A pass that failed and is tried again sooner is a moment's trouble; then people are told.
TOLD_FROM_S = 2.0


def log_failure(key: Key, error: Exception, again_s: float) -> None:
    """Write down a failed pass: the cluster's sentence, or the trace of a defect of ours."""
    if isinstance(error, ApiError):
        logger.warning("%s: %s; again in %.1f s", key, error, again_s)
    else:
        logger.error("%s: unexpected; again in %.1f s", key, again_s, exc_info=error)


class Controller:
    """Reconciles what changed, what failed and, now and then, everything.

    Args:
        reconciler: makes one pass over one resource.
        stored: the objects of a kind, in one namespace or in all, to look at only.
        resync_s: longest time between two passes over a resource.
        rest_s: pause of a resource after a pass, so that several changes make one pass.
        failed: told of a pass that failed and when it is tried again.
    """

    def __init__(
        self,
        reconciler: Reconciler,
        stored: Callable[[str, str | None], Iterable[Object]],
        resync_s: float,
        rest_s: float = REST_S,
        failed: Callable[[Key, Exception, float], None] = log_failure,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.reconciler = reconciler
        self.queue = WorkQueue(loop.call_later, loop.time, rest_s)
        self.num_passes = 0
        self.num_failures = 0
        self._stored = stored
        self._resync_s = resync_s
        self._failed = failed

    def noticed(self, obj: Object) -> None:
        """An object came, changed or went: look at whom it concerns."""
        for key in concerned(obj, lambda namespace: self._stored("Router", namespace)):
            self.queue.add(key)

    async def run(self) -> None:
        """Reconcile until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(NUM_WORKERS):
                group.create_task(self._work())
            group.create_task(self._resync())

    async def _work(self) -> None:
        while True:
            key = await self.queue.take()
            self.num_passes += 1
            try:
                result = await self.reconciler.reconcile(key)
            except Exception as error:
                # A failure in one resource, or a defect in its plan, must not stop the others.
                self.num_failures += 1
                again_s = self.queue.failed(key)
                self._failed(key, error, again_s)
                if again_s >= TOLD_FROM_S:
                    await self._tell(key, error, again_s)
            else:
                self.queue.done(key)
                if result.again_s is not None:
                    self.queue.add_later(key, result.again_s)
                if result.writes:
                    logger.debug("%s: %d writes", key, result.writes)

    async def _tell(self, key: Key, error: Exception, again_s: float) -> None:
        """To who looks at the resource: nothing is tried for long without a word."""
        try:
            await self.reconciler.tell_of_failure(key, error, again_s)
        except ApiError as unsaid:
            logger.warning("%s: its Event cannot be written either: %s", key, unsaid)

    async def _resync(self) -> None:
        while True:
            await asyncio.sleep(self._resync_s)
            for kind in RECONCILED:
                for obj in self._stored(kind, None):
                    metadata = obj["metadata"]
                    self.queue.add(Key(kind, metadata["namespace"], metadata["name"]))
