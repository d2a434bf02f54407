"""Cascade: what reading the small tier's answer is worth, by view and by zone."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from outcomes import DATA, LARGE_PRICE, SMALL_PRICE, Outcomes, load

from tandem_router.predictor.cascade import (
    VIEWS,
    CascadeTerms,
    Verdict,
    VerifierPower,
    Zone,
    choose_zone,
    escalate,
)
from tandem_router.predictor.training.answer_verifier import fit_verifier


def apgr(score: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Mean performance gap recovered over all shares of large calls, exact."""
    step = (q[:, 1] - q[:, 0])[np.argsort(-score, kind="stable")]
    curve = np.concatenate([[0.0], np.cumsum(step)]) / step.sum()
    return float((curve[1:] + curve[:-1]).mean() / 2)


def cascade_study(seeds: Sequence[int]) -> dict[str, object]:
    """The verifier on gsm8k answers: ranking by view, and what the three zones buy."""
    with gzip.open(DATA / "routing" / "gsm8k.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    prompts = [row["prompt"] for row in rows]
    answers = [row["responses"]["small"] for row in rows]
    q = np.array([[row["quality"]["small"], row["quality"]["large"]] for row in rows])
    prior = load("gsm8k")
    ways: dict[str, list[float] | None] = {
        "all views": [1.0] * len(VIEWS),
        "learned before the answer (TF-IDF heads)": None,
    }
    ways |= {f"without {view}": [float(view != other) for other in VIEWS] for view in VIEWS}
    ways |= {f"{view} only": [float(view == other) for other in VIEWS] for view in VIEWS}
    results: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        folds = np.random.default_rng(seed).permutation(len(rows)) % 5
        beliefs = {name: np.zeros((len(rows), 2)) for name in ways}
        for fold in range(5):
            train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            part = [prompts[i] for i in train], [answers[i] for i in train]
            verifier = fit_verifier(*part, q[train])
            part = [prompts[i] for i in test], [answers[i] for i in test]
            for name, views in ways.items():
                if views is not None:
                    mixture = verifier.mixture * [*views, 1.0]
                    beliefs[name][test] = replace(verifier, mixture=mixture).predict(*part)
        for name, views in ways.items():
            gain = beliefs[name][:, 1] - beliefs[name][:, 0] if views else prior.gain
            results.setdefault(name, []).append({"apgr": apgr(gain, q)})
        for price in (0.05, 0.1, 0.2):
            for name, value in zones_utility(beliefs["all views"], prior, q, price).items():
                results.setdefault(f"large costs {price:g} quality points, {name}", []).append(
                    value
                )
    return {
        name: {key: float(np.mean([row[key] for row in rows_])) for key in rows_[0]}
        for name, rows_ in results.items()
    }


def zones_utility(
    belief: NDArray[np.float64], prior: Outcomes, q: NDArray[np.float64], price: float
) -> dict[str, dict[str, float]]:
    """Realised quality less priced calls, for routing, for always verifying, and for zones."""
    terms = CascadeTerms(cost_small=price * SMALL_PRICE[1] / LARGE_PRICE[1], cost_large=price)
    power = VerifierPower.measure(belief[:, 0], q[:, 0])
    outcome: dict[str, list[tuple[float, bool, bool]]] = {}
    for i in range(len(q)):
        escalated = escalate(Verdict(*belief[i]), terms)
        zone = choose_zone(float(prior.p_small[i]), float(prior.p_large[i]), power, terms)
        direct = prior.gain[i] > terms.cost_large - terms.cost_small
        for name, small, large in (
            ("routing before the answer", not direct, direct),
            ("always verify", True, escalated),
            (
                "three zones",
                zone is not Zone.LARGE,
                zone is Zone.LARGE or (zone is Zone.VERIFY and escalated),
            ),
        ):
            outcome.setdefault(name, []).append((q[i, int(large)], small, large))
    table = {}
    for name, rows in outcome.items():
        quality, small, large = np.array(rows, dtype=float).mean(axis=0)
        utility = quality - small * terms.cost_small - large * terms.cost_large
        table[name] = {"utility": utility, "quality": quality, "large_share": large}
    return table
