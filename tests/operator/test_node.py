"""The node: real processes with probes, restarts, back-off, volumes, graceful and forced ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tandem_operator.node.images import ImageTable
from tandem_operator.node.node import Node, NodeSettings, NotRunningError, loopback_addresses
from tandem_operator.node.probes import http_status

Object = dict[str, Any]
STUB = Path(__file__).with_name("stub_server.py")
# Pods of this file live here; `tandem up` uses 16 to 126.
SUBNET = 127 - 120


class Harness:
    """A node, what it reported, and a way to wait for a state."""

    def __init__(self, folder: Path) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        self.status: dict[str, Object] = {}
        self.history: list[Object] = []
        self._changed = asyncio.Event()
        self.folder = folder
        self.node = Node(
            folder,
            addresses=loopback_addresses(SUBNET),
            lookup=self._lookup,
            report=self._report,
            images=ImageTable({"stub": (sys.executable, "-S", str(STUB))}),
            settings=NodeSettings(
                backoff_first_s=0.05,
                backoff_max_s=0.2,
                starting_probe_period_s=0.02,
                mount_retry_s=0.05,
            ),
            num_gpus=2,
        )

    async def _lookup(self, kind: str, _: str, name: str) -> Object | None:
        return self.objects.get((kind, name))

    def _report(self, pod: Object, status: Object) -> None:
        self.status[pod["metadata"]["name"]] = status
        self.history.append(status)
        self._changed.set()

    async def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def ready(self, name: str) -> bool:
        conditions = self.status.get(name, {}).get("conditions", [])
        return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

    def container(self, name: str) -> Object:
        found: Object = self.status[name]["containerStatuses"][0]
        return found

    def log(self, pod: Object) -> str:
        path = self.node.log_path(pod["metadata"]["uid"])
        assert path is not None
        return path.read_text()

    async def ask(self, name: str, path: str = "/") -> Object:
        ip = self.status[name]["podIP"]
        reader, writer = await asyncio.open_connection(ip, 8100)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        found: Object = json.loads(answer.partition(b"\r\n\r\n")[2])
        return found


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    harness = Harness(tmp_path / "node")
    yield harness
    await harness.node.close(2.0)


OFTEN = {"periodSeconds": 0.05}
READY = {"httpGet": {"path": "/ready", "port": "http"}, "periodSeconds": 0.05, "timeoutSeconds": 5}


def pod(name: str, *, env: dict[str, str] | None = None, **container: Any) -> Object:
    variables: list[Object] = [
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        *({"name": k, "value": v} for k, v in (env or {}).items()),
    ]
    entry = {
        "name": "main",
        "image": "stub:1",
        "env": variables,
        "ports": [{"name": "http", "containerPort": 8100}],
        "startupProbe": {**READY, "failureThreshold": 400},
        "readinessProbe": {**READY, "failureThreshold": 1},
        **container,
    }
    return {
        "metadata": {"name": name, "namespace": "default", "uid": f"uid-{name}", "labels": {}},
        "spec": {"containers": [entry], "terminationGracePeriodSeconds": 10},
    }


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int, timeout_s: float = 10.0) -> bool:
    """Whether a process ends in time; polled, since it is no child of ours."""
    end = time.monotonic() + timeout_s
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


async def test_a_pod_gets_its_own_address_and_environment(harness: Harness) -> None:
    harness.node.run(pod("a", env={"STUB_X": "$(POD_NAME)!"}))
    harness.node.run(pod("b"))
    await harness.until(lambda: harness.ready("a") and harness.ready("b"))

    env = (await harness.ask("a"))["env"]

    assert env["POD_IP"] == harness.status["a"]["podIP"] != harness.status["b"]["podIP"]
    assert (env["POD_NAME"], env["STUB_X"]) == ("a", "a!")
    assert harness.status["a"]["phase"] == "Running"


async def test_volumes_are_mounted_and_their_paths_put_in(harness: Harness, tmp_path: Path) -> None:
    harness.objects["ConfigMap", "c"] = {
        "kind": "ConfigMap",
        "data": {"config.json": '{"http_port": 8100, "where": "/data/x"}'},
    }
    harness.objects["Secret", "s"] = {"kind": "Secret", "data": {"token": "c2VjcmV0"}}
    (tmp_path / "host").mkdir()
    mounts = [
        {"name": "c", "mountPath": "/etc/c"},
        {"name": "s", "mountPath": "/etc/s"},
        {"name": "h", "mountPath": "/data"},
        {"name": "e", "mountPath": "/scratch"},
    ]
    args = ["--config", "/etc/c/config.json", "--secret", "/etc/s/token", "--data=/data/m"]
    one = pod("a", args=[*args, "--tmp", "/scratch"], volumeMounts=mounts)
    one["spec"]["volumes"] = [
        {"name": "c", "configMap": {"name": "c"}},
        {"name": "s", "secret": {"secretName": "s"}},
        {"name": "h", "hostPath": {"path": str(tmp_path / "host"), "type": "Directory"}},
        {"name": "e", "emptyDir": {}},
    ]
    harness.node.run(one)
    await harness.until(lambda: harness.ready("a"))

    seen = (await harness.ask("a"))["args"]

    assert _text(seen[3]) == "secret"
    assert seen[4] == f"--data={tmp_path}/host/m"
    assert os.access(seen[6], os.W_OK)
    assert json.loads(_text(seen[1]))["where"] == f"{tmp_path}/host/x"


def _text(path: str) -> str:
    return Path(path).read_text()


async def test_a_missing_volume_is_waited_for_and_named(harness: Harness) -> None:
    one = pod(
        "a", args=["--config", "/etc/c/x"], volumeMounts=[{"name": "c", "mountPath": "/etc/c"}]
    )
    one["spec"]["volumes"] = [{"name": "c", "configMap": {"name": "c"}}]
    harness.node.run(one)
    await harness.until(
        lambda: "FailedMount" in json.dumps(harness.status.get("a", {}).get("containerStatuses"))
    )
    assert "ConfigMap 'c' does not exist" in harness.container("a")["state"]["waiting"]["message"]

    harness.objects["ConfigMap", "c"] = {"kind": "ConfigMap", "data": {"x": "{}"}}

    await harness.until(lambda: harness.ready("a"))


async def test_a_killed_container_comes_back_at_once(harness: Harness) -> None:
    harness.node.run(pod("a"))
    await harness.until(lambda: harness.ready("a"))
    pid = (await harness.ask("a"))["pid"]

    os.kill(pid, signal.SIGKILL)
    await harness.until(lambda: not harness.ready("a"))
    await harness.until(lambda: harness.ready("a"))

    assert (await harness.ask("a"))["pid"] != pid
    assert harness.container("a")["restartCount"] == 1
    assert harness.container("a")["lastState"]["terminated"]["signal"] == signal.SIGKILL


async def test_a_crashing_container_backs_off_and_says_why(harness: Harness) -> None:
    harness.node.run(pod("a", env={"STUB_CRASH": "3"}))

    await harness.until(lambda: harness.status.get("a") is not None and _restarts(harness) >= 4)

    waits = [
        s["containerStatuses"][0]["state"]["waiting"]["message"].split(";")[0]
        for s in harness.history
        if s["containerStatuses"][0]["state"].get("waiting", {}).get("reason") == "CrashLoopBackOff"
    ]
    assert waits[:3] == ["starts again in 0.05 s", "starts again in 0.1 s", "starts again in 0.2 s"]
    ended = harness.container("a")["lastState"]["terminated"]
    assert ended["exitCode"] == 3
    assert ended["message"] == "exit code 3: stub: asked to crash"


def _restarts(harness: Harness) -> int:
    return int(harness.container("a")["restartCount"])


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


async def test_a_pod_ends_gracefully(harness: Harness) -> None:
    one = pod("a")
    harness.node.run(one)
    await harness.until(lambda: harness.ready("a"))
    pid, log = (await harness.ask("a"))["pid"], harness.node.log_path("uid-a")
    assert log is not None
    kept = os.open(log, os.O_RDONLY)

    await harness.node.stop(one)

    assert not alive(pid)
    assert b"drained" in os.read(kept, 10_000)
    assert harness.node.pods == []
    os.close(kept)


async def test_a_pod_that_ignores_sigterm_is_killed_after_its_grace_period(
    harness: Harness,
) -> None:
    one = pod("a", env={"STUB_SLOW_EXIT": "1"})
    harness.node.run(one)
    await harness.until(lambda: harness.ready("a"))
    pid = (await harness.ask("a"))["pid"]

    await harness.node.stop(one, grace_s=0.2)

    assert not alive(pid)


async def test_grandchildren_end_with_their_container(harness: Harness, tmp_path: Path) -> None:
    one = pod("a", env={"STUB_CHILD": str(tmp_path / "child")})
    harness.node.run(one)
    await harness.until(lambda: harness.ready("a"))
    child = int((tmp_path / "child").read_text())

    await harness.node.stop(one)

    assert gone(child)


async def test_gpus_are_handed_out_once(harness: Harness) -> None:
    gpu = {"limits": {"nvidia.com/gpu": "1"}}
    first, second = pod("a", resources=gpu), pod("b", resources=gpu)
    harness.node.run(first)
    harness.node.run(second)
    assert harness.node.free_gpus == 0
    await harness.until(lambda: harness.ready("a") and harness.ready("b"))

    await harness.node.stop(first)

    assert harness.node.free_gpus == 1


async def test_a_finished_pod_keeps_its_log_but_not_its_gpus(harness: Harness) -> None:
    done = pod("a", command=["python", "-c", "print('done')"])
    done["spec"]["containers"][0]["resources"] = {"limits": {"nvidia.com/gpu": "2"}}
    done["spec"]["restartPolicy"] = "Never"

    harness.node.run(done)
    held = harness.node.free_gpus
    await harness.until(lambda: harness.status.get("a", {}).get("phase") == "Succeeded")

    assert (held, harness.node.free_gpus) == (0, 2)
    assert harness.log(done) == "done\n"


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


async def test_each_run_of_a_container_has_its_own_part_of_the_log(harness: Harness) -> None:
    script = "import os; print(os.getpid()); raise SystemExit(3)"
    harness.node.run(pod("a", command=["python", "-c", script]))

    await harness.until(lambda: "a" in harness.status)
    before = harness.node.log_span("uid-a", "main", previous=True)
    await harness.until(lambda: harness.container("a")["restartCount"] == 2)
    span = harness.node.log_span("uid-a", "main", previous=True)

    assert before is None
    assert span is not None
    assert span.path.read_text()[span.start : span.end].count("\n") == 1
    assert harness.node.log_span("uid-a", "other") is None


async def test_an_unknown_image_is_told(harness: Harness) -> None:
    harness.node.run(pod("a", image="nginx"))

    await harness.until(lambda: "ErrImagePull" in json.dumps(harness.status.get("a", {})))

    assert "no local command" in harness.container("a")["state"]["waiting"]["message"]


async def test_a_program_that_does_not_exist_is_told(harness: Harness) -> None:
    harness.node.run(pod("a", command=["/does/not/exist"]))

    await harness.until(lambda: "CreateContainerError" in json.dumps(harness.status.get("a", {})))

    assert "/does/not/exist" in json.dumps(harness.status["a"])


async def test_a_manifest_that_cannot_be_run_is_told(harness: Harness) -> None:
    harness.node.run(pod("a", readinessProbe={"httpGet": {"path": "/", "port": "nowhere"}}))

    await harness.until(
        lambda: "CreateContainerConfigError" in json.dumps(harness.status.get("a", {}))
    )

    assert "nowhere" in harness.container("a")["state"]["waiting"]["message"]


async def test_a_failing_lookup_is_waited_for(harness: Harness) -> None:
    async def broken(*_: str) -> Object | None:
        raise RuntimeError("the apiserver is away")

    harness.node._lookup = broken
    one = pod("a")
    one["spec"]["volumes"] = [{"name": "c", "configMap": {"name": "c"}}]
    harness.node.run(one)
    await harness.until(lambda: "the apiserver is away" in json.dumps(harness.status.get("a", {})))

    await harness.node.stop(one)

    assert harness.node.pods == []


PARENT = """
import asyncio, sys
sys.path[:0] = {path!r}
from test_node import Harness, pod
from pathlib import Path

async def main():
    harness = Harness(Path(sys.argv[1]))
    harness.node.run(pod("a", env={{"STUB_CHILD": sys.argv[2]}}))
    await harness.until(lambda: harness.ready("a"))
    print((await harness.ask("a"))["pid"], flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_parent(tmp_path: Path, number: signal.Signals) -> None:
    """Neither the container (PDEATHSIG) nor what it started (guardian)."""
    code = PARENT.format(path=[str(Path(__file__).parent)])
    command = [sys.executable, "-c", code, str(tmp_path / "node"), str(tmp_path / "child")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        container = int(parent.stdout.readline())
        child = int((tmp_path / "child").read_text())
        assert alive(container)
        assert alive(child)

        parent.send_signal(number)
        parent.wait(10)

        assert gone(container)
        assert gone(child)
    finally:
        with contextlib.suppress(ProcessLookupError):
            parent.kill()
        parent.wait()
        if parent.stdout is not None:
            parent.stdout.close()
