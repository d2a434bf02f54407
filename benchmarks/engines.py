"""Our engine and vLLM in the same run, behind the same Router: ratios on this machine.

usage: python benchmarks/engines.py [--batches 1,4,16] [--tokens 64] [--json FILE]

The large demo model in float32, one thread each, one worker per engine, asked through the Router by
streams of fixed length; the engines take turns so that whatever else runs here disturbs both alike.
CPU is that of the worker's processes, read from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))
from stack_kit import start, stop  # noqa: E402

MODEL = """\
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {{name: {name}}}
spec:
  weights: {{source: "file://{root}/examples/models/large"}}
  {image}
  engine: {{maxModelLen: 512, kvCacheMemory: 128Mi, maxNumSeqs: 64, dtype: float32{more}}}
  unified: {{replicas: 1, resources: {{cpu: "1"}}}}
---
"""
ROUTER = """\
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {name: chat}
spec:
  tiers: [{name: tandem, modelRef: {name: tandem}}, {name: vllm, modelRef: {name: vllm}}]
  fallbackTier: tandem
  predictor: {type: Length}
  scaling: {mode: External}
"""


def yaml_text() -> str:
    more = ', type: VLLM, args: {enforce-eager: "true"}'
    image = "image: vllm/vllm-openai-cpu:v0.32.0"
    ours = MODEL.format(name="tandem", root=ROOT, image="drain: {}", more="")
    theirs = MODEL.format(name="vllm", root=ROOT, image=image, more=more)
    return ours + theirs + ROUTER


def processes(engine: str) -> list[int]:
    """The engine's container process, found by the pod's name, and all below it.

    vLLM writes its title over its children's environment, so those are found by their parents.
    """
    found: set[int] = set()
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit():
                continue
            pid = int(entry.name)
            parents[pid] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = (entry / "environ").read_bytes().split(b"\0")
            if any(v.startswith(f"POD_NAME={engine}-unified".encode()) for v in variables):
                found.add(pid)
        except OSError:
            continue
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def cpu_s(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def memory_mib(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next(int(x.split()[1]) for x in text.splitlines() if x.startswith("Pss:"))
    return total / 1024


async def stream(client: httpx.AsyncClient, url: str, engine: str, tokens: int, i: int) -> Any:
    body = {
        "model": engine,
        "messages": [{"role": "user", "content": f"{i + 10} + {2 * i + 11} ="}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, times, made = time.perf_counter(), [], 0
    async with client.stream("POST", url + "/v1/chat/completions", json=body) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                made = (chunk.get("usage") or {}).get("completion_tokens") or made
                if any(c["delta"].get("content") for c in chunk.get("choices") or []):
                    times.append(time.perf_counter())
    return times[0] - began, (times[-1] - times[0]) / max(1, made - 1), made


async def measure(url: str, engine: str, batch: int, tokens: int) -> dict[str, float]:
    pids = processes(engine)
    async with httpx.AsyncClient(timeout=300) as client:
        before, began = cpu_s(pids), time.perf_counter()
        found = await asyncio.gather(
            *(stream(client, url, engine, tokens, i) for i in range(batch))
        )
        wall, cpu = time.perf_counter() - began, cpu_s(pids) - before
    made = sum(n for _, _, n in found)
    return {
        "tokens_per_s": made / wall,
        "cpu_ms_per_token": 1000 * cpu / made,
        "ttft_ms": 1000 * statistics.median(t for t, _, _ in found),
        "tpot_ms": 1000 * statistics.median(t for _, t, _ in found),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    script = [sys.executable, str(ROOT / "scripts" / "vllm_setup.py")]
    made = subprocess.run(script, stdout=subprocess.PIPE, text=True)
    if made.returncode:
        return made.returncode
    result: dict[str, Any] = {"batches": {}, "memory_mib": {}}
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "engines.yaml"
        file.write_text(yaml_text())
        stack = start(Path(name), "engines", "--image", f"vllm={made.stdout.strip()}", example=file)
        try:
            for engine in ("tandem", "vllm"):
                asyncio.run(measure(stack.url, engine, 2, 8))  # warm
            for batch in map(int, args.batches.split(",")):
                rows: dict[str, list[dict[str, float]]] = {"tandem": [], "vllm": []}
                for _ in range(args.rounds):
                    for engine, kept in rows.items():
                        kept.append(asyncio.run(measure(stack.url, engine, batch, args.tokens)))
                best = {
                    engine: {k: statistics.median(r[k] for r in kept) for k in kept[0]}
                    for engine, kept in rows.items()
                }
                result["batches"][batch] = best
                ratios = {k: best["tandem"][k] / best["vllm"][k] for k in best["tandem"]}
                said = ", ".join(f"{k} {v:.2f}" for k, v in ratios.items())
                print(f"{batch} at a time, Tandem / vLLM: {said}", flush=True)
            for engine in ("tandem", "vllm"):
                result["memory_mib"][engine] = memory_mib(processes(engine))
            ratio = result["memory_mib"]["tandem"] / result["memory_mib"]["vllm"]
            print(f"memory (proportional set size), Tandem / vLLM: {ratio:.2f}")
        finally:
            stop(stack)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
