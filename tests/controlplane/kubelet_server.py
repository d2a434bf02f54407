"""The kubelet's HTTPS port: what the apiserver asks for `kubectl logs`, `exec` (and so `cp`) and
`port-forward`.

exec speaks WebSocket with the subprotocol v5.channel.k8s.io, which an apiserver of 1.36 passes
through to nodes that declare the feature ExtendWebSocketsToKubelet. SPDY, which older clients
use, is refused with a sentence. port-forward is SPDY all the same, inside a WebSocket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Callable

import httpx

import port_forward
from exec_websocket import WebSocket, WebSocketError, accept_head
from tandem_operator.node.container import LogSpan
from tandem_operator.node.node import Node, NotRunningError
from tandem_operator.node.process import Process
from tandem_operator.node.volumes import MountError
from tandem_operator.resources.base import Object

Find = Callable[[str, str], Object | None]
"""(namespace, name) -> the pod that runs here, or None."""

PORT = 10250
# What an apiserver looks for before it passes a WebSocket through to a node.
DECLARED_FEATURES = ["ExtendWebSocketsToKubelet"]
PROTOCOL = "v5.channel.k8s.io"
_STDIN, _STDOUT, _STDERR, _ERROR, _CLOSED = 0, 1, 2, 3, 255
_CHUNK_BYTES = 32 * 1024
_FOLLOW_S = 0.1


class _Refused(Exception):
    """A request that cannot be served; the text reaches the user of kubectl."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class KubeletServer:
    """Serves logs and commands of the pods of one node."""

    def __init__(self, node: Node, find: Find) -> None:
        self._node = node
        self._find = find

    async def start(self, address: str, context: ssl.SSLContext) -> asyncio.Server:
        """Listen on the kubelet's port of the node's address."""
        return await asyncio.start_server(
            self._serve, address, PORT, ssl=context, reuse_address=True
        )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            pairs = (line.partition(":") for line in lines[1:] if line)
            headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
            url = httpx.URL("https://node" + lines[0].split(" ", 2)[1])
            try:
                await self._answer(url, headers, reader, writer)
            except _Refused as refusal:
                text = str(refusal).encode()
                head = f"HTTP/1.1 {refusal.status} Refused\r\ncontent-type: text/plain\r\n"
                head += f"content-length: {len(text)}\r\nconnection: close\r\n\r\n"
                writer.write(head.encode() + text)
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError, WebSocketError):
            return
        finally:
            with contextlib.suppress(OSError, ssl.SSLError):
                await writer.drain()
                writer.close()

    async def _answer(
        self,
        url: httpx.URL,
        headers: dict[str, str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        verb, *names = url.path.strip("/").split("/")
        forwards = verb == "portForward" and len(names) == 2
        if not forwards and (verb not in ("containerLogs", "exec") or len(names) != 3):
            raise _Refused(404, f"this node serves logs, exec and port-forward, not {verb!r}")
        namespace, name, container = [*names, ""][:3]
        pod = self._find(namespace, name)
        if pod is None:
            raise _Refused(404, f"pod {name!r} is not on this node")
        uid = str(pod["metadata"]["uid"])
        if forwards:
            _check_upgrade(headers, port_forward.PROTOCOL)
            writer.write(accept_head(headers, port_forward.PROTOCOL))
            address = str(pod.get("status", {}).get("podIP", ""))
            await port_forward.PortForward(WebSocket(reader, writer), address).run()
        elif verb == "containerLogs":
            await self._logs(uid, name, container, url.params, writer)
        else:
            await self._exec(uid, container, url.params, headers, reader, writer)

    # -- logs -------------------------------------------------------------------------------

    async def _logs(
        self,
        uid: str,
        name: str,
        container: str,
        parameters: httpx.QueryParams,
        writer: asyncio.StreamWriter,
    ) -> None:
        for option in ("sinceSeconds", "sinceTime", "timestamps"):
            if parameters.get(option, "false") != "false":
                raise _Refused(400, f"logs of this node carry no times; leave out {option}")
        previous = _flag(parameters, "previous")
        span = self._node.log_span(uid, container, previous=previous)
        if span is None:
            which = "previous terminated " if previous else ""
            raise _Refused(400, f"{which}container {container!r} in pod {name!r} not found")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n")
        data = _read(span, span.start)
        position = span.start + len(data)
        if "tailLines" in parameters:
            lines = data.splitlines(keepends=True)
            data = b"".join(lines[max(0, len(lines) - int(parameters["tailLines"])) :])
        if "limitBytes" in parameters:
            data = data[: int(parameters["limitBytes"])]
        writer.write(data)
        await writer.drain()
        if _flag(parameters, "follow") and not previous:
            await self._follow(uid, container, span, position, writer)

    async def _follow(
        self, uid: str, container: str, span: LogSpan, position: int, writer: asyncio.StreamWriter
    ) -> None:
        """Write what is appended until this run of the container has ended."""
        while True:
            now = self._node.log_span(uid, container)
            ended = now is None or now.start != span.start or now.end is not None
            data = _read(span, position)
            position += len(data)
            if data:
                writer.write(data)
                await writer.drain()
            if ended or writer.is_closing():
                return
            await asyncio.sleep(_FOLLOW_S)

    # -- exec -------------------------------------------------------------------------------

    async def _exec(
        self,
        uid: str,
        container: str,
        parameters: httpx.QueryParams,
        headers: dict[str, str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        if _flag(parameters, "tty"):
            raise _Refused(400, "this node gives commands no terminal; leave out -t")
        _check_upgrade(headers, PROTOCOL)
        try:
            process = await self._node.exec(uid, container, parameters.get_list("command"))
        except NotRunningError as error:
            raise _Refused(404, str(error)) from error
        except (OSError, MountError) as error:
            raise _Refused(500, f"the command cannot be started: {error}") from error
        try:
            writer.write(accept_head(headers, PROTOCOL))
            await self._attach(WebSocket(reader, writer), process, parameters)
        finally:
            process.kill_group()
            await process.wait()

    async def _attach(
        self, socket: WebSocket, process: Process, parameters: httpx.QueryParams
    ) -> None:
        """Pass bytes both ways until the command or the client ends."""
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise ValueError("the process has no pipes")
        if not _flag(parameters, "input"):
            process.stdin.close()
        output = asyncio.gather(
            _pump(process.stdout, socket, _STDOUT), _pump(process.stderr, socket, _STDERR)
        )
        code = asyncio.create_task(process.wait())
        client = asyncio.create_task(_take_input(socket, process.stdin))
        try:
            await asyncio.wait({code, client}, return_when=asyncio.FIRST_COMPLETED)
            if not code.done():
                client.result()
                return
            await output
            await socket.send(bytes([_ERROR]) + json.dumps(exit_status(code.result())).encode())
            await socket.close()
        finally:
            for task in (output, client):
                task.cancel()
            process.kill_group()
            await asyncio.gather(output, client, code, return_exceptions=True)


def _check_upgrade(headers: dict[str, str], protocol: str) -> None:
    offered = [p.strip() for p in headers.get("sec-websocket-protocol", "").split(",")]
    if headers.get("upgrade", "").lower() != "websocket" or protocol not in offered:
        raise _Refused(
            400, f"this node speaks WebSocket with {protocol}; use a kubectl of 1.31 or later"
        )


def _flag(parameters: httpx.QueryParams, name: str) -> bool:
    return parameters.get(name, "") in ("true", "1")


def _read(span: LogSpan, position: int) -> bytes:
    if not span.path.exists():
        return b""
    with span.path.open("rb") as log:
        log.seek(position)
        return log.read() if span.end is None else log.read(max(0, span.end - position))


async def _pump(pipe: asyncio.StreamReader, socket: WebSocket, channel: int) -> None:
    while data := await pipe.read(_CHUNK_BYTES):
        await socket.send(bytes([channel]) + data)


async def _take_input(socket: WebSocket, pipe: asyncio.StreamWriter) -> None:
    """Feed the command's standard input until the client goes away."""
    while (message := await socket.receive()) is not None:
        if message[:1] == bytes([_STDIN]):
            with contextlib.suppress(ConnectionError):  # the command need not read it
                pipe.write(message[1:])
                await pipe.drain()
        elif message == bytes([_CLOSED, _STDIN]):
            pipe.close()


def exit_status(code: int) -> Object:
    """A command's end as the metav1.Status that kubectl reads; negative codes are signals."""
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    number = code if code > 0 else 128 - code
    return {
        "metadata": {},
        "status": "Failure",
        "reason": "NonZeroExitCode",
        "message": f"command terminated with non-zero exit code: exit status {number}",
        "details": {"causes": [{"reason": "ExitCode", "message": str(number)}]},
    }
