"""What a request costs in the router, beside nginx and the Rust routers, in one run.

    python benchmarks/router.py [--rounds 3] [--only tandem,vllm-router] [--json] [--results DIR]
    python benchmarks/router.py --only tandem --before ANOTHER_CHECKOUT
    python benchmarks/router.py --memory 200000

On loopback: one fast fake upstream, one load generator, and one router at a time, alone on one core
(the upstream and the load have another where there is one). Per round, each router answers whole
replies and streams in slices that take turns; the figures are medians over the rounds.

* CPU per request: user and system time of the router's processes over whole replies;
* added p50: median time of whole replies, one at a time, less that of the upstream alone;
* CPU per streamed chunk: that time over streams, by the number of their chunks;
* added TTFT: median time to a stream's first byte, eight streams under way, less the upstream's.

CPU time hardly changes on a busy machine; latencies do, so compare them within one run only.
`--before` runs Tandem of another checkout (`git worktree add`) beside this one's, and tells the
ratios: the way to see what a change is worth.
`--memory N` sends N requests through Tandem alone and prints how its memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path

from proxying.load import BadReply, drive
from proxying.peers import ROOT, Peer, earlier, peers
from proxying.upstream import NUM_CHUNKS

UPSTREAM = Path(__file__).parent / "proxying" / "upstream.py"
HOST = "127.0.0.1"
OF_A_STREAM = NUM_CHUNKS + 1
AT_ONCE = 8
SLICES = 5
ALONE = "upstream alone"


@dataclass(frozen=True)
class Sizes:
    requests: int
    singles: int
    streams: int


def free_port() -> int:
    """The first of two neighbours that are free: routers give metrics on the second."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind((HOST, 0))
            port = int(one.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                two.bind((HOST, port + 1))
                return port


def processes_of(pid: int) -> list[int]:
    """The process and all its descendants."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def cpu_s(pid: int) -> float:
    """User plus system time, in nanoseconds' resolution where the kernel tells it."""
    total = 0.0
    for process in processes_of(pid):
        try:
            tasks = list(Path(f"/proc/{process}/task").iterdir())
            total += sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
        except (OSError, ValueError, IndexError):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


@contextlib.contextmanager
def running(command: list[str], core: int | None) -> Iterator[subprocess.Popen[bytes]]:
    """The process, on that core; ended afterwards with all that it started."""

    def pinned() -> None:
        os.setsid()
        if core is not None:
            os.sched_setaffinity(0, {core})

    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, preexec_fn=pinned, cwd=ROOT)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(5)
            if sys.exc_info()[0] is not None:
                said.seek(0)
                sys.stderr.write(said.read()[-4000:].decode(errors="replace"))


async def answering(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a request comes back whole."""
    last: Exception | None = None
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"{process.args!r} ended with {process.returncode}")
        try:
            await drive(port, False, 1, 1)
            return
        except (OSError, BadReply, TimeoutError) as error:
            last = error
            await asyncio.sleep(0.1)
    raise SystemExit(f"{process.args!r} does not answer within 60 s: {last}")


@dataclass
class Measured:
    """What a router's slices of one round add up to; pid None: the upstream alone."""

    pid: int | None
    port: int
    whole_s: float = 0.0  # CPU
    stream_s: float = 0.0
    num_whole: int = 0
    num_chunks: int = 0
    last_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)

    def _cpu_s(self) -> float:
        return cpu_s(self.pid) if self.pid is not None else 0.0

    async def slice(self, sizes: Sizes) -> None:
        before = self._cpu_s()
        await drive(self.port, False, sizes.requests, AT_ONCE)
        self.whole_s += self._cpu_s() - before
        self.num_whole += sizes.requests
        self.last_s += (await drive(self.port, False, sizes.singles, 1)).last_s
        before = self._cpu_s()
        self.first_s += (await drive(self.port, True, sizes.streams, AT_ONCE)).first_s
        self.stream_s += self._cpu_s() - before
        self.num_chunks += sizes.streams * OF_A_STREAM

    def figures(self, alone: Measured) -> dict[str, float]:
        """Microseconds."""
        return {
            "cpu_per_request": self.whole_s / self.num_whole * 1e6,
            "added_p50": (statistics.median(self.last_s) - statistics.median(alone.last_s)) * 1e6,
            "cpu_per_chunk": self.stream_s / self.num_chunks * 1e6,
            "added_ttft": (statistics.median(self.first_s) - statistics.median(alone.first_s))
            * 1e6,
        }


