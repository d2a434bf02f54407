"""What the operator takes for many resources: writes, CPU and memory, changing and at rest.

    make cluster ARGS="--nodes 0 --exec '.venv/bin/python benchmarks/operator'"

The real apiserver of the tests and simulated pods. With --controllers the real controllers and the
real scheduler make and bind the pods; without it both are stopped, so that what is measured is the
operator and its writes. CPU seconds of every process are printed beside the wall time, because wall
time says little on a shared machine. --models and --routers set the size.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from simulated import SimulatedNode

from tandem_operator.kube.client import KubeApi, connect
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.resources.crds import PLURALS, crd_yaml

PORT = 18_080
COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
NUM_CORES = 2
GOAL_S, GOAL_WRITES, GOAL_MB = 120.0, 1.0, 300.0


def model(index: int) -> dict[str, Any]:
    """Every second Model is split into prefill and decode."""
    split = index % 2 == 0
    roles: dict[str, Any] = (
        {"prefill": {"replicas": 1}, "decode": {"replicas": 1}} if split else {"unified": {}}
    )
    return {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "Model",
        "metadata": {"name": f"m{index}", "namespace": "default"},
        "spec": {"weights": {"source": "file:///models/m"}, **roles},
    }


def router(index: int, models: int) -> dict[str, Any]:
    """Each Router has two tiers, on Models that others may use too."""
    names = {"small": f"m{index % models}", "large": f"m{(index * 7 + 1) % models}"}
    return {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "Router",
        "metadata": {"name": f"r{index}", "namespace": "default"},
        "spec": {"tiers": [{"name": t, "modelRef": {"name": n}} for t, n in names.items()]},
    }


async def kubectl(*arguments: str, stdin: str = "") -> None:
    process = await asyncio.create_subprocess_exec(
        "kubectl", *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
    )
    await process.communicate(stdin.encode())
    if process.returncode:
        raise SystemExit(f"kubectl {' '.join(arguments)} failed")


class Processes:
    """CPU seconds of the control plane's processes and of the operator."""

    def __init__(self) -> None:
        self.pids = {"benchmark": os.getpid()}
        pid = os.getpid()
        while pid > 1 and len(self.pids) == 1:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                name = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[0].decode()
                if (base := os.path.basename(name)) in COMPONENTS:
                    self.pids[base] = int(child)

    def stop_controllers(self, stop: bool) -> None:
        for name in ("kube-controller-manager", "kube-scheduler"):
            os.kill(self.pids[name], signal.SIGSTOP if stop else signal.SIGCONT)

    def cpu_s(self) -> dict[str, float]:
        tick = os.sysconf("SC_CLK_TCK")
        found = {}
        for name, pid in self.pids.items():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[name] = (int(fields[11]) + int(fields[12])) / tick
        return found


def memory_mb(pid: int, field: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"process {pid} has no {field}")


def metric(name: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=10) as page:
        for line in page.read().decode().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    raise SystemExit(f"the operator does not report {name}")


def settled() -> bool:
    """Whether the operator has begun and has nothing to do."""
    try:
        return metric("tandem_operator_passes_total") > 0 and not metric(
            "tandem_operator_queue_length"
        )
    except OSError:  # its port is not open yet
        return False


async def ready(api: KubeApi, kind: str) -> int:
    """Resources that are ready, with a status that speaks of their present generation."""
    found = 0
    for obj in await api.select(kind, "default"):
        status = obj.get("status") or {}
        good = any(
            c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or []
        )
        found += good and status.get("observedGeneration") == obj["metadata"]["generation"]
    return found


async def create_all(api: KubeApi, objects: list[dict[str, Any]]) -> None:
    gate = asyncio.Semaphore(8)

    async def create(obj: dict[str, Any]) -> None:
        async with gate:
            for _ in range(20):
                try:
                    await api.create(obj)
                    return
                except ApiError as error:
                    if not error.retriable and error.status != 404:
                        raise
                    await asyncio.sleep(0.5)
            raise SystemExit(f"{obj['metadata']['name']} could not be created")

    await asyncio.gather(*(create(o) for o in objects))


