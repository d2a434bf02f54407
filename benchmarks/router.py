"""What the router costs per proxied request, beside bare proxies on aiohttp and httpx.

    python benchmarks/router.py [--requests 2000] [--concurrency 8] [--json FILE]

One canned upstream, one load generator, and one proxy at a time, each in its own process. CPU is
the proxy process's own user plus system time per request, so a busy machine slows the run but
hardly changes the number. Latency is what a client sees: first byte and last byte. The bare
proxies parse nothing, check nothing and choose nothing; they are the floor of their library.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NUM_CHUNKS = 64
HOST = "127.0.0.1"
PATH = "/v1/chat/completions"


def chunk(text: str, token_ids: list[int], finish: str | None = None) -> bytes:
    payload = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "bench",
        "choices": [
            {
                "index": 0,
                "delta": {"content": text},
                "logprobs": None,
                "finish_reason": finish,
                "token_ids": token_ids,
            }
        ],
    }
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def canned_stream() -> list[bytes]:
    usage = {"prompt_tokens": 20, "completion_tokens": NUM_CHUNKS, "total_tokens": 20 + NUM_CHUNKS}
    last = {"id": "x", "object": "chat.completion.chunk", "choices": [], "usage": usage}
    events = [chunk(" word", [100 + i]) for i in range(NUM_CHUNKS)]
    return [
        *events,
        chunk("", [], "stop") + b"data: " + json.dumps(last).encode() + b"\n\ndata: [DONE]\n\n",
    ]


WHOLE = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 64}}],
        "usage": {"prompt_tokens": 20, "completion_tokens": 64, "total_tokens": 84},
    }
).encode()
LOAD = json.dumps({"ready": True, "draining": False, "num_running": 1}).encode()
BODY = {
    "model": "bench",
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Which of these numbers is the largest: 17, 4, 99, 23? " * 4},
    ],
    "max_tokens": 128,
    "temperature": 0.7,
}


class CannedUpstream(asyncio.Protocol):
    """Answers without parsing more than it must, so that it is never the bottleneck."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line[15:])
        if len(rest) < length:
            return
        self.buffer = rest[length:]
        if b"/v1/load" in head:
            self.whole(LOAD)
        elif b'"stream"' in rest:
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                b"transfer-encoding: chunked\r\n\r\n"
            )
            self.stream(canned_stream())
        else:
            self.whole(WHOLE)

    def whole(self, body: bytes) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            % len(body)
            + body
        )

    def stream(self, events: list[bytes]) -> None:
        """One event per loop turn: tokens do not come in one piece in life either."""
        if self.transport.is_closing():
            return
        event = events[0]
        self.transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        if len(events) == 1:
            self.transport.write(b"0\r\n\r\n")
        else:
            asyncio.get_running_loop().call_later(0.001, self.stream, events[1:])


def run_upstream(port: int) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(CannedUpstream, HOST, port)
        await server.serve_forever()

    import uvloop

    uvloop.run(main())


def serve(app: Any, port: int) -> None:
    import uvicorn

    uvicorn.run(
        app,
        host=HOST,
        port=port,
        log_level="warning",
        access_log=False,
        http="httptools",
        ws="none",
    )


def run_tandem(port: int, upstream: str) -> None:
    from tandem_router.api.app import RouterApp
    from tandem_router.config import RouterConfig

    config = RouterConfig.model_validate(
        {
            "name": "bench",
            "tiers": [{"name": "only", "served_model": "model"}],
            "fallback_tier": "only",
        }
    )
    app = RouterApp(config, endpoints_path=Path(os.devnull))
    app.set_table({"only": {"unified": (upstream,)}})
    serve(app, port)


def run_aiohttp(port: int, upstream: str) -> None:
    import aiohttp
    import uvloop
    from aiohttp import web

    async def handle(request: web.Request) -> web.StreamResponse:
        session: aiohttp.ClientSession = request.app["session"]
        body = await request.read()
        async with session.post(upstream + request.path, data=body) as reply:
            response = web.StreamResponse(status=reply.status)
            response.content_type = reply.content_type
            if reply.content_length is not None:
                response.content_length = reply.content_length
            await response.prepare(request)
            async for part in reply.content.iter_any():
                await response.write(part)
            await response.write_eof()
            return response

    async def start(app: web.Application) -> None:
        app["session"] = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    uvloop.install()
    app = web.Application(client_max_size=2**24)
    app.on_startup.append(start)
    app.router.add_post("/{path:.*}", handle)
    web.run_app(app, host=HOST, port=port, print=None, access_log=None)


