"""How fast one worker starts and answers on this machine, unified and split over tcp.

    python benchmarks/worker.py --weights examples/models/large [--json FILE]

Starts the real processes on loopback addresses. TTFT and TPOT are medians over streamed requests
sent one at a time; tokens/s is the total over concurrent ones. CPU seconds are those of all worker
processes, so that the figures can be compared on a machine that does other work as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

NUM_TOKENS = 64


class WorkerProcess:
    """One worker in a process of its own."""

    def __init__(self, weights: Path, role: str, host: str, folder: Path) -> None:
        self.url = f"http://{host}:8100"
        self._config = folder / f"{role}.json"
        self._config.write_text(
            json.dumps({"served_model": "m", "role": role, "local_prefill_max_tokens": 0})
        )
        self._arguments = ["--config", str(self._config), "--weights", str(weights), "--host", host]
        self._log = folder / f"{role}.log"

    async def start(self) -> float:
        """Seconds from exec to ready."""
        started = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tandem_worker", *self._arguments, stderr=log
            )
        async with httpx.AsyncClient(base_url=self.url, timeout=5) as client:
            while time.perf_counter() - started < 120:
                if self._process.returncode is not None:
                    break
                try:
                    if (await client.get("/ready")).status_code == 200:
                        return time.perf_counter() - started
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.02)
        raise SystemExit(f"a worker did not start:\n{self._log.read_text()}")

    @property
    def cpu_s(self) -> float:
        """CPU seconds used so far (Linux)."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def stop(self) -> None:
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(self._process.wait(), 30)


def request(number: int, prompt_tokens: int) -> dict[str, Any]:
    # Each prompt is another one from its first token on: no prefix hits.
    prompt = [(number * 7919 + 31 * position) % 200 + 10 for position in range(prompt_tokens)]
    return {
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }


async def one(
    client: httpx.AsyncClient, body: dict[str, Any], headers: dict[str, str]
) -> tuple[float, float]:
    """TTFT and TPOT of one streamed request, seconds."""
    started = time.perf_counter()
    times: list[float] = []
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return times[0] - started, (times[-1] - times[0]) / (len(times) - 1)


async def measure(
    entry: WorkerProcess,
    workers: list[WorkerProcess],
    headers: dict[str, str],
    prompt_tokens: int,
    concurrency: int,
) -> dict[str, float]:
    headers = {**headers, "x-tandem-token-ids": "1"}
    async with httpx.AsyncClient(base_url=entry.url, timeout=300) as client:
        for number in range(3):
            await one(client, request(number, prompt_tokens), headers)
        single = [await one(client, request(10 + n, prompt_tokens), headers) for n in range(8)]
        cpu_s, started = sum(w.cpu_s for w in workers), time.perf_counter()
        await asyncio.gather(
            *(one(client, request(100 + n, prompt_tokens), headers) for n in range(concurrency))
        )
        wall_s = time.perf_counter() - started
        cpu_s = sum(w.cpu_s for w in workers) - cpu_s
    tokens = concurrency * NUM_TOKENS
    return {
        "ttft_ms": 1e3 * statistics.median(ttft for ttft, _ in single),
        "tpot_ms": 1e3 * statistics.median(tpot for _, tpot in single),
        "tokens_per_s": tokens / wall_s,
        "tokens_per_cpu_s": tokens / cpu_s,
    }


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"weights": arguments.weights.name, "start_s": {}}
    with tempfile.TemporaryDirectory() as name:
        workers = {
            role: WorkerProcess(arguments.weights, role, f"127.91.0.{number}", Path(name))
            for number, role in enumerate(("unified", "prefill", "decode"), start=1)
        }
        started = []
        try:
            for role, worker in workers.items():
                result["start_s"][role] = await worker.start()
                started.append(worker)
            sizes = (arguments.prompt_tokens, arguments.concurrency)
            result["unified"] = await measure(workers["unified"], [workers["unified"]], {}, *sizes)
            result["split"] = await measure(
                workers["decode"],
                [workers["prefill"], workers["decode"]],
                {"x-tandem-prefill": workers["prefill"].url},
                *sizes,
            )
        finally:
            for worker in started:
                await worker.stop()
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="Hugging Face model directory")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    result = asyncio.run(run(arguments))
    print(
        f"{result['weights']}: prompts of {arguments.prompt_tokens} tokens, {NUM_TOKENS} answered"
    )
    print("ready after " + ", ".join(f"{r} {s:.1f} s" for r, s in result["start_s"].items()))
    print(f"{'':8}  TTFT ms  TPOT ms  tok/s x{arguments.concurrency}  tok/CPU-s")
    for name in ("unified", "split"):
        row = result[name]
        print(
            f"{name:8}  {row['ttft_ms']:7.1f}  {row['tpot_ms']:7.2f}  "
            f"{row['tokens_per_s']:9.0f}  {row['tokens_per_cpu_s']:9.0f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
