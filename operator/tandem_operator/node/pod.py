"""Runs one pod: volumes, init containers, containers, probes, restarts with back-off, the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tandem_operator.node.container import ContainerState, LogSpan, PodConditions, phase
from tandem_operator.node.environment import environment, expand
from tandem_operator.node.images import ImageTable, UnknownImageError
from tandem_operator.node.prober import Prober
from tandem_operator.node.probes import http_status
from tandem_operator.node.process import Process, describe_exit, tail
from tandem_operator.node.reaper import Guardian
from tandem_operator.node.settings import NodeSettings
from tandem_operator.node.volumes import (
    Lookup,
    MountError,
    Mounts,
    PodVolumes,
    mounted_command,
)
from tandem_operator.resources.base import Object
from tandem_operator.resources.timestamps import timestamp

logger = logging.getLogger("tandem.node")


class NotRunningError(Exception):
    """A command was to be run in a container that does not run."""


class PodRunner:
    """One pod from start to end; report(status) is called on each change."""

    def __init__(
        self,
        pod: Object,
        *,
        ip: str,
        folder: Path,
        claims: Path,
        images: ImageTable,
        lookup: Lookup,
        guardian: Guardian,
        settings: NodeSettings,
        report: Callable[[Object], None],
        extra_env: dict[str, str] | None = None,
    ) -> None:
        self.pod = pod
        # One of each family where the cluster has both; the first is the pod's own.
        self.ips = ip.split(",")
        self.ip = self.ips[0]
        self.volumes = PodVolumes(
            pod, folder / "volumes", claims, lookup, rewrite=not settings.mount_namespaces
        )
        self._folder = folder
        self._images = images
        self._lookup = lookup
        self._guardian = guardian
        self._settings = settings
        self._report = report
        self._extra_env = extra_env or {}
        self._init = [ContainerState(c) for c in pod["spec"].get("initContainers") or []]
        self._containers = [ContainerState(c) for c in pod["spec"]["containers"]]
        self._policy: str = pod["spec"].get("restartPolicy", "Always")
        self._start_time = timestamp()
        self._initialized = not self._init
        self._stopping = asyncio.Event()
        self._last: Object | None = None
        self._conditions = PodConditions()
        self._attached: set[Process] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to run the pod."""
        self._task = asyncio.create_task(self._run(), name=f"pod {self.pod['metadata']['name']}")
        self._task.add_done_callback(self._given_up)

    def _given_up(self, task: asyncio.Task[None]) -> None:
        """The manifest holds something that this node cannot run; say so on the pod."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        logger.error("pod %s: %r", self.pod["metadata"]["name"], error)
        self.kill()
        for c in self._containers:
            c.ready = False
        self._wait_all("CreateContainerConfigError", f"{type(error).__name__}: {error}")

    async def stop(self, grace_s: float | None = None, *, pre_stop: bool = True) -> None:
        """End all containers: preStop, SIGTERM, grace period, SIGKILL. Safe to call twice."""
        spec_grace = float(self.pod["spec"].get("terminationGracePeriodSeconds", 30))
        grace = min(spec_grace if grace_s is None else grace_s, self._settings.max_grace_s)
        self._stopping.set()
        for c in self._containers:
            c.ready = False
        self._publish()
        running = [c for c in [*self._init, *self._containers] if c.process is not None]
        await asyncio.gather(*(self._end(c, grace, pre_stop) for c in running))
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for process in [*(c.process for c in self._containers), *self._attached]:
            if process is not None:
                process.kill_group()
        self._publish()

    def kill(self) -> None:
        """End all containers without waiting."""
        self._stopping.set()
        for c in [*self._init, *self._containers]:
            if c.process is not None:
                c.process.kill_group()

    async def refresh_volumes(self) -> None:
        """Bring ConfigMap and Secret volumes up to date in the running pod."""
        try:
            await self.volumes.prepare()
        except Exception as error:
            logger.warning("%s: volumes: %s", self.pod["metadata"]["name"], error)

    def log_path(self, container: str | None = None) -> Path:
        """The log file of a container; the first one's when no name is given."""
        return self._folder / "logs" / f"{container or self._containers[0].spec['name']}.log"

    def log_span(self, container: str, *, previous: bool = False) -> LogSpan | None:
        """What one run of a container wrote; None when it has not run (before)."""
        found = [c for c in [*self._init, *self._containers] if c.spec["name"] == container]
        return found[0].span(self.log_path(container), previous=previous) if found else None

    async def _end(self, c: ContainerState, grace: float, pre_stop: bool) -> None:
        process = c.process
        if process is None:
            return
        deadline = time.monotonic() + grace
        if pre_stop and grace > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    await self._pre_stop(c)
        process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await process.ended()
        process.kill_group()
        await process.ended()

    async def _pre_stop(self, c: ContainerState) -> None:
        hook = (c.spec.get("lifecycle") or {}).get("preStop") or {}
        if sleep := hook.get("sleep"):
            if (process := c.process) is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(float(sleep["seconds"])):
                        await process.ended()
        elif http := hook.get("httpGet"):
            await http_status(self.ip, int(http["port"]), http.get("path", "/"), 30.0)
        elif command := (hook.get("exec") or {}).get("command"):
            await self._exec(c, list(command), 3600.0)

    async def _run(self) -> None:
        self._publish()
        await self._prepare_volumes()
        for c in self._init:
            if not await self._run_to_success(c):
                return
        self._initialized = True
        self._publish()
        (self._folder / "logs").mkdir(parents=True, exist_ok=True)
        async with asyncio.TaskGroup() as group:
            for c in self._containers:
                group.create_task(self._supervise(c))
        self._publish()

    async def _prepare_volumes(self) -> None:
        while True:
            try:
                return await self.volumes.prepare()
            except Exception as error:
                # The lookup is not ours and fails in its own ways; the pod waits for any of them.
                self._wait_all("FailedMount", str(error) or repr(error))
                await asyncio.sleep(self._settings.mount_retry_s)

    def _wait_all(self, reason: str, message: str) -> None:
        for c in [*self._init, *self._containers]:
            c.state = {"waiting": {"reason": reason, "message": message}}
        self._publish()

    async def _run_to_success(self, c: ContainerState) -> bool:
        failures = 0
        while not self._stopping.is_set():
            code = await self._run_once(c, probes=False)
            if code == 0:
                c.ready = True
                return True
            if self._policy == "Never":
                return False
            await self._back_off(c, failures)
            failures += 1
            c.restarts += 1
        return False

    async def _supervise(self, c: ContainerState) -> None:
        failures = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            code = await self._run_once(c, probes=True)
            if self._stopping.is_set() or self._policy == "Never":
                return
            if self._policy == "OnFailure" and code == 0:
                return
            if time.monotonic() - began >= self._settings.backoff_reset_s:
                failures = 0
            await self._back_off(c, failures)
            failures += 1
            c.restarts += 1

    async def _back_off(self, c: ContainerState, failures: int) -> None:
        if failures == 0:
            return
        delay = min(
            self._settings.backoff_first_s * 2 ** min(failures - 1, 16),
            self._settings.backoff_max_s,
        )
        detail = (c.last_state.get("terminated") or {}).get("message", "")
        c.state = {
            "waiting": {
                "reason": "CrashLoopBackOff",
                "message": f"starts again in {delay:g} s; {detail}".rstrip("; "),
            }
        }
        self._publish()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._stopping.wait()

    async def _run_once(self, c: ContainerState, *, probes: bool) -> int:
        """Start the container and wait for its end; the exit code."""
        log = self.log_path(c.spec["name"])
        log.parent.mkdir(parents=True, exist_ok=True)
        began = timestamp()
        try:
            argv, env, cwd = await self._command(c)
            c.begin_log(log)
            c.process = await Process.start(
                argv, env=env, cwd=cwd, log=log, guardian=self._guardian
            )
        except UnknownImageError as error:
            c.state = {"waiting": {"reason": "ErrImagePull", "message": str(error)}}
            self._publish()
            await self._stopping.wait()
            return 1
        except Exception as error:
            reason = "CreateContainerError"
            c.state = {"waiting": {"reason": reason, "message": str(error)}}
            c.last_state = {
                "terminated": {"exitCode": 128, "reason": reason, "message": str(error)}
            }
            self._publish()
            return 128
        c.state = {"running": {"startedAt": began}}
        c.started = c.ready = False
        self._publish()
        prober = asyncio.create_task(self._prober(c).run()) if probes else None
        try:
            code = await c.process.wait()
        finally:
            if prober is not None:
                prober.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await prober  # an error in a probe ends the pod
        c.process = None
        c.started = c.ready = False
        message = describe_exit(code)
        # After a signal the last line says nothing about the cause.
        if code > 0 and (lines := tail(log, 3)):
            message = f"{message}: {lines.splitlines()[-1][:400]}"
        c.last_state = c.state = {
            "terminated": {
                "exitCode": code if code >= 0 else 128 - code,
                **({"signal": -code} if code < 0 else {}),
                "reason": "Completed" if code == 0 else "Error",
                "message": message,
                "startedAt": began,
                "finishedAt": timestamp(),
            }
        }
        self._publish()
        return code

    async def _command(self, c: ContainerState) -> tuple[list[str], dict[str, str], Path]:
        real = self.volumes.mounts(c.spec)
        mounts = Mounts({}) if self._settings.mount_namespaces else real
        asked = await environment(self.pod, c.spec, self.ips, self._lookup)
        base = dict(os.environ) if self._settings.inherit_environment else {}
        env = {**base, **self._extra_env, **{k: mounts.rewrite(v) for k, v in asked.items()}}

        def words(values: list[Any] | None) -> list[str]:
            return [mounts.rewrite(expand(str(v), asked)) for v in values or []]

        argv = self._images.command(
            c.spec.get("image", ""), words(c.spec.get("command")), words(c.spec.get("args"))
        )
        cwd = Path(mounts.rewrite(c.spec["workingDir"])) if "workingDir" in c.spec else self._folder
        if self._settings.mount_namespaces:
            argv = self._mounted(c, argv)
        return argv, env, cwd

    def _mounted(self, c: ContainerState, argv: list[str]) -> list[str]:
        """The command, made to see the image's folders and its volumes at their real paths."""
        return [*mounted_command([*self._images.binds(), *self.volumes.binds(c.spec)]), *argv]

    async def exec(self, container: str, command: list[str]) -> Process:
        """Start a command beside a running container, with pipes; it ends with the pod.

        Raises NotRunningError when there is no such container or it does not run, OSError or
        MountError when the command cannot be started.
        """
        found = [c for c in [*self._init, *self._containers] if c.spec["name"] == container]
        if not found or found[0].process is None or self._stopping.is_set():
            raise NotRunningError(f"container {container!r} is not running")
        process = await self._beside(found[0], command, log=None)
        self._attached = {p for p in self._attached if p.running} | {process}
        return process

    async def _beside(self, c: ContainerState, command: list[str], log: Path | None) -> Process:
        """Start a command with the container's environment and volumes."""
        _, env, cwd = await self._command(c)
        if self._settings.mount_namespaces:
            argv = self._images.command("", command, [])
            argv = self._mounted(c, argv)
        else:
            mounts = self.volumes.mounts(c.spec)
            argv = self._images.command("", [mounts.rewrite(w) for w in command], [])
        return await Process.start(argv, env=env, cwd=cwd, log=log, guardian=self._guardian)

    async def _exec(self, c: ContainerState, command: list[str], timeout_s: float) -> int:
        try:
            process = await self._beside(c, command, self.log_path(c.spec["name"] + ".exec"))
        except (OSError, MountError):
            return 126
        try:
            async with asyncio.timeout(timeout_s):
                return await process.wait()
        except TimeoutError:
            return 124
        finally:
            # Also when the container ends meanwhile and nobody wants the answer any more.
            process.kill_group()
            await process.wait()

    def _prober(self, c: ContainerState) -> Prober:
        return Prober(
            c,
            self.ip,
            self.log_path(c.spec["name"]),
            partial(self._exec, c),
            self._stopping.is_set,
            self._publish,
            self._settings.starting_probe_period_s,
        )

    @property
    def finished(self) -> bool:
        """Whether the pod has run to its end and will not start again."""
        return self._phase() in ("Succeeded", "Failed")

    def _phase(self) -> str:
        return phase(self._policy, self._init, self._containers, self._stopping.is_set())

    def status(self) -> Object:
        """The pod's status now."""
        ready = bool(self._containers) and all(c.ready for c in self._containers)
        return {
            "phase": self._phase(),
            "podIP": self.ip,
            "podIPs": [{"ip": ip} for ip in self.ips],
            "hostIP": self.ip,
            "startTime": self._start_time,
            "conditions": self._conditions.of(
                {
                    "PodScheduled": True,
                    "Initialized": self._initialized,
                    "ContainersReady": ready,
                    "Ready": ready and not self._stopping.is_set(),
                }
            ),
            "initContainerStatuses": [c.status() for c in self._init],
            "containerStatuses": [c.status() for c in self._containers],
        }

    def _publish(self) -> None:
        status = self.status()
        if status != self._last:
            self._last = status
            self._report(status)
