"""A day of random faults in ten minutes: nothing lost, wrong, unbooked or shown; else status 1.

usage: faults.py [--minutes 10] [--seed 1] [--rate 10] [--hurried] [--json FILE] [--keep FOLDER]

A router process of its own, two external tiers and a pool of three fake workers. Some tier is
always well; the others break in every way of `faulty_day/schedule.py`, keys rotate and settings are
pushed meanwhile. Every answer is known beforehand, and every provider keeps its own bill.
`--hurried` shortens the router's time-outs to a fraction, for days of seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import signal
import socket
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from faulty_day.books import PRICES, Verdict, judge
from faulty_day.clients import Asked, ask, drawn
from faulty_day.schedule import POOL, PROVIDERS, WORKERS, Episode, Push, day, pushes
from faulty_day.servers import Breakable, Provider, Worker

from tandem_router.api.api_keys import key_hash

ROUTER = "chat"
TENANTS = ("red", "blue")
PEER_TOKEN, KEY_SECRET = "peer-secret-of-the-day", "0123456789abcdef"
HURRIED: dict[str, Any] = {
    "wait_s": 12.0,
    "tier_wait_s": 0.3,
    "tier_patience_s": 2.0,
    "answer_s_per_token": 0.001,
    "stall_timeout_s": 6.0,
    "connect_timeout_s": 1.0,
    "dead_after_s": 5.0,
}


class Day:
    """The servers, the router, what breaks, and what was asked."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.seconds = args.minutes * 60.0
        self.rng = random.Random(f"{args.seed}/questions")
        self.providers = {
            name: Provider(tier=name, rng=random.Random(f"{args.seed}/{name}"))
            for name in PROVIDERS
        }
        self.workers = [
            Worker(served_model=POOL, rng=random.Random(f"{args.seed}/{number}"))
            for number in range(WORKERS)
        ]
        watch_s = 6.0 if args.hurried else 40.0
        pace = 0.2 if args.hurried else 1.0
        self.episodes = day(args.seed, self.seconds, watch_s, watch_s / 4.0, pace)
        self.pushes = pushes(args.seed, self.seconds, watch_s / 4.0)
        self.asked: list[Asked] = []
        self.sick: dict[str, list[tuple[float, float]]] = {name: [] for name in PRICES}
        self.ways = Counter[str]()
        self.failover = dict(HURRIED) if args.hurried else {}
        self._began = 0.0

    # -- the router ------------------------------------------------------------------------

    def url_of(self, tier: str) -> str:
        return f"{self.providers[tier].url}/v1"

    def config(self) -> dict[str, Any]:
        tiers: list[dict[str, Any]] = []
        for name, (usd_in, usd_out) in PRICES.items():
            tier: dict[str, Any] = {
                "name": name,
                "served_model": f"{name}-model",
                "usd_per_1m_input_tokens": usd_in,
                "usd_per_1m_output_tokens": usd_out,
            }
            if name != POOL:
                key = str(self.folder / f"{name}.key")
                tier |= {"kind": "external", "url": self.url_of(name), "api_key_file": key}
            tiers.append(tier)
        secret = KEY_SECRET.encode()
        tenants = [{"name": t, "key_hashes": [key_hash(secret, f"key-of-{t}")]} for t in TENANTS]
        return {
            "name": ROUTER,
            "tiers": tiers,
            "fallback_tier": "full",
            "tenants": tenants,
            "budget": {"usd_per_hour": 1000.0},
            "store": {"type": "sqlite"},
            "failover": self.failover,
            "outward": {"plain_http_keys": True},
        }

    async def start(self) -> None:
        for server in (*self.providers.values(), *self.workers):
            await server.start()
        for name in PROVIDERS:
            self.rotate(name)
        files = {"peer": PEER_TOKEN, "secret": KEY_SECRET}
        for name, text in files.items():
            (self.folder / name).write_text(text)
        table = {"tiers": {POOL: {"unified": [worker.url for worker in self.workers]}}}
        (self.folder / "endpoints.json").write_text(json.dumps(table))
        (self.folder / "router.json").write_text(json.dumps(self.config()))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = (self.folder / "router.log").open("wb")
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tandem_router", "--config", str(self.folder / "router.json")),
            *("--endpoints", str(self.folder / "endpoints.json"), "--port", str(port)),
            *("--peer-token-file", str(self.folder / "peer"), "--host", "127.0.0.1"),
            *("--key-secret-file", str(self.folder / "secret")),
            *("--store-file", str(self.folder / "store.db")),
            stderr=self.log,
        )
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=40)
        self.client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=180.0, limits=limits, trust_env=False
        )
        async with asyncio.timeout(60):
            while True:
                try:
                    if (await self.client.get("/ready")).status_code == 200:
                        return
                except httpx.HTTPError:
                    pass
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        await self.client.aclose()
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        await self.process.wait()
        for server in (*self.providers.values(), *self.workers):
            server.over.set()
            await server.recover()
            await server.stop()
        self.log.close()

    def rotate(self, tier: str) -> None:
        """Another key; the provider takes no older one from now on."""
        key = f"sk-live-{secrets.token_hex(6)}"
        self.providers[tier].keys = {key}
        path = self.folder / f"{tier}.key"
        path.with_suffix(".new").write_text(key)
        path.with_suffix(".new").rename(path)

    async def push(self, live: dict[str, Any]) -> None:
        headers = {"x-tandem-peer-token": PEER_TOKEN}
        reply = await self.client.put("/admin/settings", json=live, headers=headers)
        reply.raise_for_status()

    # -- what breaks ------------------------------------------------------------------------

    async def break_all(self) -> None:
        """Every episode and every push at its time."""
        await asyncio.gather(
            *(self._episode(each) for each in self.episodes),
            *(self._push(each) for each in self.pushes),
        )

    async def _until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, self._began + at_s - time.monotonic()))

    async def _push(self, push: Push) -> None:
        await self._until(push.at_s)
        if push.what == "threshold":
            await self.push({"threshold": 2.0 * push.value - 1.0})
        elif push.what == "timeouts":
            attempts = 8 + int(push.value * 3)
            await self.push({"failover": {**self.failover, "max_attempts": attempts}})
        else:
            tenants = self.config()["tenants"]
            tenants[0]["requests_per_minute"] = 100_000.0 * (1.0 + push.value)
            await self.push({"tenants": tenants})

    async def _episode(self, episode: Episode) -> None:
        await self._until(episode.start_s)
        servers: list[Breakable] = [self.workers[number] for number in episode.workers]
        if episode.tier != POOL:
            servers = [self.providers[episode.tier]]
        began = time.monotonic()
        self.ways[f"{episode.tier} {episode.kind}"] += 1
        await self._break(episode, servers)
        await self._until(episode.end_s)
        await self._mend(episode, servers)
        if episode.disables:
            self.sick[episode.tier].append((began, time.monotonic()))

    async def _break(self, episode: Episode, servers: list[Breakable]) -> None:
        kind = episode.kind
        if kind == "key rotated":
            self.rotate(episode.tier)
        elif kind == "unknown host":
            await self.push({"tiers": {episode.tier: {"url": "http://no-such-host.invalid/v1"}}})
        for server in servers:
            if kind in ("refuse", "restart"):
                await server.stop()
            elif kind == "half-open":
                await server.go_deaf()
            elif kind == "drain":
                server.draining = True
            else:
                server.now = episode

    async def _mend(self, episode: Episode, servers: list[Breakable]) -> None:
        if episode.kind == "unknown host":
            await self.push({"tiers": {episode.tier: {"url": self.url_of(episode.tier)}}})
        for server in servers:
            server.now = None
            server.over.set()  # as a probe ends what hangs
            server.over = asyncio.Event()
            if isinstance(server, Worker):
                server.draining = False
            await server.recover()

    # -- who asks ---------------------------------------------------------------------------

    async def run(self) -> None:
        """The day; returns once all is answered."""
        self._began = time.monotonic()
        breaking = asyncio.create_task(self.break_all())
        under_way: list[asyncio.Task[None]] = []
        while (now := time.monotonic() - self._began) < self.seconds:
            one = drawn(self.rng, len(self.asked), ROUTER)
            self.asked.append(one)
            key = f"key-of-{self.rng.choice(TENANTS)}"
            under_way.append(asyncio.create_task(ask(self.client, one, key)))
            await asyncio.sleep(self.rng.expovariate(self.args.rate))
            if int(now) % 60 == 0 and len(self.asked) % 50 == 0:
                print(f"{now:.0f} s: {len(self.asked)} requests", file=sys.stderr, flush=True)
        await breaking
        await asyncio.gather(*under_way)

    def verdict(self) -> Verdict:
        """Once the router has ended: its store has the last word."""
        with sqlite3.connect(self.folder / "store.db") as store:
            rows = store.execute("SELECT request_id, body FROM decisions").fetchall()
            (spent,) = store.execute("SELECT SUM(cost_usd) FROM spend").fetchone()
        decisions = {name: json.loads(body) for name, body in rows}
        found = judge(self.asked, self.sick, list(self.providers.values()), decisions, spent or 0.0)
        for worker in self.workers:
            if worker.wrong_resumptions:
                found.wrong.append(f"{worker.wrong_resumptions} resumed with other tokens")
        return found


