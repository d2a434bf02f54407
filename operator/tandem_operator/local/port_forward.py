"""Gives a Router one address on this machine; connections go on to its ready pods."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import Callable

CHUNK_BYTES = 64 * 1024
WAIT_FOR_POD_S = 15.0


class PortInUseError(Exception):
    """The address for the endpoint is taken."""


class Forwarder:
    """Listens on host:port; targets() names the ready pods as (host, port)."""

    def __init__(self, host: str, port: int, targets: Callable[[], list[tuple[str, int]]]) -> None:
        self.host = host
        self.port = port
        self._targets = targets
        self._turn = itertools.count()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The base URL for clients."""
        return f"http://{self.host}:{self.port}"

    async def start(self, *, try_next: int = 0) -> None:
        """Begin to listen; try up to try_next higher ports when the first is taken.

        Raises PortInUseError when none is free.
        """
        first = self.port
        for port in range(first, first + try_next + 1):
            try:
                self._server = await asyncio.start_server(self._accept, self.host, port)
            except PermissionError as error:
                raise PortInUseError(
                    f"port {port} needs a right that you do not have; give --port 8000 or above"
                ) from error
            except OSError:
                continue
            self.port = self._server.sockets[0].getsockname()[1]
            return
        raise PortInUseError(
            f"port {first} on {self.host} is in use; stop what listens there or give --port"
        )

    async def close(self) -> None:
        """Stop listening and end all connections."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)
        try:
            upstream = await self._connect()
            if upstream is None:
                writer.write(_no_router())
                await writer.drain()
                return
            up_reader, up_writer = upstream
            for w in (writer, up_writer):
                w.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                async with asyncio.TaskGroup() as group:
                    back = group.create_task(_copy(up_reader, writer))
                    forth = group.create_task(_copy(reader, up_writer))
                    # Either end closing for good ends the connection.
                    back.add_done_callback(lambda _: forth.cancel())
            finally:
                up_writer.close()
        except (OSError, asyncio.CancelledError):
            return
        finally:
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        deadline = asyncio.get_running_loop().time() + WAIT_FOR_POD_S
        while True:
            targets = self._targets()
            offset = next(self._turn)
            for i in range(len(targets)):
                host, port = targets[(offset + i) % len(targets)]
                with contextlib.suppress(OSError, TimeoutError):
                    return await asyncio.wait_for(asyncio.open_connection(host, port), 2.0)
            if asyncio.get_running_loop().time() > deadline:
                return None
            await asyncio.sleep(0.1)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    except OSError:
        return
    finally:
        with contextlib.suppress(OSError, RuntimeError):
            if writer.can_write_eof():
                writer.write_eof()


def _no_router() -> bytes:
    error = {
        "error": {
            "message": "no router is ready; see `tandem get`",
            "type": "service_unavailable",
            "param": None,
            "code": "router_not_ready",
        }
    }
    body = json.dumps(error).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Retry-After: 1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
