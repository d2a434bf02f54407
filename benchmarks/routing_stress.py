"""Is the predictor safe on a pair of models nobody tuned it for? Many small and odd cases.

    python benchmarks/routing_stress.py [--data DIR] [--seeds N] [--json FILE]

A case is a pair of models, a part of its prompts, a number of labels and a seed. Pairs: the four
public ones and one made of them (the two 8B models of the 14 tasks against each other). Parts: all
prompts, each of the three kinds of task alone, and kinds of task or subjects that the labels do
not cover. Every case is trained from nothing and tested on rows of other groups; the predictor
stands beside each baseline of `tandem evaluate` learned from the same labels. With --json,
finished cases are kept in FILE.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tandem_router.predictor.evaluation import baselines, metrics
from tandem_router.predictor.records.dataset import Dataset, read_dataset
from tandem_router.predictor.training import stacking, trainer
from tandem_router.predictor.training.corpus import Corpus
from tandem_router.predictor.training.options import Options
from tandem_router.predictor.training.views import core_views, cross_fit, default_views

ROUTING = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "routing"
FILES = {
    "mmlu": "mmlu.jsonl.gz",
    "gsm8k": "gsm8k.jsonl.gz",
    "llama": "mixed14_llama-31-8b_train.jsonl.gz",
    "qwen": "mixed14_qwen25-7b_train.jsonl.gz",
}
NUM_LABELS = (300, 800, 1500, 3000, 4500)
MIN_TEST_ROWS = 250
#: Two models nearer than this are not worth a router, and an APGR of their gap is noise.
MIN_GAP = 0.03


@dataclass(frozen=True)
class Grouped:
    """What drawing a case needs of a pair's rows."""

    groups: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Case:
    """Rows to train on and to test on, of one pair."""

    name: str
    pair: str
    num_labels: int
    seed: int
    inside: np.ndarray
    outside: np.ndarray

    @property
    def key(self) -> str:
        return f"{self.name}, {self.num_labels}, {self.seed}"


def pairs(folder: Path) -> dict[str, Dataset]:
    found = {name: read_dataset([folder / file]) for name, file in FILES.items()}
    qwen = {row.prompt: row.quality["small"] for row in found["qwen"].rows}
    rows = tuple(
        replace(row, quality={"small": qwen[row.prompt], "large": row.quality["small"]})
        for row in found["llama"].rows
    )
    return found | {"qwen to llama": replace(found["llama"], rows=rows)}


