"""`tandem plan`'s choice for the demo pair beside the best of a live grid of plans.

    python benchmarks/planner_live.py [--rate 4] [--seconds 60] [--points N] [--json FILE]

Both models are profiled as served (`tandem profile`), questions of the suite's test split are
answered once by each, and `tandem plan` chooses under those arrivals. Then each plan of a grid of
21 runs for `--seconds`: workers of the small tier, layout of the large one, threshold. Printed:
what each costs, the share of requests in time and the quality kept, the cheapest that holds SLO and
floor, and the plan chosen, run the same way. Needs a machine that nobody else uses: with the
defaults forty minutes. `--points` runs only the cheapest so many of the grid.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml

from tandem_operator.demo.suite import MARKER, generate
from tandem_router.predictor import load
from tandem_router.routing.scorer import with_gains

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "examples" / "models"
ARTIFACT = ROOT / "examples" / "01-hybrid" / "predictor"
TIERS = ("small", "large")
USD = {"small": 0.1, "large": 1.0}  # an hour and worker, whatever its role
ENGINE = {"dtype": "float32", "maxNumSeqs": 8, "maxBatchedTokens": 512, "kvCacheMemory": "64Mi"}
FLOOR = 0.95
START_S = 240.0


@dataclass(frozen=True)
class Plan:
    """Workers by (tier, role), and the threshold."""

    workers: tuple[tuple[tuple[str, str], int], ...]
    threshold: float

    @property
    def usd_per_hour(self) -> float:
        return sum(USD[tier] * count for (tier, _), count in self.workers)

    def describe(self) -> str:
        """In a line."""
        pools = ", ".join(f"{t}/{r} {n}" for (t, r), n in self.workers)
        return f"{pools}; threshold {self.threshold:.3f}"


def documents(plan: Plan, slo: dict[str, Any]) -> str:
    """The Models and the Router of a plan."""
    found: list[dict[str, Any]] = []
    for tier in TIERS:
        roles = {
            r: {"replicas": n, "usdPerHour": str(USD[tier])}
            for (t, r), n in plan.workers
            if t == tier
        }
        spec = {"weights": {"source": f"file://{MODELS / tier}"}, "engine": ENGINE}
        if roles:
            found.append(_object("Model", tier, {**spec, **roles}))
    used = [one["metadata"]["name"] for one in found]
    router: dict[str, Any] = {
        "tiers": [{"name": tier, "modelRef": {"name": tier}} for tier in used],
        "fallbackTier": used[-1],
        "slo": slo,
    }
    if len(used) > 1:
        router["predictor"] = {"type": "Learned", "artifact": f"file://{ARTIFACT}"}
        router["threshold"] = f"{max(0.0, plan.threshold):.4f}"
    found.append(_object("Router", "chat", router))
    return yaml.safe_dump_all(found)


def _object(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": spec,
    }


def tandem(*arguments: str, check: bool = True) -> str:
    """Output of a command."""
    command = [sys.executable, "-m", "tandem_operator.cli", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, env=_env())
    if check and ran.returncode != 0:
        raise SystemExit(f"tandem {' '.join(arguments)}: {ran.stdout}{ran.stderr}")
    return ran.stdout


def _env() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@contextmanager
def process(log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command that runs meanwhile, in a group of its own."""
    command = [sys.executable, "-m", "tandem_operator.cli", *arguments]
    with log.open("wb") as out:
        running = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=_env(),
            start_new_session=True,
        )  # fmt: skip
    try:
        yield running
    finally:
        running.terminate()  # what a shell starts in the background ignores SIGINT
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)


