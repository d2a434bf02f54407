"""The operator's port: /health and /ready for a kubelet, /metrics for Prometheus."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

# What is read at each scrape: name, kind, help, value.
Reading = tuple[str, str, str, Callable[[], float]]


class Readings(Collector):
    """A Prometheus collector of numbers that others keep."""

    def __init__(self, readings: Iterable[Reading]) -> None:
        self._readings = tuple(readings)

    def collect(self) -> Iterator[Metric]:
        """One family per reading."""
        for name, kind, text, value in self._readings:
            family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            yield family(name, text, value=value())


def exposition(readings: Iterable[Reading], *more: Collector) -> bytes:
    """What a scrape gets."""
    registry = CollectorRegistry()
    for collector in (Readings(readings), *more):
        registry.register(collector)
    return generate_latest(registry)


def probes(ready: Callable[[], bool], readings: Iterable[Reading], *more: Collector) -> Starlette:
    """The app that answers; ready says whether everything was listed."""

    async def health(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readiness(request: Request) -> Response:
        return PlainTextResponse("ok\n") if ready() else PlainTextResponse("syncing\n", 503)

    async def metrics(request: Request) -> Response:
        return Response(exposition(readings, *more), media_type=CONTENT_TYPE_LATEST)

    return Starlette(
        routes=[Route("/health", health), Route("/ready", readiness), Route("/metrics", metrics)]
    )


class ProbeServer(uvicorn.Server):
    """Answers on a port of its own until closed; signals stay with the operator."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
            )
        )
        self._task: asyncio.Task[None] | None = None
        self._open = asyncio.Event()
        self.address: tuple[str, int] = ("", 0)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the handlers of the process as they are."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.Server; tells `open` that the port answers."""
        await super().startup(sockets)
        self._open.set()

    async def open(self, host: str, port: int) -> None:
        """Begin to answer. Raises OSError when the port cannot be had."""
        sock = _listen(host, port)
        self.address = sock.getsockname()[:2]
        self._task = asyncio.create_task(self.serve(sockets=[sock]), name="probes")
        await self._open.wait()

    async def close(self) -> None:
        """Stop answering."""
        self.should_exit = True
        if self._task is not None:
            await self._task


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket: of one address, or of all of both families where the machine has both."""
    if host:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))
