"""Real outcomes as arrays, with out-of-fold scores, for the policy and cache benchmarks.

Reads `shared/data/routing` and `shared/data/traces/azure2023` (see its README for sources and
licences). The scores here are a plain TF-IDF pair of heads, so that these benchmarks measure the
policy and not a particular predictor.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
SMALL_PRICE = (0.27, 0.27)  # USD per million tokens in/out, Mixtral-8x7B class
LARGE_PRICE = (10.0, 30.0)  # GPT-4-1106 class, as RouteLLM compares

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Outcomes:
    """One routing set: measured qualities and out-of-fold predictions, row by row."""

    name: str
    prompts: list[str]
    small: Floats
    large: Floats
    p_small: Floats
    p_large: Floats
    prompt_tokens: NDArray[np.int64]

    @property
    def gain(self) -> Floats:
        """Predicted quality of large minus small."""
        return self.p_large - self.p_small

    def __len__(self) -> int:
        return len(self.prompts)


def load(name: str, seed: int = 0, limit: int | None = None) -> Outcomes:
    """Read `routing/<name>.jsonl.gz` and score it out of fold; scores are kept for an hour's use.

    Raises:
        SystemExit: the data is not there.
    """
    path = DATA / "routing" / f"{name}.jsonl.gz"
    if not path.exists():
        raise SystemExit(f"{path} is absent; these benchmarks need the shared data folder")
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines][:limit]
    prompts = [row["prompt"] for row in rows]
    quality = np.array([[row["quality"]["small"], row["quality"]["large"]] for row in rows])
    scores = _scores(name, prompts, quality, np.array([row["group"] for row in rows]), seed)
    tokens = np.array([max(1, len(prompt) // 4) for prompt in prompts])
    return Outcomes(name, prompts, quality[:, 0], quality[:, 1], scores[0], scores[1], tokens)


def _scores(
    name: str, prompts: list[str], quality: Floats, groups: NDArray[np.str_], seed: int
) -> Floats:
    """(2, num_rows): P(good) of small and large, five folds by group."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    digest = hashlib.sha256(f"{name}{len(prompts)}{seed}".encode()).hexdigest()[:12]
    folder = Path(os.environ.get("TANDEM_BENCH_CACHE", Path.home() / ".cache" / "tandem-bench"))
    kept = folder / f"scores-{digest}.npy"
    if kept.exists():
        return np.asarray(np.load(kept, allow_pickle=False))
    scores = np.zeros((2, len(prompts)))
    folds = GroupKFold(5, shuffle=True, random_state=seed)
    for train, test in folds.split(prompts, groups=groups):
        words = TfidfVectorizer(
            ngram_range=(1, 2), min_df=2, sublinear_tf=True, max_features=40_000
        )
        x_train = words.fit_transform([prompts[i] for i in train])
        x_test = words.transform([prompts[i] for i in test])
        for head in range(2):
            labels = quality[train, head] >= 0.5
            model = LogisticRegression(C=1.0, max_iter=200).fit(x_train, labels)
            scores[head, test] = model.predict_proba(x_test)[:, 1]
    folder.mkdir(parents=True, exist_ok=True)
    np.save(kept, scores)
    return scores


def load_tiers(name: str) -> tuple[Floats, Floats, list[str]]:
    """Of `routing2/<name>`: measured quality (num_rows, num_tiers), out-of-fold ridge, the names.

    Raises:
        SystemExit: the data is not there.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GroupKFold

    path = DATA / "routing2" / f"{name}.jsonl.gz"
    if not path.exists():
        raise SystemExit(f"{path} is absent; these benchmarks need the shared data folder")
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    names = list(rows[0]["quality"])
    quality = np.array([[row["quality"][tier] for tier in names] for row in rows])
    predicted = np.zeros_like(quality)
    prompts, groups = [row["prompt"] for row in rows], [row["group"] for row in rows]
    for train, test in GroupKFold(5, shuffle=True, random_state=0).split(prompts, groups=groups):
        words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        model = Ridge(alpha=3.0).fit(
            words.fit_transform([prompts[i] for i in train]), quality[train]
        )
        predicted[test] = model.predict(words.transform([prompts[i] for i in test]))
    return quality, np.clip(predicted, 0.0, 1.0), names


def azure_arrivals(kind: str = "conv") -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """Arrival times in seconds from the first, prompt tokens and answer tokens of the trace."""
    path = DATA / "traces" / "azure2023" / f"AzureLLMInferenceTrace_{kind}.csv"
    if not path.exists():
        raise SystemExit(f"{path} is absent; these benchmarks need the shared data folder")
    with path.open() as lines:
        rows = list(csv.DictReader(lines))
    stamps = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    seconds = np.array([(stamp - stamps[0]).total_seconds() for stamp in stamps])
    prompt = np.array([int(row["ContextTokens"]) for row in rows])
    answer = np.array([int(row["GeneratedTokens"]) for row in rows])
    order = np.argsort(seconds, kind="stable")
    return seconds[order], prompt[order], answer[order]


def markdown(results: dict[str, object], level: int = 3) -> str:
    """Nested results as Markdown tables: a dict of dicts of numbers is one table."""
    parts = []
    for title, rows in results.items():
        if not isinstance(rows, dict):
            continue
        nested = all(
            isinstance(row, dict) and all(isinstance(v, dict) for v in row.values())
            for row in rows.values()
        )
        parts.append(f"{'#' * level} {title}\n")
        if nested:
            parts.append(markdown(rows, level + 1))
            continue
        by_columns: dict[tuple[str, ...], list[tuple[str, dict[str, float]]]] = {}
        for name, row in rows.items():
            by_columns.setdefault(tuple(row), []).append((name, row))
        for names, members in by_columns.items():
            lines = ["| | " + " | ".join(name.replace("_", " ") for name in names) + " |"]
            lines.append("|---" * (len(names) + 1) + "|")
            for name, row in members:
                cells = ("-" if v != v else f"{v:.4g}" for v in row.values())
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)