def until(said: str, log: Path, running: subprocess.Popen[bytes]) -> None:
    """Wait for a line of the log."""
    began = time.monotonic()
    while said not in log.read_text():
        if running.poll() is not None or time.monotonic() - began > START_S:
            raise SystemExit(f"did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.2)


def profiled(folder: Path) -> dict[str, Path]:
    """A profile of each model as it is served here."""
    found = {}
    for number, tier in enumerate(TIERS):
        url, path, log = (
            f"http://127.0.0.1:{18100 + number}",
            folder / f"{tier}.json",
            folder / tier,
        )
        serve = ("serve", str(MODELS / tier), "--port", str(18100 + number))
        with process(log, *serve) as running:
            began = time.monotonic()
            while True:
                try:
                    if httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                if running.poll() is not None or time.monotonic() - began > START_S:
                    raise SystemExit(f"{tier} did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.2)
            # Questions and answers of the suite are short.
            measured = ("--max-context", "256", "--max-batch", "8")
            print(tandem("profile", url, *measured, "-o", str(path)).strip(), flush=True)
        found[tier] = path
    return found


@contextmanager
def up(plan: Plan, slo: dict[str, Any], folder: Path) -> Iterator[str]:
    """The plan's cluster; its router's address."""
    file, log = folder / "plan.yaml", folder / "up.log"
    file.write_text(documents(plan, slo))
    name = f"grid-{os.getpid()}"
    with process(log, "up", str(file), "--cluster", name) as running:
        until("ready after", log, running)
        router = json.loads(tandem("get", "router", "chat", "-o", "json", "--cluster", name))
        yield router["status"]["endpoint"].removesuffix("/v1")


@dataclass(frozen=True)
class Seen:
    """One answer."""

    tier: str
    ttft_s: float
    tpot_s: float
    num_tokens: int
    prompt_tokens: int
    is_right: bool


async def ask(client: httpx.AsyncClient, url: str, model: str, question: Any) -> Seen | None:
    """None where no whole answer came."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question.prompt}],
        "temperature": 0,
        "max_tokens": 96,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, text, times, usage = time.perf_counter(), "", [], {}
    try:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
            tier = reply.headers.get("x-tandem-tier", model)
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    usage = chunk.get("usage") or usage
                    for choice in chunk.get("choices") or []:
                        if content := choice["delta"].get("content"):
                            text += content
                            times.append(time.perf_counter())
    except httpx.HTTPError:
        return None
    if not times or not usage:
        return None
    made = int(usage["completion_tokens"])
    return Seen(
        tier,
        times[0] - began,
        (times[-1] - times[0]) / max(1, made - 1),
        made,
        int(usage["prompt_tokens"]),
        text.rsplit(MARKER, 1)[-1].strip() == question.answer,
    )


async def outcomes(url: str, questions: list[Any]) -> list[dict[str, Seen]]:
    """What each model makes of each question, four at a time."""
    gate = asyncio.Semaphore(4)
    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:

        async def one(question: Any) -> dict[str, Seen]:
            async with gate:
                both = [await ask(client, url, tier, question) for tier in TIERS]
            if None in both:
                raise SystemExit(f"no answer to {question.prompt!r}")
            return dict(zip(TIERS, both, strict=True))  # type: ignore[arg-type]

        return await asyncio.gather(*map(one, questions))


def trace(questions: list[Any], seen: list[dict[str, Seen]], rate: float, seconds: float,
          seed: int = 1) -> list[dict[str, Any]]:  # fmt: skip
    """Poisson arrivals of these questions, as `tandem plan` reads them."""
    rng, now, rows, predictor = random.Random(seed), 0.0, [], load(ARTIFACT)
    while (now := now + rng.expovariate(rate)) < seconds:
        number = rng.randrange(len(questions))
        answer, stated = seen[number], with_gains(predictor.score(questions[number].prompt))
        assert stated is not None
        rows.append(
            {
                "at_s": now,
                "prompt_tokens": answer["large"].prompt_tokens,
                "output_tokens": {tier: answer[tier].num_tokens for tier in TIERS},
                "quality": {tier: float(answer[tier].is_right) for tier in TIERS},
                "predicted": dict(stated.quality),
                "question": number,
            }
        )
    return rows


async def replayed(url: str, rows: list[dict[str, Any]], questions: list[Any],
                   ttft_s: float, tpot_s: float) -> dict[str, float]:  # fmt: skip
    """The trace, live."""
    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
        for question in questions[:8]:  # warm
            await ask(client, url, "chat", question)
        began, asked = time.monotonic(), []
        for row in rows:
            await asyncio.sleep(max(0.0, began + row["at_s"] - time.monotonic()))
            asked.append(asyncio.create_task(ask(client, url, "chat", questions[row["question"]])))
        answers = await asyncio.gather(*asked)
    good = [a for a in answers if a is not None]
    best = sum(row["quality"]["large"] for row in rows)
    return {
        "in_time": sum(a.ttft_s <= ttft_s and a.tpot_s <= tpot_s for a in good) / len(rows),
        "quality": sum(a.is_right for a in good) / best,
        "p95_ttft_s": float(np.percentile([a.ttft_s for a in good], 95)),
        "p95_tpot_s": float(np.percentile([a.tpot_s for a in good], 95)),
        "share_small": sum(a.tier == "small" for a in good) / len(good),
    }


def grid(thresholds: list[float]) -> list[Plan]:
    """21 plans, cheapest first: small workers, layout of the large tier, threshold."""
    layouts = ({"unified": 1}, {"unified": 2}, {"prefill": 1, "decode": 1})
    plans = [Plan(tuple((("large", r), n) for r, n in each.items()), 0.0) for each in layouts]
    plans += [
        Plan((*((("large", r), n) for r, n in layout.items()), (("small", "unified"), small)), at)
        for layout in layouts
        for small in (1, 2)
        for at in thresholds
    ]
    return sorted(plans, key=lambda plan: plan.usd_per_hour)


def chosen(folder: Path, text: str, profiles: dict[str, Path], rows: list[dict[str, Any]]
           ) -> tuple[Plan, list[str]]:  # fmt: skip
    """What `tandem plan` says."""
    file, requests, found = folder / "asked.yaml", folder / "trace.jsonl", folder / "found.json"
    objects = list(yaml.safe_load_all(text))
    router = objects[-1]["spec"]
    del router["threshold"]
    router["objective"] = {"qualityFloor": str(FLOOR)}
    file.write_text(yaml.safe_dump_all(objects))
    known = ("at_s", "prompt_tokens", "output_tokens", "quality", "predicted")
    requests.write_text("".join(json.dumps({k: row[k] for k in known}) + "\n" for row in rows))
    options = [f"--profile={tier}={path}" for tier, path in profiles.items()]
    tandem("plan", str(file), str(requests), *options, "--json", str(found), check=False)
    said = json.loads(found.read_text())
    if said["best"] is None:
        raise SystemExit("; ".join(said["sentences"]))
    workers = tuple(
        ((name.split("/")[0], name.split("/")[1]), count)
        for name, count in sorted(said["best"]["workers"].items())
    )
    return Plan(workers, said["best"]["threshold"]), said["sentences"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each plan")
    parser.add_argument("--points", type=int, default=21, help="only the cheapest so many")
    parser.add_argument("--ttft-ms", type=float, default=400.0)
    parser.add_argument("--tpot-ms", type=float, default=40.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    slo = {
        name: {"percentile": 95, "target": f"{value:g}ms"}
        for name, value in (("ttft", options.ttft_ms), ("tpot", options.tpot_ms))
    }
    questions = list(generate("test", 5, 120))
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        profiles = profiled(folder)
        both = next(plan for plan in grid([0.1]) if len(plan.workers) == 2)
        with up(both, slo, folder) as url:
            seen = asyncio.run(outcomes(url, questions))
        rows = trace(questions, seen, options.rate, options.seconds)
        plan, sentences = chosen(folder, documents(both, slo), profiles, rows)
        print(*sentences, sep="\n", flush=True)
        gains = sorted(row["predicted"]["large"] - row["predicted"]["small"] for row in rows)
        thresholds = [gains[int(part * len(gains))] for part in (0.2, 0.45, 0.7)]

        def run(one: Plan) -> dict[str, Any]:
            with up(one, slo, folder) as url:
                found = asyncio.run(
                    replayed(
                        url, rows, questions, options.ttft_ms / 1000.0, options.tpot_ms / 1000.0
                    )
                )
            holds = found["in_time"] >= 0.95 and found["quality"] >= FLOOR
            print(
                f"${one.usd_per_hour:.2f}/h {'holds' if holds else 'fails'} "
                f"{ {name: round(value, 3) for name, value in found.items()} }  {one.describe()}",
                flush=True,
            )
            return {
                "plan": one.describe(),
                "usd_per_hour": one.usd_per_hour,
                "holds": holds,
                **found,
            }

        points = [run(one) for one in grid(thresholds)[: options.points]]
        print("the plan chosen:", flush=True)
        ours = run(plan)
    good = [point["usd_per_hour"] for point in points if point["holds"]]
    best = min(good, default=None)
    print(
        f"best of the grid that holds: {best}; chosen: {ours['usd_per_hour']}, "
        f"{'holds' if ours['holds'] else 'fails'}"
    )
    if options.json:
        found = {"sentences": sentences, "grid": points, "chosen": ours, "best_usd_per_hour": best}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(0 if best is not None and ours["holds"] and ours["usd_per_hour"] <= 1.05 * best else 1)


if __name__ == "__main__":
    main()