def compare(chosen: list[Peer], rounds: int, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Per router the medians over the rounds, latencies less those of the upstream alone.

    A round is made of slices in which every router has its turn, so that what else runs on the
    machine meets them all alike.
    """
    cores = sorted(os.sched_getaffinity(0))
    router_core, other_core = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
    if other_core is not None:
        os.sched_setaffinity(0, {other_core})
    upstream = free_port()
    seen: dict[str, list[dict[str, float]]] = {peer.name: [] for peer in chosen}
    part = Sizes(*(max(1, each // SLICES) for each in astuple(sizes)))
    with (
        running([sys.executable, str(UPSTREAM), str(upstream)], other_core) as origin,
        tempfile.TemporaryDirectory() as folder,
        contextlib.ExitStack() as stack,
    ):
        asyncio.run(answering(upstream, origin))
        ready: list[tuple[str, int | None, int]] = [(ALONE, None, upstream)]
        for peer in chosen:
            port, files = free_port(), Path(folder) / peer.name
            files.mkdir()
            command = peer.command(port, upstream, files)
            process = stack.enter_context(running(command, router_core))
            asyncio.run(answering(port, process))
            asyncio.run(Measured(None, port).slice(part))  # warm
            ready.append((peer.name, process.pid, port))
        for number in range(rounds):
            measured = {name: Measured(pid, port) for name, pid, port in ready}
            for _ in range(SLICES):
                for each in measured.values():
                    asyncio.run(each.slice(part))
            for name, rows in seen.items():
                figures = measured[name].figures(measured[ALONE])
                rows.append(figures)
                told = "  ".join(f"{key} {value:7.1f}" for key, value in figures.items())
                print(f"round {number + 1}  {name:14} {told}", file=sys.stderr, flush=True)
    return {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in seen.items()
    }


def ratios(figures: dict[str, dict[str, float]], other: str) -> dict[str, float] | None:
    ours, theirs = figures.get("tandem"), figures.get(other)
    if ours is None or theirs is None:
        return None
    return {name: ours[name] / theirs[name] for name in ours}


def memory(num: int) -> list[tuple[int, float]]:
    """(requests answered, MiB resident) of Tandem, ten times; one in ten is a stream."""
    upstream, port = free_port(), free_port()
    tandem = next(peer for peer in peers() if peer.name == "tandem")
    rows: list[tuple[int, float]] = []
    with (
        running([sys.executable, str(UPSTREAM), str(upstream), "4", "0.1"], None) as origin,
        tempfile.TemporaryDirectory() as folder,
        running(tandem.command(port, upstream, Path(folder)), None) as router,
    ):
        asyncio.run(answering(upstream, origin))
        asyncio.run(answering(port, router))
        for step in range(1, 11):
            for left in range(10):  # in parts: a part has two minutes
                part = max(1, num // 100)
                asyncio.run(drive(port, left == 0, part, 16))
            rows.append((step * 10 * max(1, num // 100), rss_mib(router.pid)))
            print(f"{rows[-1][0]:8d} requests  {rows[-1][1]:7.1f} MiB", file=sys.stderr, flush=True)
    return rows


def machine() -> str:
    model = platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    return f"{model}, {len(os.sched_getaffinity(0))} usable cores"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2000, help="whole replies a round")
    parser.add_argument("--singles", type=int, default=600, help="whole replies one at a time")
    parser.add_argument("--streams", type=int, default=120, help="streams a round")
    parser.add_argument("--only", help="routers to run, of nginx,vllm-router,sglang-router,tandem")
    parser.add_argument("--before", type=Path, help="a checkout whose Tandem is run, too")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--results", type=Path, help="folder to write router-<date>.json into")
    parser.add_argument("--memory", type=int, help="requests through Tandem alone, for its memory")
    args = parser.parse_args()

    about = {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "load_1min": os.getloadavg()[0],
    }
    if args.memory:
        rows = memory(args.memory)
        if args.json:
            print(json.dumps({**about, "rss_mib": dict(rows)}, indent=1))
        return 0
    chosen = peers()
    if args.only:
        names = args.only.split(",")
        chosen = [peer for peer in chosen if peer.name in names]
    if args.before:
        chosen.append(earlier(args.before.resolve()))
    sizes = Sizes(args.requests, args.singles, args.streams)
    figures = compare(chosen, args.rounds, sizes)
    result = {
        **about,
        "versions": {peer.name: peer.version for peer in chosen},
        "rounds": args.rounds,
        "sizes": asdict(sizes),
        "microseconds": figures,
        "tandem_over_vllm_router": ratios(figures, "vllm-router"),
        "tandem_over_before": ratios(figures, "before"),
    }
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        columns = ("cpu_per_request", "added_p50", "cpu_per_chunk", "added_ttft")
        print(f"{'microseconds':14}" + "".join(f"{name:>17}" for name in columns))
        for name, row in figures.items():
            print(f"{name:14}" + "".join(f"{row[column]:17.1f}" for column in columns))
        for other, title in (("vllm-router", "over vllm"), ("before", "over before")):
            if (shown := ratios(figures, other)) is not None:
                print(f"{title:14}" + "".join(f"{shown[column]:17.2f}" for column in columns))
    if args.results:
        path = args.results / f"router-{about['date']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
