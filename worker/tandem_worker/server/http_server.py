"""The listener around an ASGI application: bound before the model loads, closed after it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from tandem_worker.errors import WorkerError
from tandem_worker.server.connections import Strangers


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        WorkerError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise WorkerError(
            f"cannot listen on {url_of(host, port).removeprefix('http://')}: {error.strerror}; "
            "choose another --host or --port, or end the process that holds it"
        ) from error
    # Accepted connections inherit it. asyncio sets it only on sockets whose protocol number is
    # spelled out, which create_server leaves at 0; without it a token waits for the router's
    # delayed acknowledgement, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(host: str, port: int) -> str:
    """``http://HOST:PORT``, an IPv6 address in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: draining is the worker's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves an ASGI application on a listening socket.

    Args:
        app: An ASGI application.
        listener: From :func:`listen`; closed by :meth:`stop`.
        strangers: What connections may hold.
    """

    def __init__(
        self, app: Any, listener: socket.socket, strangers: Strangers | None = None
    ) -> None:
        self._listener = listener
        settings = uvicorn.Config(
            app,
            http=(strangers or Strangers()).protocol,  # type: ignore[arg-type]
            ws="none",
            proxy_headers=False,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=75,
            server_header=False,
            date_header=False,
            log_config=None,
        )
        settings.load()
        self._server = _Server(settings)
        self._server.lifespan = settings.lifespan_class(settings)
        self._serving: asyncio.Task[None] | None = None

    @property
    def sockets(self) -> list[socket.socket]:
        """The accepted connections' sockets."""
        connections = self._server.server_state.connections
        transports = [connection.transport for connection in connections]
        return [transport.get_extra_info("socket") for transport in transports]

    async def start(self) -> None:
        """Accept connections from now on."""
        await self._server.startup(sockets=[self._listener])

        async def serve() -> None:
            await self._server.main_loop()
            await self._server.shutdown()

        self._serving = asyncio.create_task(serve())

    async def stop(self, *, force: bool = False) -> None:
        """Close everything; ``force`` does not wait for running requests."""
        if self._serving is None:
            self._listener.close()
            return
        self._server.should_exit = True
        self._server.force_exit = force
        await self._serving
        self._listener.close()