def show(what: str, before: dict[str, float], after: dict[str, float]) -> float:
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    total = sum(spent.values())
    parts = ", ".join(f"{name} {value:.1f}" for name, value in spent.items())
    print(f"{what}: {total:.1f} CPU s ({parts})", flush=True)
    return total


async def measure(args: argparse.Namespace, api: KubeApi, processes: Processes) -> int:
    objects = [model(i) for i in range(args.models)]
    objects += [router(i, args.models) for i in range(args.routers)]
    start = processes.cpu_s()
    began = time.monotonic()
    await create_all(api, objects)
    print(f"{len(objects)} resources created in {time.monotonic() - began:.1f} s", flush=True)
    command = [*args.python.split(), "-m", "tandem_operator", "--port", str(PORT)]
    command += ["--allow", '{"volumes": ["hostPath"]}']
    before = processes.cpu_s()
    show("created", start, before)
    operator = await asyncio.create_subprocess_exec(
        *command, "--kubeconfig", os.environ["KUBECONFIG"], "--log-level", "warning"
    )
    processes.pids["operator"] = operator.pid
    try:
        began = time.monotonic()
        done = 0
        while done < len(objects):
            if time.monotonic() - began > args.limit:
                raise SystemExit(f"{done} of {len(objects)} are ready after {args.limit:.0f} s")
            await asyncio.sleep(1)
            if operator.returncode is not None:
                raise SystemExit(f"the operator ended with status {operator.returncode}")
            # A list of a thousand objects is dear: it is asked for when there may be news.
            if settled():
                done = await ready(api, "Model") + await ready(api, "Router")
        wall = time.monotonic() - began
        total = show("converged", before, processes.cpu_s())
        writes, passes = (metric(f"tandem_operator_{n}_total") for n in ("api_writes", "passes"))
        print(f"converged in {wall:.1f} s of wall time", flush=True)
        print(f"CPU over {NUM_CORES} cores: {total / NUM_CORES:.1f} s; goal {GOAL_S:.0f} s")
        print(f"{writes} writes ({writes / len(objects):.1f} per resource), {passes} passes")
        await asyncio.sleep(args.settle)
        before, began = processes.cpu_s(), time.monotonic()
        written = metric("tandem_operator_api_writes_total")
        await asyncio.sleep(args.rest)
        seconds = time.monotonic() - began
        show(f"at rest for {seconds:.0f} s", before, processes.cpu_s())
        rate = (metric("tandem_operator_api_writes_total") - written) / seconds
        print(f"at rest {rate:.2f} writes/s; goal under {GOAL_WRITES:.0f}")
        now, peak = (memory_mb(operator.pid, f) for f in ("VmRSS", "VmHWM"))
        print(f"operator's memory {now:.0f} MB, at most {peak:.0f} MB; goal {GOAL_MB:.0f} MB")
        met = total / NUM_CORES < GOAL_S and rate < GOAL_WRITES and peak < GOAL_MB
        return 0 if met else 1
    finally:
        if operator.returncode is None:
            operator.terminate()
        await operator.wait()


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--routers", type=int, default=100)
    parser.add_argument("--controllers", action="store_true", help="the real ones make the pods")
    parser.add_argument("--rest", type=float, default=60.0, help="seconds to watch at rest")
    parser.add_argument("--settle", type=float, default=5.0, help="seconds before that")
    parser.add_argument("--limit", type=float, default=1500.0, help="seconds of wall time to wait")
    parser.add_argument("--python", default=sys.executable, help="how to start the operator")
    args = parser.parse_args()
    processes = Processes()
    api = KubeApi(await connect(os.environ.get("KUBECONFIG")), "benchmark")
    await kubectl("apply", "--server-side", "-f", "-", stdin="---\n".join(map(crd_yaml, PLURALS)))
    await kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
    processes.stop_controllers(not args.controllers)
    node = asyncio.create_task(SimulatedNode(api, not args.controllers).run())
    measured = asyncio.create_task(measure(args, api, processes))
    try:
        await asyncio.wait({node, measured}, return_when=asyncio.FIRST_COMPLETED)
        if not measured.done():
            node.result()
        return await measured
    finally:
        for task in (node, measured):
            task.cancel()
        await asyncio.gather(node, measured, return_exceptions=True)
        processes.stop_controllers(False)
        await api.close()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
