"""A node asks its containers how they are, and runs commands beside them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from node_harness import OFTEN, READY, Harness, gone, pod, running
from tandem_operator.node.node import NotRunningError
from tandem_operator.node.probes import http_status


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    async with running(tmp_path / "node") as harness:
        yield harness


async def test_readiness_follows_the_probe(harness: Harness, tmp_path: Path) -> None:
    blocker = tmp_path / "blocked"
    harness.node.run(pod("a", env={"STUB_NOT_READY": str(blocker)}))
    await harness.until(lambda: harness.ready("a"))

    blocker.touch()
    await harness.until(lambda: not harness.ready("a"))
    blocker.unlink()
    await harness.until(lambda: harness.ready("a"))

    assert harness.container("a")["restartCount"] == 0


async def test_a_container_that_is_not_alive_is_restarted(harness: Harness, tmp_path: Path) -> None:
    blocker = tmp_path / "blocked"
    probe = {**READY, "failureThreshold": 2}
    harness.node.run(pod("a", env={"STUB_NOT_READY": str(blocker)}, livenessProbe=probe))
    await harness.until(lambda: harness.ready("a"))

    blocker.touch()
    await harness.until(lambda: harness.container("a")["restartCount"] >= 1)

    assert harness.container("a")["lastState"]["terminated"]["signal"] == signal.SIGKILL


async def test_exec_probes_and_init_containers_run(harness: Harness, tmp_path: Path) -> None:
    one = pod("a", readinessProbe={"exec": {"command": ["test", "-e", str(tmp_path / "ok")]}})
    one["spec"]["initContainers"] = [
        {"name": "init", "image": "any", "command": ["touch", str(tmp_path / "ok")]}
    ]
    harness.node.run(one)

    await harness.until(lambda: harness.ready("a"))

    state = harness.status["a"]["initContainerStatuses"][0]["state"]
    assert state["terminated"]["exitCode"] == 0


async def test_a_probes_command_ends_with_its_container(harness: Harness, tmp_path: Path) -> None:
    """A container that stops while its probe still runs leaves nothing behind."""
    told = tmp_path / "pid"
    os.mkfifo(told)
    words = ["sh", "-c", f"echo $$ > {told}; sleep 300"]
    harness.node.run(
        pod("a", livenessProbe={"exec": {"command": words}, "timeoutSeconds": 300, **OFTEN})
    )
    await harness.until(lambda: harness.ready("a"))
    probe = int(await asyncio.to_thread(told.read_text))
    await harness.node.stop(pod("a"), 5.0)

    assert gone(probe)


async def test_a_probe_that_is_cancelled_ends_wherever_it_stands() -> None:
    """Else a container that ended would wait for its probes for ever."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    num_cancelled = 0
    async with server:
        for steps in range(40):
            probe = asyncio.create_task(http_status("127.0.0.1", port, "/", 5.0))
            for _ in range(steps):
                await asyncio.sleep(0)
            asked = probe.cancel()
            await asyncio.wait([probe])
            assert probe.cancelled() == asked
            num_cancelled += asked

    assert num_cancelled


async def test_a_command_beside_a_container_has_its_environment_and_ends_with_its_pod(
    harness: Harness,
) -> None:
    harness.node.run(pod("a", env={"WORD": "hello"}))
    await harness.until(lambda: harness.ready("a"))
    script = "import os, sys, time; print(os.environ['WORD'], sys.stdin.read()); time.sleep(600)"

    process = await harness.node.exec("uid-a", "main", ["python", "-u", "-c", script])
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"there")
    process.stdin.close()
    told = await process.stdout.readline()
    await harness.node.stop(pod("a"), 5.0)
    await process.wait()

    assert told == b"hello there\n"
    assert gone(process.pid)


async def test_a_command_beside_a_container_that_does_not_run_is_refused(harness: Harness) -> None:
    harness.node.run(pod("a"))
    await harness.until(lambda: harness.ready("a"))

    with pytest.raises(NotRunningError, match="container 'other' is not running"):
        await harness.node.exec("uid-a", "other", ["true"])
    with pytest.raises(NotRunningError, match="the pod does not run on this node"):
        await harness.node.exec("uid-b", "main", ["true"])
