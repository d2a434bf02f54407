"""The demo pair on our engine and on vLLM in the same run: ratios on this machine.

usage: python benchmarks/engines.py [--batches 1,4,16,64] [--tokens 32] [--rounds 2]
                                    [--questions 100] [--json FILE]

Both pairs in float32, one thread and one worker per model, behind Routers of equal settings. The
engines take turns, so that whatever else runs here disturbs both alike:

* the large models answer streams of fixed length, so many at a time: tokens per second, CPU per
  token, TTFT, TPOT;
* each large model starts alone, from no process to ready: seconds, and CPU until then;
* memory (proportional set size) of each large model after that;
* the cost table of `make demo` over `--questions` of its held-out questions, per engine.

CPU is that of the workers' processes, read from /proc; wall times mean something on an idle
machine only.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from tandem_operator.demo.client import Answer, ask_all
from tandem_operator.demo.report import strategy_table
from tandem_operator.demo.run import compared
from tandem_operator.demo.strategies import summarize
from tandem_operator.demo.suite import generate

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("e2e", "support")]
import stack_kit  # noqa: E402
from stack_kit import Stack, start, stop  # noqa: E402

ENGINES = ("tandem", "vllm")
MORE = {
    "tandem": ("drain: {}", ""),
    "vllm": (
        "image: vllm/vllm-openai-cpu:v0.32.0",
        ', type: VLLM, args: {enforce-eager: "true"}',
    ),
}
MODEL = """\
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {{name: {size}-{engine}}}
spec:
  weights: {{source: "file://{root}/examples/models/{size}"}}
  {image}
  engine: {{maxModelLen: 512, kvCacheMemory: 128Mi, maxNumSeqs: 64, dtype: float32{more}}}
  rollout: {{startupTimeout: 30m}}
  unified: {{replicas: 1, resources: {{cpu: "1"}}}}
---
"""
ROUTER = """\
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {{name: {engine}}}
spec:
  tiers:
  - name: small
    modelRef: {{name: small-{engine}}}
    usdPer1MInputTokens: "0.05"
    usdPer1MOutputTokens: "0.20"
  - name: large
    modelRef: {{name: large-{engine}}}
    usdPer1MInputTokens: "0.50"
    usdPer1MOutputTokens: "2"
  fallbackTier: large
  predictor:
    {{type: Learned, artifact: "file://{root}/examples/01-hybrid/predictor", deadline: 5s}}
  objective: {{qualityFloor: "0.9975"}}
  scaling: {{mode: External}}
---
"""
START_TIMEOUT_S = 1800.0


def yaml_text() -> str:
    models = [
        MODEL.format(
            size=size, engine=engine, root=ROOT, image=MORE[engine][0], more=MORE[engine][1]
        )
        for engine in ENGINES
        for size in ("small", "large")
    ]
    return "".join(models + [ROUTER.format(engine=engine, root=ROOT) for engine in ENGINES])


def processes(engine: str) -> list[int]:
    """The container process of the engine's large model, found by the pod's name, and all below it.

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
            if any(v.startswith(f"POD_NAME=large-{engine}-".encode()) for v in variables):
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


