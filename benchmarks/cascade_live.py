"""What the cascade is worth on the demo pair: fewer large calls at the same quality, and its wait.

    python benchmarks/cascade_live.py [--learn 1200] [--test 600] [--json FILE]

Both models of `examples/01-hybrid` answer questions of the suite. From the validation ones (with
the small model's answers and how sure it was of their tokens) a predictor with a verifier is
trained; on the test ones every threshold is tried by the production rules on answers that were
really given, and then the router itself routes them as streams, without and with
`cascade: {streams: true}`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tandem_operator.demo.client import ask_all
from tandem_operator.demo.run import find_example
from tandem_operator.demo.suite import Question, check, generate
from tandem_operator.local.cluster import LocalCluster
from tandem_operator.local.state_dir import RunDir
from tandem_operator.manifests import load_paths
from tandem_router.predictor import load
from tandem_router.predictor.cascade import CascadeTerms, TokenStatistics, choose_zone, escalate
from tandem_router.predictor.cascade.zones import Zone
from tandem_router.predictor.cli import main as tandem
from tandem_router.predictor.evaluation import metrics

OUTCOMES = Path(__file__).resolve().parents[1] / "examples" / "models" / "outcomes.jsonl.gz"


@dataclass(frozen=True)
class Said:
    """One whole answer."""

    text: str
    right: bool
    tokens: TokenStatistics | None


async def whole(client: httpx.AsyncClient, tier: str, questions: Sequence[Question]) -> list[Said]:
    gate = asyncio.Semaphore(12)

    async def one(question: Question) -> Said:
        body = {
            "model": tier,
            "messages": [{"role": "user", "content": question.prompt}],
            "max_tokens": 160,
            "temperature": 0,
            "logprobs": True,
        }
        async with gate:
            reply = await client.post("/v1/chat/completions", json=body)
        reply.raise_for_status()
        (choice,) = reply.json()["choices"]
        text = choice["message"]["content"]
        drawn = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        return Said(text, check(question, text), TokenStatistics.of(drawn))

    return await asyncio.gather(*map(one, questions))


def write_rows(
    path: Path, questions: Sequence[Question], small: list[Said], large: list[Said]
) -> None:
    with path.open("w") as file:
        for question, s, big in zip(questions, small, large, strict=True):
            row: dict[str, Any] = {
                "prompt": question.prompt,
                "quality": {"small": float(s.right), "large": float(big.right)},
                "responses": {"small": s.text},
            }
            if s.tokens is not None:
                row["token_statistics"] = {"small": asdict(s.tokens)}
            file.write(json.dumps(row) + "\n")


def tried(
    artifact: Path, questions: Sequence[Question], small: list[Said], large: list[Said]
) -> dict[str, Any]:
    """Quality and share of large calls of both ways at every threshold, on the answers given."""
    predictor = load(artifact)
    cascade = predictor.cascade
    assert cascade is not None
    p = np.array(
        [[s.quality["small"], s.quality["large"]] for s in map(_score(predictor), questions)]
    )
    verdicts = [
        cascade.weigh(cascade.verifier.verify(question.prompt, s.text, s.tokens), *prior)
        for question, s, prior in zip(questions, small, p, strict=True)
    ]
    q = np.array([[s.right, big.right] for s, big in zip(small, large, strict=True)], dtype=float)
    said = np.array([v.quality_small for v in verdicts])
    curves: dict[str, list[tuple[float, float, float, float]]] = {"routing": [], "cascade": []}
    for threshold in np.linspace(-0.02, 0.6, 63):
        terms = CascadeTerms(0.0, float(threshold))
        direct = p[:, 1] - p[:, 0] > threshold
        zones = [choose_zone(float(a), float(b), cascade.power, terms) for a, b in p]
        asked = np.array(
            [
                zone is Zone.LARGE or (zone is Zone.VERIFY and escalate(verdict, terms))
                for zone, verdict in zip(zones, verdicts, strict=True)
            ]
        )
        read = float(np.mean([zone is Zone.VERIFY for zone in zones]))
        for way, large_calls, share_read in (("routing", direct, 0.0), ("cascade", asked, read)):
            quality = float(np.where(large_calls, q[:, 1], q[:, 0]).mean())
            curves[way].append((float(threshold), float(large_calls.mean()), quality, share_read))
    gain = p[:, 1] - p[:, 0]
    after = np.array([v.gain for v in verdicts])
    return {
        "all small": float(q[:, 0].mean()),
        "all large": float(q[:, 1].mean()),
        "apgr of the prompt": metrics.apgr(gain, q[:, 0], q[:, 1]),
        "apgr of the answer": metrics.apgr(after, q[:, 0], q[:, 1]),
        "auc of the verifier": metrics.auc(said, q[:, 0]),
        "false positive rate": metrics.false_positive_rate(said, q[:, 0]),
        "large calls for a quality": {
            f"all large {drop:+.3f}": {
                way: min((row[1] for row in rows if row[2] >= q[:, 1].mean() + drop), default=1.0)
                for way, rows in curves.items()
            }
            for drop in (0.0, -0.0025, -0.005, -0.01, -0.02, -0.05)
        },
        "curves": curves,
    }


def _score(predictor: Any) -> Any:
    return lambda question: predictor.score(question.prompt)


async def routed(
    cluster: LocalCluster, client: httpx.AsyncClient, questions: Sequence[Question]
) -> dict[str, Any]:
    """What clients get, one stream after the other on an idle pair: waits are not queues."""
    answers = await ask_all(client, "chat", questions, concurrency=1, on_answer=lambda _: None)
    waits: dict[str, list[float]] = {}
    for answer in answers:
        waits.setdefault(answer.reason, []).append(1000.0 * answer.ttft_s)
    ttft = sorted(1000.0 * answer.ttft_s for answer in answers)
    return {
        "quality": statistics.fmean(answer.right for answer in answers),
        "large share": statistics.fmean(answer.tier == "large" for answer in answers),
        "usd per 1,000": 1000.0 * statistics.fmean(answer.cost_usd for answer in answers),
        "ttft ms p50": ttft[len(ttft) // 2],
        "ttft ms p95": ttft[int(0.95 * len(ttft))],
        "ttft ms p50 by reason": {
            reason: (len(found), statistics.median(found)) for reason, found in waits.items()
        },
    }


async def run(args: argparse.Namespace) -> dict[str, Any]:
    manifests = load_paths([str(find_example())])
    folder = Path(tempfile.mkdtemp(prefix="cascade-live-"))
    rundir = RunDir("cascade-live", exact=False)
    learn, test = generate("validation", 11, args.learn), generate("test", 11, args.test)
    timeout = httpx.Timeout(120.0)
    async with LocalCluster(rundir, port=8000) as cluster:
        await cluster.apply_manifests(manifests)
        await cluster.wait_ready(240.0)
        async with httpx.AsyncClient(
            base_url=cluster.url("chat"), timeout=timeout, trust_env=False
        ) as client:
            said = {
                name: [await whole(client, tier, questions) for tier in ("small", "large")]
                for name, questions in (("learn", learn), ("test", test))
            }
            print("answered", flush=True)
            rows, artifact = folder / "answers.jsonl", folder / "pair"
            write_rows(rows, learn, *said["learn"])
            train = ["train", str(OUTCOMES), str(rows), "-o", str(artifact), "--quiet"]
            if await asyncio.to_thread(tandem, train):
                raise SystemExit("the predictor could not be trained")
            print("trained", flush=True)
            result: dict[str, Any] = {"tried": tried(artifact, test, *said["test"]), "live": {}}
            print(json.dumps({k: v for k, v in result["tried"].items() if k != "curves"}, indent=1))
            (router,) = [m for m in manifests if m.obj["kind"] == "Router"]
            spec = router.obj["spec"]
            spec["predictor"] = {"type": "Learned", "artifact": f"file://{artifact}"}
            del spec["objective"]
            for threshold in args.thresholds:
                spec["threshold"] = str(threshold)
                for way, cascade in (("routing", None), ("cascade", {"streams": True})):
                    spec.pop("cascade", None)
                    if cascade is not None:
                        spec["cascade"] = cascade
                    await cluster.apply_manifests([router])
                    await _in_force(client, way, threshold, artifact)
                    live = await routed(cluster, client, test[: args.live])
                    result["live"][f"{way}, threshold {threshold}"] = live
                    print(way, threshold, json.dumps(live), flush=True)
    return result


async def _in_force(client: httpx.AsyncClient, way: str, threshold: float, artifact: Path) -> None:
    version = load(artifact).version
    async with asyncio.timeout(120):
        while True:
            try:
                state = (await client.get("/admin/state")).json()
                points = state["set_points"]["gain_threshold"]
                same = (state["cascade"] is None) == (way == "routing")
                if same and points == threshold and version in state["predictor"]:
                    return
            except (httpx.HTTPError, KeyError, ValueError):
                pass
            await asyncio.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--learn", type=int, default=1200, help="questions to learn from")
    parser.add_argument("--test", type=int, default=600, help="questions to judge on")
    parser.add_argument("--live", type=int, default=300, help="of these, routed as streams")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args()
    result = asyncio.run(run(args))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