def run_httpx(port: int, upstream: str) -> None:
    import httpx

    client: httpx.AsyncClient | None = None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal client
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            return
        if client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            client = httpx.AsyncClient(limits=limits)
        body = (await receive())["body"]
        async with client.stream("POST", upstream + scope["path"], content=body) as reply:
            await send(
                {
                    "type": "http.response.start",
                    "status": reply.status_code,
                    "headers": [(b"content-type", reply.headers["content-type"].encode())],
                }
            )
            async for part in reply.aiter_raw():
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    serve(app, port)


PROXIES: dict[str, Callable[[int, str], None]] = {
    "tandem router": run_tandem,
    "bare aiohttp proxy": run_aiohttp,
    "bare httpx proxy": run_httpx,
}


def cpu_s(pid: int) -> float:
    """User plus system time of a process and its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Result:
    proxy: str
    kind: str
    cpu_ms_per_request: float | None
    ttft_ms_p50: float
    ttft_ms_p99: float
    e2e_ms_p50: float
    requests_per_s: float


async def measure(
    url: str, name: str, pid: int | None, stream: bool, num: int, concurrency: int
) -> Result:
    from tandem_router.http.client import UpstreamClient

    client = UpstreamClient()
    body = json.dumps({**BODY, "stream": True} if stream else BODY).encode()
    headers = [(b"content-type", b"application/json")]
    firsts: list[float] = []
    totals: list[float] = []
    remaining = 0

    async def worker() -> None:
        nonlocal remaining
        while remaining > 0:
            remaining -= 1
            start = time.perf_counter()
            reply = await client.request("POST", url + PATH, headers=headers, body=body)
            first = await reply.read_some()
            firsts.append(time.perf_counter() - start)
            rest = await reply.read_all()
            totals.append(time.perf_counter() - start)
            if reply.status != 200 or (stream and not (first + rest).endswith(b"[DONE]\n\n")):
                raise SystemExit(f"{name}: bad reply {reply.status}: {(first + rest)[-200:]!r}")

    async def burst(number: int) -> None:
        nonlocal remaining
        remaining = number
        await asyncio.gather(*(worker() for _ in range(concurrency)))

    await burst(max(concurrency, num // 10))
    firsts.clear()
    totals.clear()
    before = cpu_s(pid) if pid is not None else 0.0
    start = time.perf_counter()
    await burst(num)
    wall = time.perf_counter() - start
    used = cpu_s(pid) - before if pid is not None else None
    client.close()
    return Result(
        proxy=name,
        kind=f"stream of {NUM_CHUNKS} chunks" if stream else "whole reply",
        cpu_ms_per_request=used / num * 1000.0 if used is not None else None,
        ttft_ms_p50=statistics.median(firsts) * 1000.0,
        ttft_ms_p99=statistics.quantiles(firsts, n=100)[98] * 1000.0,
        e2e_ms_p50=statistics.median(totals) * 1000.0,
        requests_per_s=num / wall,
    )


async def wait_for(url: str) -> None:
    from tandem_router.errors import UpstreamError
    from tandem_router.http.client import UpstreamClient

    client = UpstreamClient()
    for _ in range(300):
        try:
            await client.get(url + "/", timeout_s=1.0)
            client.close()
            return
        except UpstreamError:
            await asyncio.sleep(0.1)
    raise SystemExit(f"{url} did not start within 30 s")


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=2000, help="whole replies per proxy")
    parser.add_argument("--streams", type=int, default=400, help="streams per proxy")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    args = parser.parse_args()

    spawn = multiprocessing.get_context("spawn")
    upstream_port = free_port()
    upstream = f"http://{HOST}:{upstream_port}"
    processes = [spawn.Process(target=run_upstream, args=(upstream_port,), daemon=True)]
    processes[0].start()
    results: list[Result] = []
    try:
        for name in ("no proxy", *PROXIES):
            url, pid = upstream, None
            if name in PROXIES:
                port = free_port()
                url = f"http://{HOST}:{port}"
                process = spawn.Process(target=PROXIES[name], args=(port, upstream), daemon=True)
                process.start()
                processes.append(process)
                pid = process.pid
            asyncio.run(wait_for(url))
            for stream, number in ((False, args.requests), (True, args.streams)):
                result = asyncio.run(measure(url, name, pid, stream, number, args.concurrency))
                results.append(result)
                cpu = result.cpu_ms_per_request
                print(
                    f"{name:20} {result.kind:20} "
                    f"cpu {'      -' if cpu is None else f'{cpu:7.3f}'} ms/request   "
                    f"first byte p50 {result.ttft_ms_p50:7.2f} p99 {result.ttft_ms_p99:7.2f} ms   "
                    f"{result.requests_per_s:8.1f} requests/s",
                    flush=True,
                )
            if pid is not None:
                processes[-1].terminate()
                processes[-1].join(5)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join(5)
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
