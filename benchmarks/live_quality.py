"""The judge's run: ten thousand questions, a judge that errs, a biased predictor, a drop, a kill.

    python benchmarks/live_quality.py [--questions 10000] [--judge-errs 0.15] [--json FILE]

A Router resource runs in local mode: its process, its SQLite store, its own retraining. Behind it
stand two providers that answer as the demo pair did (recorded, `examples/models/outcomes.jsonl.gz`)
and a judge that names another winner than the truth at a known rate. Planted are: training data in
which a share of the small model's wrong answers is called right, so that the predictor is biased
where it matters; from the sixth tenth on, a small model that gets a share of its right answers
wrong; `kill -9` of the router at half way. A person checks a tenth of the answers (gold labels).

What happened is read where users read it (status, Events), and held against what the fakes know.
Traffic waits while a training runs, which here takes longer than a thousand questions do.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gzip
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tandem_operator.local.cluster import LocalCluster
from tandem_operator.local.state_dir import RunDir
from tandem_operator.manifests import load_text
from tandem_router.testing.fake_server import Seen
from tandem_router.testing.planted_quality import FakeJudge, PlantedProvider, uniform

OUTCOMES = Path(__file__).resolve().parents[1] / "examples" / "models" / "outcomes.jsonl.gz"
ROUTER = """\
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {name: chat}
spec:
  tiers:
  - name: small
    external: {url: SMALL, model: small, usdPer1MInputTokens: "0.5", usdPer1MOutputTokens: "0.5"}
  - name: large
    external: {url: LARGE, model: large, usdPer1MInputTokens: "10", usdPer1MOutputTokens: "30"}
  fallbackTier: large
  predictor:
    deadline: 2s  # a busy machine's
    training: {data: "file://DATA", fromLabels: true, every: 5s, minLabels: MIN_LABELS}
  objective: {qualityFloor: "FLOOR"}
  store: {sqlite: {}}
  learning:
    shadowShare: "SHARE"
    dailyUsd: "CAP"
    capture: Prompts
    judge: {url: JUDGE, model: judge, usdPer1MInputTokens: "2", usdPer1MOutputTokens: "8"}
