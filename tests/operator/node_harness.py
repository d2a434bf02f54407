"""A node with an address range of its own, what it reported, and pods for it."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from eventually import eventually_in_another_process
from tandem_operator.node.images import ImageTable
from tandem_operator.node.node import Node, NodeSettings, loopback_addresses
from tandem_operator.resources.base import Object

STUB = Path(__file__).with_name("stub_server.py")
PORT = 8100  # of every stub, each at its pod's own address


def own_subnet() -> tuple[int, socket.socket]:
    """A second byte of 127.B.0.0/16 that no other test has, and the socket that claims it.

    `tandem up` uses 16 to 126. Addresses of pods begin at 127.B.0.2.
    """
    for second_byte in range(2, 16):
        claim = socket.socket()
        try:
            claim.bind((f"127.{second_byte}.0.1", PORT))
            claim.listen()
        except OSError:
            claim.close()
            continue
        return second_byte, claim
    raise RuntimeError(f"127.2.0.1 to 127.15.0.1 all have somebody at port {PORT}; end those")


class Harness:
    """A node, what it reported, and a way to wait for a state."""

    def __init__(self, folder: Path) -> None:
        self._subnet, self._claim = own_subnet()
        self.objects: dict[tuple[str, str], Object] = {}
        self.status: dict[str, Object] = {}
        self.history: list[Object] = []
        self.lookup_error: Exception | None = None
        self._changed = asyncio.Event()
        self.folder = folder
        self.node = Node(
            folder,
            addresses=loopback_addresses(self._subnet),
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
        if self.lookup_error is not None:
            raise self.lookup_error
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

    async def close(self) -> None:
        await self.node.close(2.0)
        self._claim.close()


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Harness]:
    """A harness that is closed at the end."""
    harness = Harness(folder)
    try:
        yield harness
    finally:
        await harness.close()


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
    try:
        return eventually_in_another_process(lambda: not alive(pid), timeout_s, 0.02)
    except AssertionError:
        return False
