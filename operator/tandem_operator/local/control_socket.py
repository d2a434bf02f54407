"""The unix socket through which other commands talk to a running local cluster: JSON lines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from tandem_operator.local.cluster import ClusterError, LocalCluster
from tandem_operator.local.port_forward import PortInUseError
from tandem_operator.resources.base import Object

MAX_LINE_BYTES = 16 * 2**20


class ControlServer:
    """Answers one request per connection; a watch answers until the client leaves."""

    def __init__(self, cluster: LocalCluster, path: Path) -> None:
        self._cluster = cluster
        self._path = path
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to listen; only this user may connect."""
        mask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(
                self._serve, str(self._path), limit=MAX_LINE_BYTES
            )
        finally:
            os.umask(mask)

    async def close(self) -> None:
        """Stop listening and end all connections."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            request = json.loads(await reader.readline())
            if request["op"] == "watch":
                await self._watch(request, reader, writer)
            else:
                await _send(writer, await self._answer(request))
        except (ClusterError, PortInUseError) as error:
            await _send(writer, {"error": str(error)})
        except (ValueError, KeyError, TypeError) as error:
            await _send(writer, {"error": f"the request was not understood: {error}"})
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _answer(self, request: Object) -> Object:
        cluster, store = self._cluster, self._cluster.store
        match request["op"]:
            case "list":
                return {"objects": [o for k in request["kinds"] for o in store.find(k)]}
            case "apply":
                return {"results": await cluster.apply(request["objects"])}
            case "delete":
                kind, name = request["kind"], request["name"]
                if not await cluster.delete(kind, name):
                    raise ClusterError(f"{kind.lower()} {name!r} not found; see `tandem get`")
                return {"results": [f"{kind.lower()}/{name} deleted"]}
            case "scale":
                what = cluster.scale(request["kind"], request["name"], int(request["replicas"]))
                return {"results": [f"{what} scaled"]}
            case "log":
                return {"path": self._log_path(request["name"], request.get("container"))}
            case "info":
                urls = {
                    r["metadata"]["name"]: cluster.url(r["metadata"]["name"])
                    for r in store.find("Router")
                }
                return {"name": cluster.rundir.name, "pid": os.getpid(), "endpoints": urls}
            case other:
                raise ClusterError(f"unknown request {other!r}")

    def _log_path(self, name: str, container: str | None) -> str:
        pods = self._cluster.store.find("Pod")
        exact = [p for p in pods if p["metadata"]["name"] == name]
        matching = exact or [p for p in pods if _belongs(p, name)]
        if not matching:
            running = ", ".join(p["metadata"]["name"] for p in pods) or "none"
            raise ClusterError(f"no pod {name!r}; running: {running}")
        pod = matching[-1]
        names = [
            c["name"] for c in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
        ]
        if container is not None and container not in names:
            raise ClusterError(
                f"pod {pod['metadata']['name']} has no container {container!r}; it has "
                f"{', '.join(names)}"
            )
        path = self._cluster.node.log_path(pod["metadata"]["uid"], container)
        if path is None:
            raise ClusterError(f"pod {pod['metadata']['name']} has not started yet")
        return str(path)

    async def _watch(
        self, request: Object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        gone = asyncio.create_task(reader.read(1))
        queue: asyncio.Queue[Object] = asyncio.Queue()

        async def pump(kind: str) -> None:
            async for event in self._cluster.store.watch(kind):
                queue.put_nowait({"type": event.type, "object": event.object})

        pumps = [asyncio.create_task(pump(kind)) for kind in request["kinds"]]
        try:
            while not gone.done():
                getter = asyncio.create_task(queue.get())
                await asyncio.wait({getter, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not getter.done():
                    getter.cancel()
                    return
                await _send(writer, getter.result())
        finally:
            for task in [*pumps, gone]:
                task.cancel()
            await asyncio.gather(*pumps, gone, return_exceptions=True)


def _belongs(pod: Object, name: str) -> bool:
    """Whether name is the pod's pool, Deployment, Model or Router."""
    labels = pod["metadata"].get("labels") or {}
    owners = [o["name"] for o in pod["metadata"].get("ownerReferences") or []]
    return name in (*owners, labels.get("tandem.dev/model"), labels.get("tandem.dev/router"))


async def _send(writer: asyncio.StreamWriter, answer: Object) -> None:
    with contextlib.suppress(OSError):
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()


class ControlError(Exception):
    """The running cluster refused or does not answer."""


def ask(path: str, request: Object, timeout_s: float = 30.0) -> Object:
    """Send one request to a running cluster and return its answer.

    Raises ControlError with the cluster's sentence when it refuses.
    """
    return next(stream(path, request, timeout_s))


def stream(path: str, request: Object, timeout_s: float | None = None) -> Iterator[Object]:
    """Send one request and yield its answers until the cluster ends.

    Raises ControlError as ask does.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout_s)
            sock.connect(path)
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as lines:
                for line in lines:
                    answer: Object = json.loads(line)
                    if "error" in answer:
                        raise ControlError(str(answer["error"]))
                    yield answer
    except OSError as error:
        raise ControlError(f"the cluster does not answer: {error}") from error
