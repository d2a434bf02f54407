"""How long the operator takes for many resources, and what it costs at rest.

Runs against the real control plane of the tests, pods never start (no node):

    make cluster ARGS="--nodes 0 --exec '.venv/bin/python benchmarks/reconcile.py'"

Prints one line per measurement; --models and --routers set the size. (A script named operator.py
would hide the standard library's module from every script of this folder.)
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
import urllib.request
from pathlib import Path

from tandem_operator.api import ApiError
from tandem_operator.kube.client import KubeApi, connect
from tandem_operator.resources.crds import PLURALS, crd_yaml

PORT = 18_080


def model(index: int) -> dict[str, object]:
    split = index % 2 == 0
    roles: dict[str, object] = (
        {"prefill": {"replicas": 1}, "decode": {"replicas": 1}} if split else {"unified": {}}
    )
    return {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "Model",
        "metadata": {"name": f"m{index}", "namespace": "default"},
        "spec": {"weights": {"source": "file:///models/m"}, **roles},
    }


def router(index: int, models: int) -> dict[str, object]:
    names = {"small": f"m{index % models}", "large": f"m{(index * 7 + 1) % models}"}
    return {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "Router",
        "metadata": {"name": f"r{index}", "namespace": "default"},
        "spec": {"tiers": [{"name": t, "modelRef": {"name": n}} for t, n in names.items()]},
    }


async def kubectl(*arguments: str, stdin: str = "") -> None:
    process = await asyncio.create_subprocess_exec(
        "kubectl",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
    )
    await process.communicate(stdin.encode())
    if process.returncode:
        raise SystemExit(f"kubectl {' '.join(arguments)} failed")


def metric(name: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=10) as page:
        for line in page.read().decode().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    raise SystemExit(f"the operator does not report {name}")


def memory_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


async def converged(api: KubeApi, kind: str) -> int:
    """Resources whose status speaks of their present generation."""
    found = 0
    for obj in await api.select(kind, "default"):
        generation = (obj.get("status") or {}).get("observedGeneration")
        found += generation == obj["metadata"]["generation"]
    return found


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--routers", type=int, default=100)
    parser.add_argument("--rest", type=float, default=60.0, help="seconds to watch at rest")
    args = parser.parse_args()
    api = KubeApi(await connect(os.environ.get("KUBECONFIG")), "benchmark")
    await kubectl("apply", "--server-side", "-f", "-", stdin="---\n".join(map(crd_yaml, PLURALS)))
    await kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
    objects = [model(i) for i in range(args.models)]
    objects += [router(i, args.models) for i in range(args.routers)]
    gate = asyncio.Semaphore(8)

    async def create(obj: dict[str, object]) -> None:
        async with gate:
            for _ in range(20):
                try:
                    await api.create(obj)
                    return
                except ApiError as error:
                    if not error.retriable and error.status != 404:
                        raise
                    await asyncio.sleep(0.5)

    began = time.monotonic()
    await asyncio.gather(*(create(o) for o in objects))
    print(f"{len(objects)} resources created in {time.monotonic() - began:.1f} s", flush=True)
    command = [sys.executable, "-m", "tandem_operator", "--port", str(PORT)]
    operator = await asyncio.create_subprocess_exec(
        *command, "--kubeconfig", os.environ["KUBECONFIG"], "--log-level", "warning"
    )
    try:
        began = time.monotonic()
        done = 0
        while done < len(objects):
            await asyncio.sleep(2)
            done = await converged(api, "Model") + await converged(api, "Router")
        print(f"converged in {time.monotonic() - began:.1f} s", flush=True)
        print(f"writes {metric('tandem_operator_api_writes_total')}", flush=True)
        for _ in range(600):
            if metric("tandem_operator_queue_length") == 0:
                break
            await asyncio.sleep(1)
        before = metric("tandem_operator_api_writes_total")
        await asyncio.sleep(args.rest)
        writes = metric("tandem_operator_api_writes_total") - before
        print(f"at rest {writes / args.rest:.2f} writes/s", flush=True)
        print(f"memory {memory_mb(operator.pid):.0f} MB", flush=True)
    finally:
        operator.terminate()
        await operator.wait()
        await api.close()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
