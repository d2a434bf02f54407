"""The node: real processes with restarts, back-off, volumes, graceful and forced ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from node_harness import Harness, alive, gone, pod, running

HERE = Path(__file__).parent


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    async with running(tmp_path / "node") as harness:
        yield harness


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
    harness.lookup_error = RuntimeError("the apiserver is away")
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
    code = PARENT.format(path=[str(HERE), str(HERE.parent / "support")])
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
