"""One replica leads: a Lease that its holder renews and that others take when it goes silent.

Silence is measured on a local clock that only moves forward, since the record last changed, never
by comparing the times in it, so that a wall clock that jumps neither takes nor loses the lead. The
holder gives up before others may take over (renew deadline < lease duration), even when the
apiserver is away; and because a process that was stopped for longer does not notice at once that
time has passed, each of its writes asks `may_write` first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.resources.base import Object

logger = logging.getLogger("tandem.operator")


def steady_clock() -> float:
    """Seconds that also pass while the machine sleeps; setting the wall clock does not move it."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class LeaseApi(Protocol):
    """The three calls that electing needs."""

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """The Lease, None when there is none."""

    async def create(self, obj: Object) -> Object | None:
        """Create it, None when someone else did."""

    async def replace(self, obj: Object) -> Object:
        """Write it, ApiError 409 when someone else wrote since it was read."""


@dataclass(frozen=True)
class LeaseTimes:
    """Seconds. retry < renew < duration, or two replicas could lead at the same time."""

    duration_s: float = 15.0
    renew_s: float = 10.0
    retry_s: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.retry_s < self.renew_s < self.duration_s:
            raise ValueError(
                f"lease times must rise: retry {self.retry_s} < renew {self.renew_s} < duration "
                f"{self.duration_s}"
            )

    @classmethod
    def of(cls, duration_s: float) -> LeaseTimes:
        """The usual proportions for a lease duration."""
        return cls(duration_s, duration_s * 2 / 3, duration_s * 2 / 15)


class Elector:
    """Takes part in an election as `identity`.

    clock: seconds, never goes back. sleep: waits on it. wall: seconds since the epoch, written for
    people to read and never compared.
    """

    def __init__(
        self,
        api: LeaseApi,
        namespace: str,
        name: str,
        identity: str,
        times: LeaseTimes,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._namespace, self._name = namespace, name
        self._identity = identity
        self.times = times
        self._clock = clock
        self._sleep = sleep
        self._wall = wall
        self._seen: tuple[str, float] = ("", 0.0)
        self._renewed = 0.0
        self.leading = False

    def may_write(self) -> bool:
        """Whether no other replica can lead yet; to be asked right before each write."""
        return self.leading and self._clock() - self._renewed < self.times.renew_s

    async def acquire(self) -> None:
        """Wait until this replica leads."""
        while not await self._try():
            await self._sleep(self.times.retry_s)
        self.leading = True
        logger.info("%s leads", self._identity)

    async def hold(self) -> None:
        """Renew until the lead is lost; then it returns and the caller must stop at once."""
        while True:
            await self._sleep(self.times.retry_s)
            left = self.times.renew_s - (self._clock() - self._renewed)
            if left <= 0:
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    if not await self._try() and self._other_holds:
                        break
        self.leading = False
        logger.error("%s no longer leads", self._identity)

    async def release(self) -> None:
        """Let another replica lead at once."""
        self.leading = False
        logger.info("%s lets another one lead", self._identity)
        try:
            lease = await self._api.get("Lease", self._namespace, self._name)
            if lease is not None and lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"].update(
                    holderIdentity="", leaseDurationSeconds=1, renewTime=self._now()
                )
                await self._api.replace(lease)
        except ApiError as error:
            wait_s = self.times.duration_s
            logger.warning("lease not given back, others wait up to %g s: %s", wait_s, error)

    async def _try(self) -> bool:
        """Take or renew the Lease; whether this replica holds it now."""
        self._other_holds = False
        began = self._clock()
        try:
            held = await self._write()
        except ApiError as error:
            logger.warning("lease %s/%s: %s", self._namespace, self._name, error)
            return False
        if held:
            # Counted from before the call: the record may have been written right then.
            self._renewed = began
        return held

    _other_holds = False

    async def _write(self) -> bool:
        lease = await self._api.get("Lease", self._namespace, self._name)
        spec: Object = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": math.ceil(self.times.duration_s),
            "renewTime": self._now(),
        }
        if lease is None:
            body = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": self._name, "namespace": self._namespace},
                "spec": {**spec, "acquireTime": spec["renewTime"], "leaseTransitions": 0},
            }
            return await self._api.create(body) is not None
        old, version = lease.get("spec") or {}, lease["metadata"]["resourceVersion"]
        holder = old.get("holderIdentity") or ""
        mine = holder == self._identity
        if holder and not mine:
            if version != self._seen[0]:
                self._seen = (version, self._clock())
            silent_s = self._clock() - self._seen[1]
            if silent_s < float(old.get("leaseDurationSeconds") or self.times.duration_s):
                self._other_holds = True
                return False
        spec["acquireTime"] = (
            old.get("acquireTime", spec["renewTime"]) if mine else spec["renewTime"]
        )
        spec["leaseTransitions"] = int(old.get("leaseTransitions") or 0) + (0 if mine else 1)
        lease["apiVersion"], lease["kind"] = "coordination.k8s.io/v1", "Lease"
        lease["spec"] = spec
        await self._api.replace(lease)
        return True

    def _now(self) -> str:
        return datetime.fromtimestamp(self._wall(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
