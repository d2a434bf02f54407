"""Does a predictor know pairs of models it has never seen? Leave one pair out over all public sets.

    python benchmarks/routing_prior.py [--data DIR] [--rows N] [--json FILE]

Every set's tiers become `small` and `large` (of four tiers, the cheapest and the best). A predictor
is trained on at most N rows of each of the other sets and ranks the rows of the one left out,
beside random and prompt length; the two sets of the same prompts are left out together. An
artifact of public outcomes ships only where it beats both on unseen pairs, with intervals. With
--json, finished sets are kept in FILE.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from tandem_router.predictor import loads
from tandem_router.predictor.evaluation import metrics
from tandem_router.predictor.records.dataset import Dataset, read_dataset
from tandem_router.predictor.training import trainer
from tandem_router.predictor.training.options import Options

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
SETS = {
    "mmlu": "routing/mmlu.jsonl.gz",
    "gsm8k": "routing/gsm8k.jsonl.gz",
    "mixed14 llama": "routing/mixed14_llama-31-8b_train.jsonl.gz",
    "mixed14 qwen": "routing/mixed14_qwen25-7b_train.jsonl.gz",
    "reasoning gym": "routing2/reasoning_gym_scout_maverick_dev.jsonl.gz",
    "crux": "routing2/crux_qwen7b_72b_dev.jsonl.gz",
    "math level 5": "routing2/math_l5_qwen7b_o1mini_dev.jsonl.gz",
    "paretobandit": "routing2/paretobandit_k4_dev.jsonl.gz",
}
TOGETHER = ("mixed14 llama", "mixed14 qwen")


def as_pair(dataset: Dataset) -> Dataset:
    """The worst and the best tier on average as small and large, and the grades alone."""
    means = np.nanmean(dataset.quality(), axis=0)
    small, large = dataset.tiers[int(means.argmin())], dataset.tiers[int(means.argmax())]
    rows = tuple(
        replace(
            row,
            quality={"small": row.quality[small], "large": row.quality[large]},
            samples={},
            output_tokens={},
            responses={},
            cost_usd={},
        )
        for row in dataset.rows
    )
    return replace(dataset, rows=rows, tiers=("small", "large"))


def drawn(dataset: Dataset, count: int) -> Dataset:
    return dataset.take(np.random.default_rng(0).permutation(len(dataset.rows))[:count])


def study(name: str, sets: dict[str, Dataset], count: int) -> dict[str, list[float]]:
    """APGR, and the lead over length, each with its interval, on the set left out."""
    absent = TOGETHER if name in TOGETHER else (name,)
    others = [drawn(dataset, count) for other, dataset in sets.items() if other not in absent]
    mixed = replace(others[0], rows=tuple(row for part in others for row in part.rows))
    predictor = loads(trainer.train(mixed, Options()).dumps())
    asked = drawn(sets[name], count)
    score = np.array([predictor.score(row.prompt).gain(("small", "large")) for row in asked.rows])
    length = np.array([float(len(row.prompt)) for row in asked.rows])
    low, high = asked.quality().T
    lead, own = [], []
    for rows in metrics.resamples(asked.groups(), 200, 0):
        mine = metrics.apgr(score[rows], low[rows], high[rows])
        by_length = metrics.apgr(length[rows], low[rows], high[rows])
        if mine is not None and by_length is not None:
            own.append(mine)
            lead.append(mine - by_length)
    found = metrics.apgr(score, low, high) or 0.5
    by_length = metrics.apgr(length, low, high) or 0.5
    return {
        "apgr": [found, *np.quantile(own, [0.025, 0.975])],
        "length": [by_length],
        "lead": [found - by_length, *np.quantile(lead, [0.025, 0.975])],
    }


def table(found: dict[str, dict[str, list[float]]]) -> str:
    out = [
        "| left out | APGR of the others' predictor | length | lead over length |",
        "|---" * 4 + "|",
    ]
    for name, r in found.items():
        out.append(
            f"| {name} | {r['apgr'][0]:.3f} ({r['apgr'][1]:.3f} to {r['apgr'][2]:.3f}) | "
            f"{r['length'][0]:.3f} | {r['lead'][0]:+.3f} ({r['lead'][1]:+.3f} to "
            f"{r['lead'][2]:+.3f}) |"
        )
    chance = sum(r["apgr"][1] > 0.5 for r in found.values())
    ahead = sum(r["lead"][1] > 0.0 for r in found.values())
    behind = sum(r["lead"][2] < 0.0 or r["apgr"][2] < 0.5 for r in found.values())
    out.append(
        f"\nAbove chance on {chance} of {len(found)} pairs, above length on {ahead}, below either "
        f"on {behind} (95 % intervals)."
    )
    return "\n".join(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        print(f"error: {arguments.data} does not exist; name it with --data", file=sys.stderr)
        return 1
    sets = {name: as_pair(read_dataset([arguments.data / file])) for name, file in SETS.items()}
    done: dict[str, dict[str, list[float]]] = {}
    if arguments.json and arguments.json.exists():
        done = json.loads(arguments.json.read_text())
    for name in sets:
        if name in done:
            continue
        print(f"without {name}", file=sys.stderr, flush=True)
        done[name] = study(name, sets, arguments.rows)
        if arguments.json:
            arguments.json.write_text(json.dumps(done, indent=1) + "\n")
    print(table(done))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