def cases(found: dict[str, Dataset], seeds: int) -> Iterator[Case]:
    for pair, dataset in found.items():
        grouped = Grouped(dataset.groups(), dataset.quality())
        tasks = np.array([row.task for row in dataset.rows])
        parts = {pair: np.arange(len(tasks))}
        if pair not in ("mmlu", "gsm8k"):
            parts |= {f"{pair}, kind {kind}": np.flatnonzero(tasks == kind) for kind in "012"}
        for name, rows in parts.items():
            for num_labels in NUM_LABELS:
                for seed in range(seeds):
                    yield from case(grouped, name, pair, num_labels, seed, rows, rows)
        for seed in range(seeds):
            if pair == "mmlu":
                known = np.random.default_rng(seed).permutation(np.unique(tasks))
                unseen = np.isin(tasks, known[: len(known) // 2])
                name = "mmlu, unseen subjects"
            elif pair != "gsm8k":
                unseen = tasks == "012"[seed % 3]
                name = f"{pair}, kind {'012'[seed % 3]} unseen"
            else:
                continue
            rows, others = np.flatnonzero(~unseen), np.flatnonzero(unseen)
            yield from case(grouped, name, pair, 1500, seed, rows, others)


def case(
    dataset: Grouped,
    name: str,
    pair: str,
    num_labels: int,
    seed: int,
    train_on: np.ndarray,
    test_on: np.ndarray,
) -> Iterator[Case]:
    """A draw of whole groups; nothing where too few rows remain or the models are too near."""
    groups = dataset.groups
    drawn = np.random.default_rng(1000 + seed).permutation(groups.max() + 1)[groups]
    inside = train_on[np.argsort(drawn[train_on], kind="stable")][:num_labels]
    outside = test_on[~np.isin(groups[test_on], groups[inside])]
    labels = dataset.labels[outside]
    gap = float((labels[:, 1] - labels[:, 0]).mean()) if len(labels) else 0.0
    if len(inside) == num_labels and len(outside) >= MIN_TEST_ROWS and gap >= MIN_GAP:
        yield Case(name, pair, num_labels, seed, np.sort(inside), outside)


def run(case: Case, dataset: Dataset, corpus: Corpus) -> dict[str, Any]:
    """APGR of every method on the case's test rows, and the predictor's standard error."""
    known, asked = dataset.take(case.inside), dataset.take(case.outside)
    options = Options(seed=case.seed)
    labels = known.quality()
    folds = trainer.fold_of(known.groups(), options.num_folds, case.seed)
    views = default_views(options)
    core = core_views(len(known.rows))
    layout = stacking.Layout(dataset.tiers, tuple(views), core, ((0, 1),), dataset.tiers)
    inside, outside = corpus.take(case.inside), corpus.take(case.outside)
    outputs, _ = cross_fit(inside, labels, folds, views)
    stack = stacking.fit(outputs, labels, folds, layout)
    said = np.stack([view.fit(inside, labels).predict(outside) for view in views.values()], axis=1)
    quality, utility = stack.apply(said)
    facts = baselines.training_facts(known)
    rivals = baselines.baselines(asked, dataset.tiers, said, list(views), facts)
    scores = {"predictor": utility[:, 1] - utility[:, 0], "P(first wrong)": -quality[:, 0]}
    scores |= {name: value[:, 1] - value[:, 0] for name, value in rivals.items()}
    low, high = asked.quality().T
    samples = list(metrics.resamples(asked.groups(), 100, 0))

    def apgr(name: str, rows: np.ndarray) -> float:
        return metrics.apgr(scores[name][rows], low[rows], high[rows]) or 0.0

    everything = np.arange(len(low))
    found = {name: apgr(name, everything) for name in scores}
    best = max((name for name in found if name != "predictor"), key=lambda name: found[name])
    ahead = [apgr("predictor", rows) - apgr(best, rows) for rows in samples]
    return {
        "name": case.name,
        "num_labels": case.num_labels,
        "gap": float((high - low).mean()),
        "apgr": found,
        "best": best,
        "error": float(np.std(ahead)),
    }


def tables(results: list[dict[str, Any]]) -> str:
    """What each method loses against the best baseline of each case, then every part."""

    def behind(result: dict[str, Any], method: str) -> float:
        return float(result["apgr"].get(method, 0.5) - result["apgr"][result["best"]])

    methods = list(dict.fromkeys(name for result in results for name in result["apgr"]))
    out = [
        f"{len(results)} cases\n",
        "| always use | mean APGR | mean distance to the case's best baseline | worst "
        "| cases more than 0.01 below | more than two standard errors below |",
        "|---" * 6 + "|",
    ]
    for method in methods:
        gaps = np.array([behind(result, method) for result in results])
        apgr = np.mean([result["apgr"].get(method, 0.5) for result in results])
        unlucky = ""
        if method == "predictor":
            errors = np.array([result["error"] for result in results])
            unlucky = f"{np.count_nonzero(gaps < -2 * errors)}"
        out.append(
            f"| {method} | {apgr:.3f} | {gaps.mean():+.3f} | {gaps.min():+.3f} | "
            f"{np.count_nonzero(gaps < -0.01)} | {unlucky} |"
        )
    out += [
        "\n| mean distance to the best baseline | "
        + " | ".join(f"{count} labels" for count in NUM_LABELS)
        + " |",
        "|---" * (1 + len(NUM_LABELS)) + "|",
    ]
    for method in ("predictor", "trees", "TF-IDF pair", "prompt length", "P(first wrong)"):
        cells = []
        for count in NUM_LABELS:
            own = [behind(r, method) for r in results if r["num_labels"] == count]
            cells.append(f"{np.mean(own):+.3f}" if own else "")
        out.append(f"| {method} | {' | '.join(cells)} |")
    names = list(dict.fromkeys(result["name"] for result in results))
    out += [
        "\n| pair and part | quality gap | "
        + " | ".join(f"{count} labels" for count in NUM_LABELS)
        + " | best baselines |",
        "|---" * (3 + len(NUM_LABELS)) + "|",
    ]
    for name in names:
        own = [result for result in results if result["name"] == name]
        cells = []
        for count in NUM_LABELS:
            part = [result for result in own if result["num_labels"] == count]
            if part:
                apgr = np.mean([result["apgr"]["predictor"] for result in part])
                gap = np.mean([behind(result, "predictor") for result in part])
                error = np.sqrt(np.mean([result["error"] ** 2 for result in part]) / len(part))
                cells.append(f"{apgr:.3f} ({gap:+.3f} ± {error:.3f})")
            else:
                cells.append("")
        best = ", ".join(sorted({result["best"] for result in own}))
        gap = np.mean([result["gap"] for result in own])
        out.append(f"| {name} | {gap:.3f} | {' | '.join(cells)} | {best} |")
    return "\n".join(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROUTING)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        print(
            f"error: {arguments.data} does not exist; name the folder with --data", file=sys.stderr
        )
        return 1
    done: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        done = json.loads(arguments.json.read_text())
    found = pairs(arguments.data)
    corpora: dict[str, Corpus] = {}
    wanted = list(cases(found, arguments.seeds))
    for number, each in enumerate(wanted, 1):
        if each.key in done:
            continue
        print(f"{number} of {len(wanted)}: {each.key}", file=sys.stderr, flush=True)
        if each.pair not in corpora:
            corpora[each.pair] = Corpus.of([row.prompt for row in found[each.pair].rows])
        done[each.key] = run(each, found[each.pair], corpora[each.pair])
        if arguments.json:
            arguments.json.write_text(json.dumps(done, indent=1) + "\n")
    print(tables([done[each.key] for each in wanted]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
