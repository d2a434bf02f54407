"""Two tenants, one hostile: how much longer the other one waits; exit status 1 above twice.

usage: tenants.py [--seconds 20] [--json]

A router and a worker of four slots run in one process (its queue in turns, by our worker's own
counters), the tenants each in another. The polite one
asks once in 0.1 s and reads its streams; the hostile one does all at once what its key allows: it
floods, opens streams and leaves, sends bodies of nested brackets, packed and half ones. The ratio
is of 99th percentiles in the same run, polite alone and polite beside hostile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem_router.api.api_keys import key_hash
from tandem_router.api.app import RouterApp
from tandem_router.config import parse_config
from tandem_router.testing.fake_server import Seen
from tandem_router.testing.fake_worker import FakeWorker
from tandem_router.testing.live_router import live_router
from tandem_worker.scheduling.tenants import Turns

SECRET = b"0123456789abcdef"
SLOTS, SERVICE_S = 4, 0.1


@dataclass(eq=False)
class QueueingWorker(FakeWorker):
    """Four requests at a time, tenants in turns, as a worker's scheduler takes them."""

    _free: int = SLOTS
    _turns: Turns = field(default_factory=Turns)
    _queue: list[tuple[int, str, asyncio.Future[None]]] = field(default_factory=list)
    _count: int = 0

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        if seen.path == "/v1/load":
            return await super().answer(seen, writer)
        self._count += 1
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        tenant = seen.headers["x-tandem-tenant"]
        self._turns.came(tenant, SERVICE_S, time.monotonic())
        self._queue.append((self._count, tenant, turn))
        self._next()
        try:
            await turn
        finally:
            self._turns.left(tenant, None)
        try:
            await asyncio.sleep(SERVICE_S)
            return await super().answer(seen, writer)
        finally:
            self._free += 1
            self._next()

    def _next(self) -> None:
        while self._free and self._queue:
            first = min(self._queue, key=lambda each: (self._turns.used(each[1]), each[0]))
            self._queue.remove(first)
            if not first[2].cancelled():
                self._free -= 1
                self._turns.charge(first[1], SERVICE_S, 0.0)
                first[2].set_result(None)


async def make_app() -> RouterApp:
    worker = await QueueingWorker().start()
    tenants = [
        {"name": name, "key_hashes": [key_hash(SECRET, name)]} for name in ("polite", "hostile")
    ]
    tier = {"name": "large", "served_model": "large-model", "usd_per_1m_output_tokens": 1.0}
    config = {"name": "chat", "tiers": [tier], "fallback_tier": "large", "tenants": tenants}
    endpoints = Path(tempfile.mkdtemp()) / "endpoints.json"
    endpoints.write_text(json.dumps({"tiers": {"large": {"unified": [worker.url]}}}))
    return RouterApp(parse_config(json.dumps(config)), endpoints_path=endpoints, key_secret=SECRET)


def request(key: str, body: bytes, *more: str) -> bytes:
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"authorization: Bearer {key}",
        f"content-length: {len(body)}",
        "connection: close",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chat(**fields: Any) -> bytes:
    turn = {"role": "user", "content": "hello"}
    return json.dumps({"model": "chat", "messages": [turn], "max_tokens": 4, **fields}).encode()


async def send(port: int, data: bytes, read: bool = True) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        await writer.drain()
        return await reader.read() if read else await reader.read(1)
    finally:
        writer.close()


async def polite(port: int, seconds: float) -> list[float]:
    """Latencies, in seconds."""
    found: list[float] = []

    async def ask() -> None:
        began = time.perf_counter()
        reply = await send(port, request("polite", chat(stream=True)))
        if b"[DONE]" not in reply:
            raise SystemExit(f"the polite tenant was not answered: {reply[:300]!r}")
        found.append(time.perf_counter() - began)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(int(seconds / 0.1)):
            tasks.create_task(ask())
            await asyncio.sleep(0.1)
    return sorted(found)


async def hostile(port: int, seconds: float) -> None:
    ends_at = time.monotonic() + seconds
    nested = b'{"model":' + b"[" * 200_000
    kinds = [
        (request("hostile", chat()), True),
        (request("hostile", chat(stream=True), "x-tandem-priority: 0"), False),
        (request("hostile", nested), True),
        (request("hostile", gzip.compress(nested), "content-encoding: gzip"), True),
        (request("hostile", chat(n=16)), True),
        (request("hostile", chat())[:-5], False),
    ]

    async def attack(number: int) -> None:
        while time.monotonic() < ends_at:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(5):
                    await send(port, *kinds[number % len(kinds)])
            await asyncio.sleep(0.05)

    await asyncio.gather(*(attack(number) for number in range(120)))


def run(role: str, port: int, seconds: float) -> subprocess.Popen[str]:
    # An attacker has a machine of its own; here it must not take the cores of the others.
    nice = ["nice", "-n", "19"] if role == "hostile" else []
    command = [*nice, sys.executable, __file__, "--role", role, "--port", str(port)]
    return subprocess.Popen(
        [*command, "--seconds", str(seconds)], stdout=subprocess.PIPE, text=True
    )


def p99(process: subprocess.Popen[str]) -> float:
    out, _ = process.communicate(timeout=300)
    if process.returncode != 0:
        raise SystemExit("the polite tenant was not answered")
    found = json.loads(out)
    return float(found[int(0.99 * (len(found) - 1))])


def measure(seconds: float) -> dict[str, float]:
    with live_router(make_app) as router:
        port = int(router.url.rpartition(":")[2])
        alone = p99(run("polite", port, seconds))
        attacker = run("hostile", port, seconds + 2.0)
        time.sleep(1.0)
        beside = p99(run("polite", port, seconds))
        attacker.terminate()  # on a busy machine it may have much left to do
        attacker.wait(60)
    return {"alone_p99_s": alone, "beside_p99_s": beside, "ratio": beside / alone}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each half")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.role == "polite":
        print(json.dumps(asyncio.run(polite(args.port, args.seconds))))
        return 0
    if args.role == "hostile":
        asyncio.run(hostile(args.port, args.seconds))
        return 0
    found = measure(args.seconds)
    print(json.dumps(found) if args.json else found)
    return 0 if found["ratio"] <= 2.0 else 1


if __name__ == "__main__":
    sys.exit(main())
