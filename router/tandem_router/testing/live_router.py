"""A router on a real port, over workers and providers that have no model, in a thread.

For whatever speaks HTTP and cannot be handed an ASGI application: other programs, other languages.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import uvicorn

from tandem_router.api.app import RouterApp
from tandem_router.http.server import Listener, ServerLimits

T = TypeVar("T")


class _Server(uvicorn.Server):
    """In a thread no signal arrives: the thread's owner ends it."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class LiveRouter:
    """The loop, its thread and what runs in it; `url` ends before /v1."""

    def __init__(self, limits: ServerLimits | None = None) -> None:
        self.url = ""
        self.app: RouterApp | None = None
        self._limits = limits or ServerLimits()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: _Server | None = None
        self._serving: Any = None
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """In the router's loop; its result here."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def start(self, make_app: Callable[[], Coroutine[Any, Any, RouterApp]]) -> None:
        self.run(self._start(make_app))

    async def _start(self, make_app: Callable[[], Coroutine[Any, Any, RouterApp]]) -> None:
        self.app = await make_app()
        config = uvicorn.Config(
            self.app,
            host="127.0.0.1",
            port=0,
            http=Listener(self._limits).protocol(),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config)
        self._serving = asyncio.ensure_future(self._server.serve())
        await self._server.ready.wait()
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        async def end() -> None:
            if self._server is not None:
                self._server.should_exit = True
                await self._serving

        self.run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        if not self._thread.is_alive():
            self._loop.close()


@contextmanager
def live_router(
    make_app: Callable[[], Coroutine[Any, Any, RouterApp]], limits: ServerLimits | None = None
) -> Iterator[LiveRouter]:
    """make_app runs in the router's loop, with whatever it starts beside it."""
    router = LiveRouter(limits)
    try:
        router.start(make_app)
        yield router
    finally:
        router.stop()