async def stream(client: httpx.AsyncClient, url: str, tokens: int, i: int) -> Any:
    body = {
        "model": "large",
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
    async with httpx.AsyncClient(timeout=600) as client:
        before, began = cpu_s(pids), time.perf_counter()
        found = await asyncio.gather(*(stream(client, url, tokens, i) for i in range(batch)))
        wall, cpu = time.perf_counter() - began, cpu_s(pids) - before
    made = sum(n for _, _, n in found)
    return {
        "tokens_per_s": made / wall,
        "cpu_ms_per_token": 1000 * cpu / made,
        "ttft_ms": 1000 * statistics.median(t for t, _, _ in found),
        "tpot_ms": 1000 * statistics.median(t for _, t, _ in found),
    }


def start_alone(stack: Stack, engine: str) -> dict[str, float]:
    """From no process of the large model to ready: seconds, and CPU of its processes by then."""
    pool = ("workerpool", f"large-{engine}-unified", "--replicas")
    stack.tandem("scale", *pool, "0")
    while processes(engine):
        time.sleep(0.2)
    began = time.perf_counter()
    stack.tandem("scale", *pool, "1")
    while not any(
        condition["type"] == "Ready" and condition["status"] == "True"
        for pod in stack.get("pods")["items"]
        if pod["metadata"]["labels"].get("tandem.dev/model") == f"large-{engine}"
        for condition in pod["status"].get("conditions", [])
    ):
        if time.perf_counter() - began > START_TIMEOUT_S:
            raise TimeoutError(f"large-{engine} did not start in {START_TIMEOUT_S:.0f} s")
        time.sleep(0.5)
    return {"seconds": time.perf_counter() - began, "cpu_s": cpu_s(processes(engine))}


async def cost_table(urls: dict[str, str], num: int) -> dict[str, Any]:
    """The demo's strategies per engine; the engines answer each set of questions in turn."""
    questions = generate("test", 7, num)
    answers: dict[str, dict[str, list[Answer]]] = {engine: {} for engine in urls}
    for who in ("small", "large", "routed"):
        for engine, url in urls.items():
            name = engine if who == "routed" else who
            async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
                answers[engine][who] = await ask_all(client, name, questions, 8, lambda _: None)
    found: dict[str, Any] = {"num_questions": num}
    for engine, of in answers.items():
        summaries = summarize(compared(of["small"], of["large"], of["routed"], "large"))
        print(f"\n{num} held-out questions, {engine}:\n{strategy_table(summaries)}", flush=True)
        found[engine] = [summary.as_dict() for summary in summaries]
    same = [
        sum(a.text == b.text for a, b in zip(*(answers[e][who] for e in ENGINES), strict=True))
        for who in ("small", "large")
    ]
    found["equal_answers"] = dict(zip(("small", "large"), same, strict=True))
    print(f"answers equal on both engines: {same[0]} and {same[1]} of {num}", flush=True)
    return found


def batches_of(urls: dict[str, str], args: argparse.Namespace) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for batch in map(int, args.batches.split(",")):
        rows: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
        for _ in range(args.rounds):
            for engine, kept in rows.items():
                kept.append(asyncio.run(measure(urls[engine], engine, batch, args.tokens)))
        median = {
            engine: {k: statistics.median(r[k] for r in kept) for k in kept[0]}
            for engine, kept in rows.items()
        }
        ratios = {k: median["tandem"][k] / median["vllm"][k] for k in median["tandem"]}
        found[batch] = {**median, "tandem_over_vllm": ratios}
        said = ", ".join(f"{k} {v:.2f}" for k, v in ratios.items())
        print(f"{batch} at a time, Tandem / vLLM: {said}", flush=True)
    return found


def where_it_ran() -> dict[str, Any]:
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "machine": f"{model}, {len(os.sched_getaffinity(0))} usable cores",
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "load_1min": os.getloadavg()[0],
        "versions": {
            "tandem": "this tree",
            "torch": importlib.metadata.version("torch"),
            "vllm": "0.32.0",
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--batches", default="1,4,16,64")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    script = [sys.executable, str(ROOT / "scripts" / "vllm_setup.py")]
    made = subprocess.run(script, stdout=subprocess.PIPE, text=True)
    if made.returncode:
        return made.returncode
    result: dict[str, Any] = where_it_ran()
    result |= {"rounds": args.rounds, "tokens": args.tokens}
    stack_kit.READY_TIMEOUT_S = START_TIMEOUT_S
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "engines.yaml"
        file.write_text(yaml_text())
        image = f"vllm={made.stdout.strip()}"
        stack = start(Path(name), "engines", "--image", image, example=file, router="tandem")
        try:
            urls = {
                engine: stack.get("router", engine)["status"]["endpoint"].removesuffix("/v1")
                for engine in ENGINES
            }
            for engine in ENGINES:
                asyncio.run(measure(urls[engine], engine, 2, 8))  # warm
            result["batches"] = batches_of(urls, args)
            result["costs"] = asyncio.run(cost_table(urls, args.questions))
            result["memory_mib"] = {e: memory_mib(processes(e)) for e in ENGINES}
            ratio = result["memory_mib"]["tandem"] / result["memory_mib"]["vllm"]
            print(f"\nmemory (proportional set size), Tandem / vLLM: {ratio:.2f}", flush=True)
            result["start"] = {engine: start_alone(stack, engine) for engine in ENGINES}
            for engine, took in result["start"].items():
                print(f"start of {engine}: {took['seconds']:.0f} s, {took['cpu_s']:.1f} s of CPU")
        finally:
            if args.json:
                args.json.write_text(json.dumps(result, indent=1) + "\n")
            stop(stack)
    return 0


if __name__ == "__main__":
    sys.exit(main())