"""
PRICES = {"small": (0.5, 0.5), "large": (10.0, 30.0), "judge": (2.0, 8.0)}


@dataclass(eq=False)
class Recorded(PlantedProvider):
    """Answers as a model did when it was recorded; `worse`: of its right ones, now wrong."""

    right: dict[str, bool] = field(default_factory=dict)
    worse: float = 0.0
    num_asked: int = 0

    def is_right(self, question: str, model: str) -> bool:
        return self.right[question] and uniform("worse", question) >= self.worse

    def said(self, seen: Seen) -> str:
        self.num_asked += 1
        return super().said(seen)


@dataclass(eq=False)
class CountingJudge(FakeJudge):
    num_asked: int = 0

    def verdict(self, shown: str) -> str:
        self.num_asked += 1
        return super().verdict(shown)


@dataclass(frozen=True)
class Asked:
    """One answered question, and what was true of it when it was asked."""

    at: float
    tier: str
    small: bool
    large: bool

    @property
    def served(self) -> bool:
        return self.small if self.tier == "small" else self.large


def ratio(asked: Sequence[Asked]) -> float:
    """The truth: delivered over all-large."""
    return sum(a.served for a in asked) / max(1, sum(a.large for a in asked))


def outcomes() -> list[dict[str, Any]]:
    with gzip.open(OUTCOMES, "rt") as lines:
        rows = {row["prompt"]: row for row in map(json.loads, lines)}
    found = list(rows.values())
    random.Random(16).shuffle(found)
    return found


class Run:
    """One run; see the module."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        rows = outcomes()
        self.base, self.rows = rows[: args.base], rows[args.base :]
        self.asked: list[Asked] = []
        self.failed: Counter[str] = Counter()
        self.checks: list[dict[str, Any]] = []
        self.num_tried = 0
        self.log: list[str] = []

    def say(self, text: str) -> None:
        line = f"{self.num_tried:6d}  {text}"
        self.log.append(line)
        print(line, flush=True)

    def data(self, folder: Path) -> Path:
        """Training rows in which the small model looks better than it is."""
        path = folder / "base.jsonl"
        with path.open("w") as file:
            for row in self.base:
                small = row["quality"]["small"]
                if not small and uniform("bias", row["prompt"]) < self.args.bias:
                    small = 1.0
                row = {**row, "quality": {**row["quality"], "small": small}}
                file.write(json.dumps(row) + "\n")
        return path

    async def run(self) -> dict[str, Any]:
        args = self.args
        truth = {row["prompt"]: row["quality"] for row in self.rows}
        self.small = Recorded(right={p: bool(q["small"]) for p, q in truth.items()})
        self.large = Recorded(right={p: bool(q["large"]) for p, q in truth.items()})
        self.judge = CountingJudge(errs=args.judge_errs)
        servers = (self.small, self.large, self.judge)
        for server in servers:
            await server.start()
        folder = Path(tempfile.mkdtemp(prefix="live-quality-"))
        text = ROUTER
        for name, value in {
            "SMALL": f"{self.small.url}/v1",
            "LARGE": f"{self.large.url}/v1",
            "JUDGE": f"{self.judge.url}/v1",
            "DATA": str(self.data(folder)),
            "MIN_LABELS": str(args.min_labels),
            "FLOOR": str(args.floor),
            "SHARE": str(args.share),
            "CAP": str(args.cap),
        }.items():
            text = text.replace(name, value)
        try:
            async with LocalCluster(RunDir("live-quality", exact=False), port=8100) as cluster:
                self.cluster = cluster
                await cluster.apply_manifests(load_text(text))
                await cluster.wait_ready(240.0)
                limits = httpx.Limits(max_connections=32)
                async with httpx.AsyncClient(
                    base_url=cluster.url("chat"), timeout=30.0, limits=limits, trust_env=False
                ) as self.client:
                    return await self._traffic()
        finally:
            for server in servers:
                await server.stop()

    async def _traffic(self) -> dict[str, Any]:
        args, num = self.args, self.args.questions
        rng = random.Random(args.seed)
        questions = [row["prompt"] for row in self.rows]
        rng.shuffle(questions)
        questions = [*questions, *rng.choices(questions, k=max(0, num - len(questions)))][:num]
        kill_at, drop_at = num // 2, int(0.6 * num)
        first = self._version(await self._state())
        step = args.step
        killed: dict[str, Any] = {}
        for begin in range(0, num, step):
            if begin == kill_at:
                killed = await self._kill()
            if begin == drop_at:
                self.small.worse = args.drop
                self.dropped_at, self.dropped_asked = time.time(), len(self.asked)
                self.say(
                    f"planted: the small model gets {args.drop:.0%} of its right answers wrong"
                )
            await self._ask_all(questions[begin : begin + step])
            await self._look()
        state = await self._settled()
        return self._result(first, state, killed)

    async def _ask_all(self, questions: Sequence[str]) -> None:
        queue = list(reversed(questions))

        async def ask() -> None:
            while queue:
                await self._ask(queue.pop())

        await asyncio.gather(*(ask() for _ in range(self.args.concurrency)))

    async def _ask(self, question: str) -> None:
        self.num_tried += 1
        message = {"role": "user", "content": question}
        body = {"model": "chat", "messages": [message], "max_tokens": 64}
        try:
            reply = await self.client.post("/v1/chat/completions", json=body)
        except httpx.HTTPError as error:
            self.failed[type(error).__name__] += 1
            return
        if reply.status_code != 200:
            self.failed[str(reply.status_code)] += 1
            return
        right = {
            name: provider.is_right(question, name)
            for name, provider in (("small", self.small), ("large", self.large))
        }
        tier = reply.headers["x-tandem-tier"]
        self.asked.append(Asked(time.time(), tier, right["small"], right["large"]))
        if uniform("gold", question, self.num_tried) < self.args.gold:
            label = {
                "request_id": reply.headers["x-request-id"],
                "quality": {name: float(good) for name, good in right.items()},
                "probability": self.args.gold,
            }
            self.gold.append(label)

    gold: list[dict[str, Any]] = []

    async def _state(self) -> dict[str, Any]:
        async with asyncio.timeout(60):
            while True:
                try:
                    reply = await self.client.get("/admin/state")
                    if reply.status_code == 200:
                        found: dict[str, Any] = reply.json()
                        return found
                except httpx.HTTPError:
                    pass
                await asyncio.sleep(0.2)

    def _version(self, state: dict[str, Any]) -> str:
        return str(state["predictor_artifact"]["version"])

    async def _settled(self) -> dict[str, Any]:
        """Once no shadow answer is under way and no training runs."""
        began = time.monotonic()
        while True:
            state = await self._state()
            busy = state["learning"]["num_under_way"] or state["retraining"]["phase"] == "training"
            due = (
                state["retraining"]["phase"] in ("idle", "watched")
                and state["retraining"]["num_new_labels"] >= self.args.min_labels
                and not state["retraining"]["problem"]
            )
            if not busy and not (due and time.monotonic() - began < 30.0):
                return state
            await asyncio.sleep(0.3)

    async def _look(self) -> None:
        """Gold labels are posted, and what is measured is held against what is true."""
        await self._settled()
        posted, self.gold = self.gold, []
        if posted:
            headers = {"x-tandem-peer-token": self._token()}
            reply = await self.client.post(
                "/admin/labels", json={"labels": posted}, headers=headers
            )
            reply.raise_for_status()
        state = await self._state()
        quality, threshold = state["quality"], state["threshold"]
        since = quality["since"] or 0.0
        # The label of a request is a little younger than its answer.
        true = ratio([a for a in self.asked if a.at >= since - 1.0])
        check = {
            "questions": self.num_tried,
            "true": true,
            **{name: quality[name] for name in ("measured", "low", "high", "predicted")},
            **{name: quality[name] for name in ("num_labels", "num_gold")},
            "covered": None
            if quality["low"] is None
            else quality["low"] - 1e-9 <= true <= quality["high"] + 1e-9,
            "limit": threshold["limit"],
            "basis": threshold["basis"],
            "true_last": ratio(self.asked[-self.args.step :]),
            "large_last": sum(a.tier == "large" for a in self.asked[-self.args.step :])
            / max(1, len(self.asked[-self.args.step :])),
            "spent": state["learning"]["spent_today_usd"],
            "predictor": self._version(state),
            "changes": len(quality["changes"]),
        }
        self.checks.append(check)
        number = "{:.3f}".format

        def shown(value: float | None) -> str:
            return "-" if value is None else number(value)

        self.say(
            f"true {number(true)} measured {shown(check['measured'])} "
            f"[{shown(check['low'])}, {shown(check['high'])}] "
            f"predicted {shown(check['predicted'])} "
            f"labels {check['num_labels']} gold {check['num_gold']} {check['basis']} "
            f"limit {shown(check['limit'])} last {number(check['true_last'])} "
            f"large {check['large_last']:.2f} ${check['spent']:.3f} {check['predictor'][:8]} "
            f"{state['retraining']['phase']} "
            f"{[step['kind'] for step in state['retraining']['steps']][-3:]}"
        )

    async def _kill(self) -> dict[str, Any]:
        """SIGKILL the router in the middle of requests; the node starts it again."""
        state = await self._settled()
        await asyncio.sleep(1.0)  # what the last half second found is not on the disk yet
        before = (await self._state()) | {"settled": state["quality"]["num_labels"]}
        (pid,) = self._pids()
        task = asyncio.create_task(self._ask_all([row["prompt"] for row in self.rows[:200]]))
        await asyncio.sleep(0.15)
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        await task
        async with asyncio.timeout(120):
            while True:
                state = await self._state()
                if state["quality"]["labels_by_source"] and self._pids() != (pid,):
                    break
                await asyncio.sleep(0.2)
        after = state
        found = {
            "failed requests": dict(self.failed),
            "away s": round(time.monotonic() - began, 1),
            "labels before": sum(before["quality"]["labels_by_source"].values()),
            "labels after": sum(after["quality"]["labels_by_source"].values()),
            "spent before": before["learning"]["spent_today_usd"],
            "spent after": after["learning"]["spent_today_usd"],
            "predictor before": self._version(before),
            "predictor after": self._version(after),
        }
        self.say(f"killed: {found}")
        return found

    def _token(self) -> str:
        secret = self.cluster.store.read("Secret", "default", "tandem-peer-token") or {}
        if text := secret.get("stringData", {}).get("token"):
            return str(text)
        return base64.b64decode(secret["data"]["token"]).decode()

    def _pids(self) -> tuple[int, ...]:
        """The router's process, found by its command line; the training is a child of it."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            mine = str(self.cluster.rundir.folder).encode()
            if b"tandem_router" in words and b"--config" in words and mine in b" ".join(words):
                found.append(int(folder.name))
        return tuple(found)

    def _result(self, first: str, state: dict[str, Any], killed: dict[str, Any]) -> dict[str, Any]:
        judge_usd = (
            self.judge.num_asked * (100 * PRICES["judge"][0] + 10 * PRICES["judge"][1]) / 1e6
        )
        tiers = Counter(a.tier for a in self.asked)
        shadows = {
            name: max(0, provider.num_asked - tiers[name])
            for name, provider in (("small", self.small), ("large", self.large))
        }
        shadow_usd = sum(shadows[t] * 5 * sum(PRICES[t]) / 1e6 for t in shadows)
        router = self.cluster.store.read("Router", "default", "chat")
        status = (router or {}).get("status") or {}
        events = [
            f"{e['reason']}: {e.get('message') or e.get('note')}"
            for e in self.cluster.store.find("Event")
            if e.get("reason") in ("PredictorChanged", "QualityDrifted", "ConditionChanged")
        ]
        asked, dropped = self.asked, self.dropped_asked
        told = [one for one in state["quality"]["changes"] if one["at"] >= self.dropped_at]
        told_after = None
        if told:
            told_after = sum(a.at <= told[0]["at"] for a in asked[dropped:])
        covered = [c["covered"] for c in self.checks if c["covered"] is not None]
        late = asked[dropped + (told_after or 0) :]
        return {
            "arguments": {k: str(v) for k, v in vars(self.args).items() if k != "json"},
            "questions answered": len(asked),
            "failed": dict(self.failed),
            "looks that the interval covers": [sum(covered), len(covered)],
            "true ratio before the drop": ratio(asked[:dropped]),
            "true ratio from the drop until it is told": ratio(
                asked[dropped : dropped + (told_after or 0)]
            ),
            "true ratio after it is told": ratio(late),
            "requests until the drop is told": told_after,
            "changes told": state["quality"]["changes"],
            "predictor at the start": first,
            "predictor at the end": self._version(state),
            "life of the predictor": state["retraining"]["steps"],
            "killed": killed,
            "spent, as the router says": state["learning"]["spent_today_usd"],
            "spent, as judge and providers count": judge_usd + shadow_usd,
            "cap": self.args.cap,
            "large share": [
                sum(a.tier == "large" for a in part) / max(1, len(part))
                for part in (asked[:dropped], late)
            ],
            "status.quality": status.get("quality"),
            "status.predictor": status.get("predictor"),
            "conditions": {
                c["type"]: f"{c['status']} {c['reason']}: {c['message']}"
                for c in status.get("conditions", ())
                if c["type"] in ("FloorHeld", "QualityProven", "QualityDrifted", "Learning")
            },
            "events": events,
            "looks": self.checks,
            "log": self.log,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=10_000)
    parser.add_argument("--base", type=int, default=1_200, help="rows that the predictor knows")
    parser.add_argument("--judge-errs", type=float, default=0.15, help="share of wrong verdicts")
    parser.add_argument("--gold", type=float, default=0.1, help="share of answers a person checks")
    parser.add_argument("--bias", type=float, default=0.5, help="of wrong answers called right")
    parser.add_argument("--drop", type=float, default=0.3, help="of right answers that turn wrong")
    parser.add_argument("--share", type=float, default=0.2, help="shadowShare")
    parser.add_argument("--floor", type=float, default=0.9)
    parser.add_argument("--cap", type=float, default=3.0, help="dailyUsd")
    parser.add_argument("--min-labels", type=int, default=300)
    parser.add_argument("--step", type=int, default=250, help="questions between two looks")
    parser.add_argument("--concurrency", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    args = parser.parse_args()
    if args.questions < 1 or args.questions % (10 * args.step):
        parser.error(
            f"--questions {args.questions} is no multiple of ten steps of {args.step}: the router "
            "is killed at five tenths and the drop planted at six, each between two steps"
        )
    result = asyncio.run(Run(args).run())
    print(json.dumps({k: v for k, v in result.items() if k not in ("looks", "log")}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