def report(day: Day, verdict: Verdict) -> dict[str, Any]:
    met: dict[str, dict[str, int]] = {}
    for way, number in sorted(day.ways.items()):
        met[way] = {"episodes": number, "met": 0}
    for provider in day.providers.values():
        for kind, number in provider.met.items():
            met[f"{provider.tier} {kind}"]["met"] += number
    for worker in day.workers:
        for kind, number in worker.met.items():
            met[f"{POOL} {kind}"]["met"] += number
    took = sorted(one.ended - one.started for one in day.asked)
    return {
        "seed": day.args.seed,
        "minutes": day.args.minutes,
        **verdict.counts,
        "by_tier": dict(Counter(one.tier or "none" for one in day.asked)),
        "slowest_s": round(took[-1], 2),
        "p50_s": round(took[len(took) // 2], 3),
        "due_usd": verdict.due_usd,
        "booked_usd": verdict.booked_usd,
        "lost": len(verdict.lost),
        "wrong": len(verdict.wrong),
        "unbooked_usd": verdict.unbooked_usd,
        "unbooked": len(verdict.unbooked),
        "leaked": len(verdict.leaked),
        "faults": met,
    }


async def run(args: argparse.Namespace, folder: Path) -> int:
    one = Day(args, folder)
    await one.start()
    try:
        await one.run()
    finally:
        await one.stop()
    verdict = one.verdict()
    told = report(one, verdict)
    if args.json is not None:
        args.json.write_text(json.dumps(told, indent=1) + "\n")
    for name, value in told.items():
        if name != "faults":
            print(f"{name:24} {value}")
    print(f"\n{'fault':32} {'episodes':>8} {'requests that met it':>20}")
    for way, numbers in told["faults"].items():
        print(f"{way:32} {numbers['episodes']:8} {numbers['met']:20}")
    for name in ("lost", "wrong", "unbooked", "leaked"):
        for sentence in getattr(verdict, name)[:20]:
            print(f"{name}: {sentence}")
    return 0 if verdict.clean else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the day is")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=10.0, help="requests a second")
    parser.add_argument(
        "--hurried", action="store_true", help="a fraction of the router's time-outs"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--keep", type=Path, help="folder for the router's log and store")
    args = parser.parse_args()
    if args.keep is not None:
        args.keep.mkdir(parents=True, exist_ok=True)
        return asyncio.run(run(args, args.keep))
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(run(args, Path(folder)))


if __name__ == "__main__":
    raise SystemExit(main())
