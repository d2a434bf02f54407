"""Watches one running container: is it started, ready, alive, and is its log not too long."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tandem_operator.node.container import ContainerState
from tandem_operator.node.probes import Exec, ProbeCounter, check


@dataclass(frozen=True)
class Prober:
    """Keeps `started` and `ready` of a container up to date and ends it when it is not alive.

    execute: runs a command in the container. stopping: whether the pod is being ended.
    publish: called after each change. starting_period_s: time between probes until they succeed.
    """

    container: ContainerState
    pod_ip: str
    log: Path
    execute: Exec
    stopping: Callable[[], bool]
    publish: Callable[[], None]
    starting_period_s: float

    async def run(self) -> None:
        """Probe until cancelled or until the container is ended for failing."""
        c, spec = self.container, self.container.spec
        try:
            if not await self._started():
                return
            c.started = True
            self.publish()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow_ready())
                if spec.get("livenessProbe"):
                    group.create_task(self._follow_alive())
                group.create_task(self._rotate())
        except Exception:
            # A probe that cannot be run is the manifest's fault, which the pod then tells.
            if c.process is not None:
                c.process.kill_group()
            raise

    async def _started(self) -> bool:
        startup = self.container.spec.get("startupProbe")
        if startup is None:
            return True
        counter = ProbeCounter.of(startup)
        period = float(startup.get("periodSeconds", 10))
        limit = time.monotonic() + period * counter.failure_threshold
        while not await self._check(startup):
            if time.monotonic() > limit:
                self._fail("startup probe failed")
                return False
            await asyncio.sleep(min(period, self.starting_period_s))
        return True

    async def _check(self, probe: dict[str, object]) -> bool:
        return await check(probe, self.container.spec, self.pod_ip, self.execute)

    async def _follow_ready(self) -> None:
        c = self.container
        probe = c.spec.get("readinessProbe")
        if probe is None:
            c.ready = not self.stopping()
            self.publish()
            return
        counter = ProbeCounter.of(probe)
        while True:
            verdict = counter.record(await self._check(probe))
            ready = bool(verdict) and not self.stopping()
            if ready != c.ready:
                c.ready = ready
                self.publish()
            period = float(probe.get("periodSeconds", 10))
            if not c.ready:
                period = min(period, self.starting_period_s)
            await asyncio.sleep(period)

    async def _follow_alive(self) -> None:
        probe = self.container.spec["livenessProbe"]
        counter = ProbeCounter.of(probe)
        while True:
            await asyncio.sleep(float(probe.get("periodSeconds", 10)))
            if counter.record(await self._check(probe)) is False:
                self._fail("liveness probe failed")
                return

    async def _rotate(self) -> None:
        while True:
            await asyncio.sleep(10)
            process = self.container.process
            if process is not None and process.rotate_log():
                self.container.forget_log()

    def _fail(self, why: str) -> None:
        process = self.container.process
        if process is None or self.stopping():
            return
        with contextlib.suppress(OSError), self.log.open("a") as log:
            log.write(f"node: {why}; the container is ended\n")
        process.kill_group()
