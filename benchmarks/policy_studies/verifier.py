"""Reading answers on pairs that were never seen: how well, by what, and whether more rows help."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from outcomes import DATA
from sklearn.ensemble import ExtraTreesClassifier

from tandem_router.predictor.cascade import result_features
from tandem_router.predictor.cascade.recomputed import Agreement
from tandem_router.predictor.cascade.verifier import features_of
from tandem_router.predictor.evaluation import metrics
from tandem_router.predictor.training.answer_verifier import fit_verifier

Floats = NDArray[np.float64]

PAIRS = {
    "gsm8k": "routing/gsm8k.jsonl.gz",
    "code prediction": "routing2/crux_qwen7b_72b_dev.jsonl.gz",
    "level-5 mathematics": "routing2/math_l5_qwen7b_o1mini_dev.jsonl.gz",
}
NUM_FOLDS = 5


class _Pair:
    def __init__(self, path: str) -> None:
        with gzip.open(DATA / path, "rt", encoding="utf-8") as lines:
            rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.prompts = [row["prompt"] for row in rows]
        self.answers = [row["responses"]["small"] for row in rows]
        self.groups = [row["group"] for row in rows]
        self.quality = np.array([[row["quality"][t] for t in ("small", "large")] for row in rows])

    def folds(self, seed: int) -> NDArray[np.int64]:
        names = sorted(set(self.groups))
        places = np.random.default_rng(seed).permutation(len(names))
        fold_of = {name: int(place) % NUM_FOLDS for name, place in zip(names, places, strict=True)}
        return np.array([fold_of[name] for name in self.groups])


def _verifier(pair: _Pair, train: NDArray[np.int64], test: NDArray[np.int64]) -> Floats:
    """Out-of-fold qualities of both tiers."""
    fitted = fit_verifier(
        [pair.prompts[i] for i in train], [pair.answers[i] for i in train], pair.quality[train]
    )
    return fitted.predict([pair.prompts[i] for i in test], [pair.answers[i] for i in test])


def _trees(pair: _Pair, train: NDArray[np.int64], test: NDArray[np.int64]) -> Floats:
    """The strongest plain classifier tried on the same features."""
    x = features_of(pair.prompts, pair.answers)
    out = np.zeros((len(test), 2))
    for tier in range(2):
        forest = ExtraTreesClassifier(300, min_samples_leaf=4, max_features=0.3, random_state=0)
        forest.fit(x[train], pair.quality[train, tier] > 0.5)
        out[:, tier] = forest.predict_proba(x[test])[:, -1]
    return out


def _judged(
    pair: _Pair, seeds: Sequence[int], say: Callable[..., Floats], share: float = 1.0
) -> dict[str, float]:
    """share: of the rows outside a fold that is learned from."""
    found = []
    for seed in seeds:
        folds = pair.folds(seed)
        for fold in range(NUM_FOLDS):
            train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            keep = np.random.default_rng(seed).permutation(len(train))[: int(share * len(train))]
            said = say(pair, train[keep], test)
            low, high = pair.quality[test].T
            apgr = metrics.apgr(said[:, 1] - said[:, 0], low, high)
            found.append((apgr, metrics.auc(said[:, 0], low)))
    apgrs, aucs = (
        np.array([v for v in column if v is not None]) for column in zip(*found, strict=True)
    )
    return {
        "rows": int(share * len(pair.prompts) * (1 - 1 / NUM_FOLDS)),
        "apgr": float(apgrs.mean()),
        "apgr_standard_error": float(apgrs.std() / np.sqrt(NUM_FOLDS)),
        "auc": float(aucs.mean()),
    }


def verifier_study(seeds: Sequence[int]) -> dict[str, object]:
    """Mean over held-out folds: one verifier is fitted and others' rows are ranked by it."""
    results: dict[str, object] = {}
    for name, path in PAIRS.items():
        pair = _Pair(path)
        low, high = pair.quality.T
        oracle = metrics.apgr(1.0 - low, low, high)
        results[f"{name}: had it known every wrong answer"] = {"apgr": oracle}
        results[f"{name}: verifier"] = _judged(pair, seeds, _verifier)
        for share in (0.25, 0.5):
            results[f"{name}: of {share:g} of the rows"] = _judged(pair, seeds, _verifier, share)
        unknown = mock.patch.object(result_features, "agreement", return_value=Agreement.UNKNOWN)
        with unknown:
            if name == "code prediction":
                results[f"{name}: programs not run"] = _judged(pair, seeds, _verifier)
            results[f"{name}: forest, programs not run"] = _judged(pair, seeds, _trees)
    return results
