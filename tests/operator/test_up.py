"""Local mode as a whole, with stubs for workers and routers: the path from YAML to an endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from eventually import eventually_in_another_process
from tandem_operator.cli import main
from tandem_operator.local.cluster import ClusterError, LocalCluster
from tandem_operator.local.port_forward import Forwarder, PortInUseError
from tandem_operator.local.state_dir import RunDir
from tandem_operator.manifests import load_text
from tandem_operator.node.images import ImageTable
from tandem_operator.resources.base import Object
from tandem_router.predictor.training_job import prepare

STUB = Path(__file__).with_name("stub_server.py")
IMAGES = ImageTable(
    {
        "tandem/worker": (sys.executable, "-S", str(STUB)),
        "tandem/router": (sys.executable, "-S", str(STUB)),
    }
)

PAIR = """\
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {name: small}
spec:
  weights: {source: "file://WEIGHTS"}
  unified: {}
---
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {name: large}
spec:
  weights: {source: "file://WEIGHTS"}
  prefill: {}
  decode: {}
---
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {name: chat}
spec:
  tiers:
  - {name: small, modelRef: {name: small}}
  - {name: large, modelRef: {name: large}}
"""


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[LocalCluster]:
    rundir = RunDir("test", tmp_path / "run")
    async with LocalCluster(rundir, port=18_000, images=IMAGES) as cluster:
        yield cluster


async def apply(cluster: LocalCluster, folder: Path, text: str = PAIR) -> list[str]:
    return await cluster.apply_manifests(load_text(text.replace("WEIGHTS", str(folder))))


async def ask(url: str) -> Object:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    found: Object = json.loads(answer.partition(b"\r\n\r\n")[2])
    return found


def pods(cluster: LocalCluster) -> dict[str, int]:
    counts: dict[str, int] = {}
    for pod in cluster.store.find("Pod"):
        name = pod["metadata"]["ownerReferences"][0]["name"]
        counts[name] = counts.get(name, 0) + 1
    return counts


async def until(cluster: LocalCluster, condition: Any, timeout_s: float = 20.0) -> None:
    """Wait for a condition that a pass of the cluster makes true."""
    async with asyncio.timeout(timeout_s), cluster.changed:
        await cluster.changed.wait_for(condition)


async def test_yaml_becomes_an_endpoint_that_knows_its_workers(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    results = await apply(cluster, tmp_path)
    await cluster.wait_ready(30)

    answer = await ask(cluster.url("chat"))

    assert results == ["model/small created", "model/large created", "router/chat created"]
    assert pods(cluster) == {
        "small-unified": 1,
        "large-prefill": 1,
        "large-decode": 1,
        "chat-router": 1,
    }
    await until(cluster, lambda: cluster.all_ready())
    tiers = answer["endpoints"].get("tiers", {})
    assert set(tiers) == {"small", "large"}


async def test_scaling_deleting_and_applying_again_reach_the_processes(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    await apply(cluster, tmp_path)
    await cluster.wait_ready(30)

    cluster.scale("WorkerPool", "small-unified", 2)
    await until(cluster, lambda: pods(cluster)["small-unified"] == 2 and cluster.all_ready())

    before = {p["metadata"]["name"] for p in cluster.store.find("Pod")}
    changed = PAIR.replace("decode: {}", "decode: {}\n  engine: {maxNumSeqs: 8}")
    assert (await apply(cluster, tmp_path, changed))[1] == "model/large configured"
    await until(
        cluster,
        lambda: (
            not before & {n for n in _names(cluster) if n.startswith("large")}
            and cluster.all_ready()
        ),
    )

    assert await cluster.delete("Model", "small")
    await until(cluster, lambda: "small-unified" not in pods(cluster))
    assert not await cluster.delete("Model", "small")


def _names(cluster: LocalCluster) -> set[str]:
    return {p["metadata"]["name"] for p in cluster.store.find("Pod")}


async def test_a_killed_worker_comes_back(cluster: LocalCluster, tmp_path: Path) -> None:
    await apply(cluster, tmp_path)
    await cluster.wait_ready(30)
    (pod,) = [p for p in cluster.store.find("Pod") if "decode" in p["metadata"]["name"]]
    pid = (await ask(f"http://{pod['status']['podIP']}:{cluster.settings.worker_port}"))["pid"]

    os.kill(pid, signal.SIGKILL)
    await until(cluster, lambda: not cluster.all_ready())
    await cluster.wait_ready(20)

    (again,) = [p for p in cluster.store.find("Pod") if "decode" in p["metadata"]["name"]]
    assert again["metadata"]["name"] == pod["metadata"]["name"]
    assert again["status"]["containerStatuses"][0]["restartCount"] == 1


async def test_too_few_gpus_are_told(cluster: LocalCluster, tmp_path: Path) -> None:
    many = '{name: worker, resources: {limits: {nvidia.com/gpu: "64"}}}'
    patch = f"unified: {{podPatch: {{spec: {{containers: [{many}]}}}}}}"
    wanted = PAIR.replace("unified: {}", patch)
    await apply(cluster, tmp_path, wanted)

    with pytest.raises(TimeoutError, match=r"Insufficient nvidia\.com/gpu: 64 wanted"):
        await cluster.wait_ready(3)


async def test_scaling_out_of_bounds_is_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    await apply(cluster, tmp_path, PAIR.replace("unified: {}", "unified: {maxReplicas: 2}"))
    await until(cluster, lambda: cluster.store.read("WorkerPool", "default", "small-unified"))

    with pytest.raises(ClusterError, match="allows 0 to 2 workers, not 5"):
        cluster.scale("WorkerPool", "small-unified", 5)
    with pytest.raises(ClusterError, match="workerpool 'small-unified' allows 0 to 2"):
        cluster.scale("Model", "small", 5)
    with pytest.raises(ClusterError, match="a Service cannot be scaled; scale a workerpool"):
        cluster.scale("Service", cluster.store.find("Service")[0]["metadata"]["name"], 1)


async def test_the_endpoint_waits_for_a_router_and_then_says_so() -> None:
    class Quick(Forwarder):
        pass

    targets: list[tuple[str, int]] = []
    forwarder = Quick("127.0.0.1", 18_500, lambda: targets)
    await forwarder.start(try_next=50)
    try:
        with pytest.raises(PortInUseError, match="is in use"):
            await Forwarder("127.0.0.1", forwarder.port, list).start()

        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n{}")
            writer.close()

        asking = asyncio.create_task(ask(forwarder.url))
        await asyncio.sleep(0.2)
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        targets.append(server.sockets[0].getsockname()[:2])

        assert await asking == {}
        server.close()
    finally:
        await forwarder.close()


def test_training_runs_once_per_content_of_the_data(tmp_path: Path) -> None:
    data, calls = tmp_path / "data.jsonl", []
    readable = [0, 0, 1]

    def train(argv: list[str]) -> int:
        if argv[0] == "score":
            return readable.pop(0)
        calls.append(argv)
        Path(argv[-1]).mkdir()
        return 0

    data.write_text("1")
    assert prepare(data, tmp_path / "out", train) == 0
    assert prepare(data, tmp_path / "out", train) == 0
    assert prepare(data, tmp_path / "out", train) == 0
    assert len(calls) == 1
    assert prepare(data, tmp_path / "out", train) == 0
    assert len(calls) == 2, "one that cannot be read is trained anew"
    data.write_text("2")
    assert prepare(data, tmp_path / "out", train) == 0

    assert len(calls) == 3
    assert (tmp_path / "out" / "artifact").is_dir()
    assert prepare(data, tmp_path / "other", lambda _: 3) == 3


# The command, as a process ------------------------------------------------------------------


class Up:
    """`tandem up` in a subprocess with its own run folder."""

    def __init__(self, folder: Path, *extra: str) -> None:
        (folder / "pair.yaml").write_text(PAIR.replace("WEIGHTS", str(folder)))
        self.env = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "XDG_RUNTIME_DIR": ""}
        self.run_dir = folder / "cache" / "tandem" / "run"
        stub = f"{sys.executable} -S {STUB}"
        images = [f"--image={name}={stub}" for name in ("tandem/worker", "tandem/router")]
        command = [sys.executable, "-m", "tandem_operator.cli", "up", str(folder / "pair.yaml")]
        self.process = subprocess.Popen(
            [*command, *images, *extra],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""

    def read_until(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(self.output)

    def tandem(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Another tandem command that finds this run; in this process, which is faster."""
        out, err = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            for name in ("XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
                patch.setenv(name, self.env[name])
            status = main(list(args))
        return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())

    def children(self) -> list[int]:
        """Processes that carry this run's folder in their arguments or environment."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if str(self.run_dir).encode() in line:
                    found.append(int(entry.name))
        return found


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    up = Up(tmp_path)
    yield up
    if up.process.poll() is None:
        up.process.kill()
    up.process.wait(10)
    if up.process.stdout is not None:
        up.process.stdout.close()


def _nothing_is_left(up: Up) -> None:
    eventually_in_another_process(
        lambda: not up.children() and not list(up.run_dir.iterdir()), within_s=10.0
    )


def test_the_commands_talk_to_the_running_cluster_and_ctrl_c_leaves_nothing(up: Up) -> None:
    up.read_until("curl ")
    assert "ready after" in up.output
    assert len(up.children()) >= 4

    table = up.tandem("get").stdout
    assert "model/large   True    Serving" in table
    assert "router/chat" in table
    as_json = json.loads(up.tandem("get", "model", "large", "-o", "json").stdout)
    assert as_json["status"]["ready"] == "2/2"
    assert "stub: serving as" in up.tandem("logs", "large-decode").stdout
    assert "KVLinkReady" in up.tandem("describe", "model", "large").stdout
    described = json.loads(up.tandem("describe", "model", "large", "--json").stdout)
    assert described["object"]["status"]["ready"] == "2/2"
    assert len(described["pods"]) == 2
    assert described["events"]
    assert "Serving" in up.tandem("events").stdout
    scaled = up.tandem("scale", "workerpool/small-unified", "--replicas", "2")
    assert scaled.stdout == "workerpool/small-unified scaled\n"
    by_model = up.tandem("scale", "model/small", "--replicas", "1")
    assert by_model.stdout == "workerpool/small-unified scaled\n"
    which = up.tandem("scale", "model/large", "--replicas", "3")
    assert "  tandem scale workerpool large-decode --replicas 3" in which.stderr
    pools = up.tandem("scale", "workerpool", "small", "--replicas", "2")
    assert "workerpool 'small' not found; there are: " in pools.stderr
    assert "Model 'small' has small-unified" in pools.stderr
    both = json.loads(up.tandem("get", "models,routers", "--json").stdout)["items"]
    assert {o["kind"] for o in both} == {"Model", "Router"}
    unknown = up.tandem("get", "modles")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr == "tandem get: unknown kind 'modles'; did you mean models?\n"
    missing = up.tandem("logs", "zebra")
    assert "no pod 'zebra'; running: " in missing.stderr
    deleted = up.tandem("delete", "router", "chat")
    assert deleted.stdout == "router/chat deleted\n"

    up.process.send_signal(signal.SIGINT)

    assert up.process.wait(20) == 0
    _nothing_is_left(up)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_cluster_leaves_nothing(up: Up, number: signal.Signals) -> None:
    up.read_until("curl ")

    up.process.send_signal(number)
    up.process.wait(20)

    _nothing_is_left(up)
    assert "start one with `tandem up FILE`" in up.tandem("get").stderr


def test_a_second_cluster_gets_its_own_port(tmp_path: Path, up: Up) -> None:
    second = Up(tmp_path, "--once", "--timeout", "60")
    up.read_until("curl ")
    second.read_until("curl ")

    assert second.process.wait(30) == 0
    urls = {
        line.split("chat: ")[1]
        for u in (up, second)
        for line in u.output.splitlines()
        if line.startswith("chat: ")
    }
    assert len(urls) == 2
    if second.process.stdout is not None:
        second.process.stdout.close()


# Without a cluster --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["get"], "no cluster is running; start one with `tandem up FILE`"),
        (["up", "missing.yaml"], "no such file or folder"),
        (["apply"], "name a file or folder with YAML"),
        (["scale", "workerpool", "--replicas", "1"], "say what to scale"),
        (["delete"], "say what to delete"),
    ],
)
def test_failures_are_sentences(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)

    status = main(arguments)

    assert status == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_bad_yaml_is_told_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(PAIR.replace("unified: {}", "unified: {replicas: two}"))

    assert main(["apply", "--dry-run", str(path)]) == 1

    error = capsys.readouterr().err
    assert f"{path}:6: Model/small: spec.unified.replicas: must be a whole number" in error


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        up = Up(tmp_path, "--port", str(port))
        output, _ = up.process.communicate(timeout=30)

    assert up.process.returncode == 1
    assert f"port {port} on 127.0.0.1 is in use" in output


def test_help_is_printed_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2

    assert "up" in capsys.readouterr().out
