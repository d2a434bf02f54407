"""A bad day between a client and a kube-apiserver: an HTTP proxy that injects faults.

It speaks plain HTTP to its client and mutual TLS to the apiserver, notes every write that passed
and what became of it, and while `Faults.rate` is above zero refuses requests, breaks connections
before and after the request took effect, delays answers, and cuts, repeats and drops the events
of watches. With rate 0 it only takes notes.
"""

from __future__ import annotations

import asyncio
import collections
import json
import random
import ssl
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

# Hop by hop, or said anew by the proxy.
DROPPED_HEADERS = frozenset(
    {"host", "connection", "content-length", "transfer-encoding", "content-encoding"}
)
ON_WRITES = ("409", "422", "429", "500", "503", "reset", "lost", "slow")
ON_READS = ("429", "500", "503", "reset", "lost", "slow")
ON_WATCHES = ("410", "gone event", "429", "503", "reset")
ON_EVENTS = ("cut", "repeat", "drop", "late")


@dataclass
class Faults:
    """Draws a fault for each request and each watch event, and counts what it drew.

    Args:
        seed: of the draws.
        rate: probability that a request, or an event of a watch, meets a fault.
    """

    seed: int
    rate: float = 0.0
    counts: collections.Counter[str] = field(default_factory=collections.Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def draw(self, kinds: tuple[str, ...]) -> str | None:
        """One of the kinds, or None for a good one."""
        if self._random.random() >= self.rate:
            return None
        kind = self._random.choice(kinds)
        self.counts[kind] += 1
        return kind

    def delay_s(self) -> float:
        return self._random.uniform(0.05, 0.6)


@dataclass(frozen=True)
class Write:
    """A request that changes something, as it came back from the apiserver."""

    at: float  # monotonic seconds, when the apiserver had answered
    began: float  # when its head arrived at the proxy
    by: str
    method: str
    path: str
    status: int


class ApiProxy:
    """One way to the apiserver; several may share `faults` and `writes`.

    Args:
        name: who uses it, the author in `writes`.
        upstream: https://ADDRESS:PORT of the apiserver.
        tls: with the client certificate to use.
    """

    def __init__(
        self, name: str, upstream: str, tls: ssl.SSLContext, faults: Faults, writes: list[Write]
    ) -> None:
        self.name = name
        self.faults = faults
        self.writes = writes
        self.url = ""
        self.requests: collections.Counter[str] = collections.Counter()
        self._upstream = upstream
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.ServerRunner | None = None

    async def start(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        connector = aiohttp.TCPConnector(limit=0, ssl=self._tls)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False
        )
        server = web.Server(self._answer, access_log=None)
        self._runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{port}"

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        began = time.monotonic()
        self.requests[request.path] += 1
        body = await request.read()
        watching = request.query.get("watch") in ("true", "1")
        writing = request.method not in ("GET", "HEAD")
        kinds = ON_WATCHES if watching else ON_WRITES if writing else ON_READS
        fault = self.faults.draw(kinds)
        if fault is not None and fault.isdigit():
            return _refusal(int(fault))
        if fault == "gone event":
            event = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Gone"}}
            return web.Response(body=json.dumps(event).encode() + b"\n")
        if fault == "reset":
            return _break(request)
        if fault == "slow":
            await asyncio.sleep(self.faults.delay_s())
        headers = {k: v for k, v in request.headers.items() if k.lower() not in DROPPED_HEADERS}
        headers["Accept-Encoding"] = "identity"
        if self._session is None or self._session.closed:
            return _break(request)
        try:
            async with self._session.request(
                request.method,
                self._upstream + request.raw_path,
                data=body or None,
                headers=headers,
            ) as reply:
                if watching and reply.status == 200:
                    return await self._relay(request, reply)
                data = await reply.read()
                if writing:
                    self.writes.append(
                        Write(
                            time.monotonic(),
                            began,
                            self.name,
                            request.method,
                            request.path,
                            reply.status,
                        )
                    )
                if fault == "lost":
                    return _break(request)
                kept = {k: v for k, v in reply.headers.items() if k.lower() not in DROPPED_HEADERS}
                return web.Response(status=reply.status, body=data, headers=kept)
        except aiohttp.ClientError:
            return _break(request)

    async def _relay(
        self, request: web.BaseRequest, reply: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        tail = b""
        async for chunk in reply.content.iter_any():
            *lines, tail = (tail + chunk).split(b"\n")
            for line in lines:
                fault = self.faults.draw(ON_EVENTS)
                if fault == "cut":
                    await response.write(line[: len(line) // 2])
                    return _break(request)
                if fault == "drop":
                    continue
                if fault == "late":
                    await asyncio.sleep(self.faults.delay_s())
                await response.write((line + b"\n") * (2 if fault == "repeat" else 1))
        await response.write_eof()
        return response


def _refusal(status: int) -> web.Response:
    body: dict[str, Any] = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "message": "injected by the proxy",
        "code": status,
    }
    headers = {"Retry-After": "1"} if status == 429 else {}
    return web.json_response(body, status=status, headers=headers)


def _break(request: web.BaseRequest) -> web.Response:
    """Reset the connection; what is returned goes nowhere."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
