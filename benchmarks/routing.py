"""How well and how fast the predictor routes, and what each of its parts is worth.

    python benchmarks/routing.py [--data DIR] [--only NAME ...] [--json FILE]

Each study fits the views as `tandem train` does, predicts rows that neither the views nor their
weights have seen, and prints Markdown tables: the predictor beside its baselines, every view
alone, and the plain average of the views with one left out. `1500 labels` and `speed` use whole
artifacts; `speed` measures one prompt at a time at 200 requests a second. With --json, finished
studies are kept in FILE and not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tandem_router.predictor import loads
from tandem_router.predictor.evaluation import metrics
from tandem_router.predictor.evaluation.predictions import Predictions, predict_rows
from tandem_router.predictor.evaluation.report import make_report
from tandem_router.predictor.reading.embedding import StaticEmbedding
from tandem_router.predictor.records.dataset import Dataset, read_dataset
from tandem_router.predictor.training import answer_verifier, trainer
from tandem_router.predictor.training.options import Options
from tandem_router.predictor.training.views import core_views

ROUTING = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "routing"
DEMO = Path(__file__).resolve().parents[1] / "examples" / "models" / "outcomes.jsonl.gz"
FILES = {
    "demo pair": str(DEMO),
    "mmlu": "mmlu.jsonl.gz",
    "gsm8k": "gsm8k.jsonl.gz",
    "mixed14 llama": "mixed14_llama-31-8b_train.jsonl.gz",
    "mixed14 qwen": "mixed14_qwen25-7b_train.jsonl.gz",
}
Result = dict[str, Any]
#: Bins of equal width and of equal count, each beside what chance alone shows.
ECE = ("ece", "ece_if_perfect", "ece_equal_count", "ece_equal_count_if_perfect")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def folds_study(
    name: str, seeds: int = 1, by_task: bool = False, embedding: StaticEmbedding | None = None
) -> Callable[[Path], Result]:
    def run(folder: Path) -> Result:
        dataset = read_dataset([folder / FILES[name]])
        groups = dataset.groups()
        if by_task:
            groups = np.unique([row.task for row in dataset.rows], return_inverse=True)[1]
        results = []
        for seed in range(seeds):
            say(f"seed {seed}")
            options = Options(seed=seed, embedding=embedding)
            folds = trainer.fold_of(groups, 5, seed)
            start = time.process_time()
            predictions = trainer.out_of_fold(dataset, options, folds, say)
            read = answer_verifier.cross_fit(dataset, folds, seed)
            if read is not None:
                predictions = replace(predictions, cascade=read[0], verdicts=read[1])
            results.append(measured(dataset, predictions, time.process_time() - start))
        return averaged(results)

    return run


def few_labels(folder: Path, num_labels: int = 1500, seeds: int = 3) -> Result:
    dataset = read_dataset([folder / FILES["mmlu"]])
    groups = dataset.groups()
    results = []
    for seed in range(seeds):
        drawn = np.random.default_rng(seed).permutation(np.unique(groups))
        order = np.argsort(np.argsort(drawn)[groups], kind="stable")
        inside, outside = order[:num_labels], order[num_labels:]
        start = time.process_time()
        trained = trainer.train(dataset.take(inside), Options(seed=seed), say)
        spent = time.process_time() - start
        rest = dataset.take(outside)
        results.append(measured(rest, predict_rows(loads(trained.dumps()), rest), spent))
    return averaged(results)


def measured(dataset: Dataset, predictions: Predictions, cpu_s: float) -> Result:
    report = make_report(dataset, predictions, repeats=100, curves=False)
    name, pair = next(
        (name, pair)
        for name, pair in report["pairs"].items()
        if pair["methods"]["predictor"]["apgr"] is not None
    )
    tiers = name.split(" -> ")
    first, second = (predictions.tiers.index(tier) for tier in tiers)
    labels = dataset.quality()
    low, high = (labels[:, dataset.tiers.index(tier)] for tier in tiers)
    known = ~np.isnan(low + high)
    folds = predictions.fold[known]

    def apgr(score: np.ndarray) -> list[float]:
        """Over all rows, and the mean of the folds, whose scores need not be comparable."""
        score, a, b = score[known], low[known], high[known]
        parts = [metrics.apgr(score[folds == f], a[folds == f], b[folds == f]) for f in set(folds)]
        return [
            metrics.apgr(score, a, b) or 0.0,
            float(np.mean([part for part in parts if part is not None])),
        ]

    gains = {view: said[:, second] - said[:, first] for view, said in predictions.views.items()}
    weights = core_views(len(dataset.rows))
    core = {view: weight for view, weight in weights.items() if view in gains}
    rankings = {"predictor": predictions.gain(first, second)}
    for baseline, said in predictions.baselines.items():
        rankings[baseline] = said[:, second] - said[:, first]
    rankings["P(first wrong)"] = -predictions.quality[:, first]
    rankings["oracle"] = high - low
    ablation = {f"view {view}": gain for view, gain in gains.items()}
    ablation["average"] = sum(weight * gains[view] for view, weight in core.items())
    for left_out in core:
        ablation[f"average without {left_out}"] = sum(
            weight * gains[view] for view, weight in core.items() if view != left_out
        )
    said, true = predictions.gain(first, second)[known], (high - low)[known]
    twentieths = np.array_split(np.argsort(said, kind="stable"), 20)
    own = pair["methods"]["predictor"]
    cascade = report["cascade"]
    return {
        "rows": int(known.sum()),
        "apgr": {key: apgr(score) for key, score in rankings.items()},
        "ablation": {key: apgr(score) for key, score in ablation.items()},
        "interval": own["apgr_interval"],
        "saved": [own["saved_at_no_drop"], own["saved_at_1_percent_drop"]],
        "cpt": [own["cpt50"], own["cpt80"]],
        "ece": {tier: [head[key] for key in ECE] for tier, head in report["heads"].items()},
        "gain": [
            float(np.mean([abs(said[r].mean() - true[r].mean()) for r in twentieths])),
            *(float(part[twentieths[0]].mean()) for part in (said, true)),
        ],
        "cascade": cascade and [cascade["apgr"], cascade["apgr_mean_of_folds"]],
        "out_of_distribution": report["out_of_distribution_share"],
        "cpu_s": cpu_s,
    }


def averaged(results: list[Result]) -> Result:
    """The mean of several runs, number by number."""

    def mean(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: mean([value[key] for value in values]) for key in values[0]}
        if isinstance(values[0], list | tuple):
            return [mean(list(part)) for part in zip(*values, strict=True)]
        return None if values[0] is None else float(np.mean(values))

    found: Result = mean(results)
    found["runs"] = len(results)
    found["spread"] = float(np.std([result["apgr"]["predictor"][0] for result in results]))
    return found


REFERENCE = "reference: a sum of 10,000 squares"


def reference(_: str) -> int:
    """A fixed piece of work that tells this machine, and who else is on it, from the predictor."""
    return sum(i * i for i in range(10_000))


def speed(folder: Path, embedding: StaticEmbedding | None = None) -> Result:
    """Latency of one prompt at a time, arriving 200 times a second, one thread.

    `clock_ms` and `cpu_ms` are with pauses, in which others empty the caches; `at_once_ms` is the
    CPU time of the same prompts one after the other.
    """
    dataset = read_dataset([folder / FILES["mmlu"]])
    options = Options(embedding=embedding)
    predictor = loads(trainer.train(dataset, options, say).dumps(), embedding)
    usual = [row.prompt for row in dataset.rows[::5]]
    long = [" ".join(usual[i : i + 60])[:40_000] for i in range(0, 1200, 60)]
    found: Result = {}
    for name, prompts in {
        REFERENCE: usual[:1000],
        "MMLU prompts": usual,
        "8,000-token prompts": long * 70,
        "nine in ten MMLU, one in ten 8,000 tokens": [
            long[i % len(long)] if i % 10 == 0 else prompt for i, prompt in enumerate(usual)
        ],
        "10 MB prompts": ["word " * 2_000_000] * 200,
        f"{REFERENCE}, again": usual[:1000],
    }.items():
        work: Callable[[str], object] = reference if name.startswith(REFERENCE) else predictor.score
        clock, cpu = [], []
        due = time.perf_counter()
        for prompt in prompts:
            due += 1 / 200
            time.sleep(max(due - time.perf_counter(), 0.0))
            start, start_cpu = time.perf_counter(), time.thread_time()
            work(prompt)
            cpu.append(time.thread_time() - start_cpu)
            clock.append(time.perf_counter() - start)
        at_once = []
        for prompt in prompts:
            start_cpu = time.thread_time()
            work(prompt)
            at_once.append(time.thread_time() - start_cpu)
        found[name] = {
            "num_prompts": len(prompts),
            "median_chars": float(np.median([len(prompt) for prompt in prompts])),
            "clock_ms": [float(q) * 1e3 for q in np.quantile(clock, [0.5, 0.99])],
            "cpu_ms": [float(q) * 1e3 for q in np.quantile(cpu, [0.5, 0.99])],
            "at_once_ms": [float(q) * 1e3 for q in np.quantile(at_once, [0.5, 0.99])],
        }
    return found


STUDIES: dict[str, Callable[[Path], Result]] = {
    "mmlu, 5 folds": folds_study("mmlu"),
    "gsm8k, 5 x 5 folds": folds_study("gsm8k", seeds=5),
    "mmlu, 1500 labels": few_labels,
    "mixed14 llama, 5 folds": folds_study("mixed14 llama"),
    "mixed14 qwen, 5 folds": folds_study("mixed14 qwen"),
    "mmlu, unseen subjects": folds_study("mmlu", by_task=True),
    "demo pair, 5 folds": folds_study("demo pair"),
    "speed": speed,
}


def with_embedding(embedding: StaticEmbedding) -> dict[str, Callable[[Path], Result]]:
    names = ("mmlu", "mixed14 llama", "mixed14 qwen")
    found = {
        f"{name}, 5 folds, {embedding.name}": folds_study(name, embedding=embedding)
        for name in names
    }
    return found | {f"speed, {embedding.name}": lambda folder: speed(folder, embedding)}


def tables(found: dict[str, Result]) -> str:
    studies = {name: result for name, result in found.items() if not name.startswith("speed")}
    out = []
    for title, part in (("APGR", "apgr"), ("What each view is worth (APGR)", "ablation")):
        keys = list(dict.fromkeys(key for result in studies.values() for key in result[part]))
        out += [
            f"\n**{title}**\n",
            "| | " + " | ".join(studies) + " |",
            "|---" * (len(studies) + 1) + "|",
        ]
        for key in keys:
            cells = (result[part].get(key) for result in studies.values())
            shown = " | ".join("" if c is None else f"{c[0]:.3f} ({c[1]:.3f})" for c in cells)
            out.append(f"| {key} | {shown} |")
    out += [
        "\n**The predictor, further**\n",
        "| | rows | 95 % interval | CPT50 | CPT80 | saved, no drop | 1 % drop | cascade | CPU s |",
        "|---" * 9 + "|",
    ]
    for name, r in studies.items():
        cascade = f"{r['cascade'][0]:.3f} ({r['cascade'][1]:.3f})" if r["cascade"] else ""
        out.append(
            f"| {name} | {r['rows']:.0f} | {r['interval'][0]:.3f} to {r['interval'][1]:.3f} | "
            f"{r['cpt'][0]:.1%} | {r['cpt'][1]:.1%} | {r['saved'][0]:.1%} | {r['saved'][1]:.1%} | "
            f"{cascade} | {r['cpu_s']:.0f} |"
        )
    out += [
        "\n**Calibration error, in brackets what a perfectly calibrated predictor would show**\n",
        "| | tier | equal width (ECE) | equal count |",
        "|---" * 4 + "|",
    ]
    for name, r in studies.items():
        for tier, (width, by_chance, count, count_by_chance) in r["ece"].items():
            out.append(
                f"| {name} | {tier} | {width:.3f} ({by_chance:.3f}) | "
                f"{count:.3f} ({count_by_chance:.3f}) |"
            )
    out += [
        "\n**Calibration of the gain, over twentieths of the prompts**\n",
        "| | mean distance | lowest twentieth: said | measured |",
        "|---" * 4 + "|",
    ]
    for name, r in studies.items():
        out.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in r["gain"]) + " |")
    for measured_speed in (name for name in found if name.startswith("speed")):
        out += [
            f"\n**{measured_speed.capitalize()}**\n",
            "| prompts | chars | p50 ms | p99 ms | CPU p50 | CPU p99 | without pauses p50 | p99 |",
            "|---" * 8 + "|",
        ]
        for name, r in found[measured_speed].items():
            out.append(
                f"| {name} | {r['median_chars']:,.0f} | {r['clock_ms'][0]:.2f} | "
                f"{r['clock_ms'][1]:.2f} | {r['cpu_ms'][0]:.2f} | {r['cpu_ms'][1]:.2f} | "
                f"{r['at_once_ms'][0]:.2f} | {r['at_once_ms'][1]:.2f} |"
            )
    return "\n".join(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROUTING)
    parser.add_argument("--only", nargs="+", choices=list(STUDIES), metavar="NAME")
    parser.add_argument(
        "--embedding", type=Path, metavar="DIR", help="a local model directory: repeat with it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        print(
            f"error: {arguments.data} does not exist; name the folder with --data", file=sys.stderr
        )
        return 1
    found: dict[str, Result] = {}
    if arguments.json and arguments.json.exists():
        found = json.loads(arguments.json.read_text())
    studies = {name: STUDIES[name] for name in arguments.only or STUDIES}
    if arguments.embedding:
        studies |= with_embedding(StaticEmbedding(arguments.embedding))
    for name, study in studies.items():
        if name not in found:
            say(f"== {name}")
            found[name] = study(arguments.data)
            if arguments.json:
                arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(tables(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
