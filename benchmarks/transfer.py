"""How fast KV blocks are pushed over tcp, beside what this machine could do at best.

    python benchmarks/transfer.py [--mib 146] [--repeats 5] [--json FILE]

The ceilings are measured in the same run, alternating with the pushes, on the same bytes: one copy
in memory (`memcpy`), and a bare loopback socket pair that moves the bytes from one buffer into
another with the same system calls and nothing else (`socket`). Receiver and sender run in two
processes, as on a real pair of workers; with one core they share it, and then the column of CPU
time (both processes together, Linux only) says more than the clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from tandem_worker.transfer import FinalState, KVLayout, KVPool, create_receiver, create_sender

LAYOUTS = {
    # the demo's large model, and the KV shape of a 32B Qwen in bf16
    "demo-large": KVLayout(8, 4, 64, 64, "float32"),
    "qwen-32b": KVLayout(64, 8, 64, 128, "bfloat16"),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds per repeat for so many bytes."""

    name: str
    num_bytes: int
    seconds: list[float]
    cpu_s: list[float]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, with rates."""
        best, middle = min(self.seconds), statistics.median(self.seconds)
        return {
            "name": self.name,
            "num_bytes": self.num_bytes,
            "median_s": middle,
            "best_s": best,
            "median_gb_per_s": self.num_bytes / middle / 1e9,
            "median_cpu_s": statistics.median(self.cpu_s),
        }


def _receive_pushes(link: Connection, layout: KVLayout, num_blocks: int) -> None:
    """The decode worker's process: one reservation per line on the pipe."""
    asyncio.run(_receive_pushes_async(link, layout, num_blocks))


async def _receive_pushes_async(link: Connection, layout: KVLayout, num_blocks: int) -> None:
    receiver = create_receiver(KVPool.allocate(layout, num_blocks), token=b"bench")
    await receiver.start("127.0.0.1", 0)
    link.send(receiver.address)
    while True:
        order = await asyncio.to_thread(link.recv)
        if order is None:
            break
        name, blocks = order
        reservation = receiver.reserve(name, 1, blocks, time.monotonic() + 120)
        link.send(True)
        await reservation.completed()
    await receiver.aclose()


def _receive_bytes(link: Connection, num_bytes: int) -> None:
    """The bare socket's far end: fill one buffer again and again, one byte back when full."""
    listener = socket.create_server(("127.0.0.1", 0))
    link.send(listener.getsockname())
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = memoryview(bytearray(num_bytes))
    while True:
        filled = 0
        while filled < num_bytes:
            count = connection.recv_into(buffer[filled : filled + (1 << 20)])
            if count == 0:
                return
            filled += count
        connection.sendall(b"!")


def _spawn(target: Callable[..., None], *args: Any) -> tuple[multiprocessing.Process, Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, *args), daemon=True)
    process.start()
    return process, here


def _cpu_s(*pids: int) -> float:
    """CPU seconds of the main threads of some processes; 0 where /proc does not say."""
    total_ns = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/schedstat", encoding="ascii") as file:
                total_ns += int(file.read().split()[0])
        except OSError:
            return 0.0
    return total_ns / 1e9


async def measure(layout: KVLayout, mib: float, repeats: int) -> list[Row]:
    """memcpy, bare socket, push, push with checksum; interleaved, one warm-up each."""
    num_blocks = max(1, round(mib * 2**20 / (layout.unit_bytes * layout.num_layers)))
    num_bytes = num_blocks * layout.unit_bytes * layout.num_layers
    source = KVPool.allocate(layout, num_blocks)
    receiver, orders = _spawn(_receive_pushes, layout, num_blocks)
    address = await asyncio.to_thread(orders.recv)
    plain = create_sender(source, token=b"bench")
    checked = create_sender(source, token=b"bench", checksum=True)
    sink, sink_link = _spawn(_receive_bytes, num_bytes)
    bare = socket.create_connection(await asyncio.to_thread(sink_link.recv))
    bare.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    from_buffer, to_buffer = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    payload = memoryview(from_buffer)
    # blocks as an allocator hands them out after a while: not in a row
    shuffled = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
    numbers = iter(range(1_000_000))

    async def copy() -> None:
        to_buffer[:] = from_buffer

    async def raw() -> None:
        for start in range(0, num_bytes, 1 << 20):
            bare.sendall(payload[start : start + (1 << 20)])
        bare.recv(1)

    def push_with(sender: Any, local: list[int]) -> Callable[[], Any]:
        async def run() -> None:
            name = f"r{next(numbers)}"
            orders.send((name, shuffled))
            await asyncio.to_thread(orders.recv)
            start_clock()  # the reservation is not part of the push
            push = await sender.open(address, name, 1)
            for layer in range(layout.num_layers):
                await push.layer_blocks(layer, local, shuffled)
            await push.finish(FinalState(first_token=0, num_tokens=num_blocks * 64))

        return run

    started = started_cpu = 0.0
    pids = [os.getpid(), *(process.pid or 0 for process in (receiver, sink))]

    def start_clock() -> None:
        nonlocal started, started_cpu
        started, started_cpu = time.perf_counter(), _cpu_s(*pids)

    subjects: list[tuple[str, Callable[[], Any]]] = [
        ("memcpy", copy),
        ("socket", raw),
        ("push", push_with(plain, list(range(num_blocks)))),
        ("push, crc32", push_with(checked, list(range(num_blocks)))),
    ]
    seconds: dict[str, list[float]] = {name: [] for name, _ in subjects}
    cpu: dict[str, list[float]] = {name: [] for name, _ in subjects}
    for repeat in range(repeats + 1):
        for name, run in subjects:
            start_clock()
            await run()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
                cpu[name].append(_cpu_s(*pids) - started_cpu)
    for sender in (plain, checked):
        await sender.aclose()
    orders.send(None)
    bare.close()
    for process in (receiver, sink):
        await asyncio.to_thread(process.join, 10)
    return [Row(name, num_bytes, seconds[name], cpu[name]) for name, _ in subjects]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=float, default=146.0, help="bytes per push, MiB")
    parser.add_argument("--small-kib", type=float, default=512.0, help="bytes of a small push, KiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default=None, help="also write the numbers here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} usable cores"
    print(f"tcp push beside its ceilings; {machine}; load {os.getloadavg()[0]:.1f}")
    results: list[dict[str, Any]] = []
    for layout_name, layout in LAYOUTS.items():
        for mib in (arguments.mib, arguments.small_kib / 1024):
            rows = asyncio.run(measure(layout, mib, arguments.repeats))
            ceiling = statistics.median(rows[1].seconds)
            print(f"\n{layout_name}, {rows[0].num_bytes / 2**20:.2f} MiB")
            print(
                f"  {'':12} {'median':>10} {'best':>10} {'CPU':>10} {'GB/s':>7} {'of socket':>10}"
            )
            for row in rows:
                data = row.as_dict()
                share = ceiling / data["median_s"]
                print(
                    f"  {row.name:12} {data['median_s'] * 1e3:8.2f}ms {data['best_s'] * 1e3:8.2f}ms"
                    f" {data['median_cpu_s'] * 1e3:8.2f}ms"
                    f" {data['median_gb_per_s']:7.2f} {share:9.0%}"
                )
                results.append({"layout": layout_name, "of_socket": share, **data})
    if arguments.json:
        report = {
            "machine": machine,
            "date": time.strftime("%Y-%m-%d"),
            "load_1min": os.getloadavg()[0],
            "results": results,
        }
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
