"""A tier that comes later, on the ParetoBandit stream with each request's real dollars.

Some tiers are known to the predictor; a further one comes after a third of the requests, priced but
never seen. Decisions, budget, exploration and the estimate of the new tier are the production ones.
What exploring costs is paid from the same budget.
"""

from __future__ import annotations

import gzip
import json
import random
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from outcomes import DATA

from tandem_router.control import BudgetPacer, OnlineControl, budget_bucket
from tandem_router.policy import (
    PlainScore,
    PolicySetPoints,
    PolicyState,
    RouteRequest,
    TierOption,
    decide,
)
from tandem_router.quality.budget_share import BudgetShare
from tandem_router.quality.shadow_gate import Explored, ShadowGate
from tandem_router.routing.new_tiers import EXPLORED_SHARE, NewTiers
from tandem_router.store.records import Label

Floats = NDArray[np.float64]

SHARE, WINDOW = 0.02, 50
#: What is held for an answer, in means of its tier.
MOST_TOKENS = 3
#: (the new tier, the tiers known before, budget per request in US dollars)
CASES = (
    ("mistral-large", ("llama-8b", "gemini-pro"), 0.001),
    ("gemini-flash", ("llama-8b", "gemini-pro"), 0.002),
    ("llama-8b", ("mistral-large", "gemini-flash", "gemini-pro"), 0.0006),
    ("llama-8b", ("mistral-large", "gemini-flash", "gemini-pro"), 0.002),
)


def costs_of(name: str, tiers: Sequence[str]) -> Floats:
    with gzip.open(DATA / "routing2" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return np.array([[json.loads(line)["cost_usd"][tier] for tier in tiers] for line in lines])


def _run(
    quality: Floats, predicted: Floats, costs: Floats, names: list[str],
    new: str, usd_per_request: float, seed: int, known_at_once: bool,
) -> dict[str, float | Floats]:  # fmt: skip
    """One pass, a request a second. known_at_once: the predictor knows the new tier as it comes."""
    rng, order = random.Random(seed), np.random.default_rng(seed).permutation(2 * len(quality))
    means = costs.mean(axis=0)
    by_price = tuple(names[i] for i in np.argsort(means))
    options = {n: TierOption(n, True, 0.0, m * 1e6) for n, m in zip(names, means, strict=True)}
    lengths = dict.fromkeys(names, 1.0)  # one token costs what a mean answer does
    known = tuple(name for name in names if name != new)
    bucket = budget_bucket(usd_per_request * 3600.0, 0.0, 300.0)
    control = OnlineControl(PolicySetPoints(gain_threshold=0.0), pacer=BudgetPacer(bucket, 0.0))
    state, learned, share, at_now = PolicyState(), NewTiers(), BudgetShare(), [0.0]

    def closed(tier: str, exploring: bool) -> str | None:
        return "used up" if share.is_used_up(at_now[0], usd_per_request, exploring) else None

    gate = ShadowGate(SHARE, closed)
    arrives = len(order) // 3
    served, spent, learning, delivered = np.zeros(len(order)), 0.0, 0.0, 0.0
    for at, place in enumerate(order):
        row, now, here = place % len(quality), float(at), at >= arrives
        at_now[0] = now
        if at == arrives and not known_at_once:
            learned.set_tiers(by_price, known)
        tiers = [options[name] for name in names if here or name != new]
        stated = {
            name: float(predicted[row, i])
            for i, name in enumerate(names)
            if name != new or (known_at_once and here)
        }
        score = learned.complete(PlainScore(stated, None, False, lengths))
        decision = decide(
            RouteRequest(0, score, max_tokens=MOST_TOKENS), tiers, control.set_points(now), state
        )
        if decision.tier is None:
            continue
        bucket.hold(now, decision.reserve_cost_usd)
        control.decided(now, decision, 1)
        state.record(decision.tier)
        taken = names.index(decision.tier)
        usd = float(costs[row, taken])
        bucket.settle(now, decision.reserve_cost_usd, usd)
        control.answered(decision.tier, decision.expected_cost_usd, usd)
        spent, delivered = spent + usd, delivered + float(quality[row, taken])
        served[at] = decision.tier == new
        if not here or known_at_once:
            continue
        looks = learned.to_explore
        dearest = by_price[-1]
        draw = gate.draw(
            now, rng.random(), decision.tier, by_price[0], dearest, False,
            Explored(looks, EXPLORED_SHARE, False) if looks else None,
        )  # fmt: skip
        if draw is None:
            continue
        paid = float(costs[row, names.index(draw.tier)])
        if not bucket.hold(now, paid):
            continue
        bucket.settle(now, paid, paid)
        share.pay(now, usd_per_request, paid)
        gate.look_again()
        learning += paid
        compared = {draw.tier, decision.tier}
        said = {tier: float(quality[row, names.index(tier)]) for tier in compared}
        learned.learn(Label(str(at), "judge", now, "a", decision.tier, draw.probability, said,
                            predicted=stated))  # fmt: skip
    return {
        "served": served[arrives:],
        "spend": (spent + learning) / (usd_per_request * len(order)),
        "learning": learning / (usd_per_request * len(order)),
        "quality": delivered / len(order),
    }


def _adopted(served: Floats, worth: float) -> float:
    """Requests until the last `WINDOW` give the new tier half of what it is worth; inf: never."""
    recent: deque[float] = deque(maxlen=WINDOW)
    for at, one in enumerate(served):
        recent.append(one)
        if at + 1 >= WINDOW and sum(recent) >= 0.5 * worth * WINDOW:
            return float(at + 1)
    return float("inf")


def new_tier_study(
    quality: Floats, predicted: Floats, names: list[str], seeds: Sequence[int]
) -> dict[str, object]:
    table: dict[str, object] = {}
    for new, before, usd in CASES:
        here = [names.index(tier) for tier in (*before, new)]
        part, said = quality[:, here], predicted[:, here]
        costs = costs_of("paretobandit_k4_dev", [*before, new])
        runs, worths = [], []
        for seed in seeds:
            told = _run(part, said, costs, [*before, new], new, usd, seed, known_at_once=True)
            worths.append(float(np.mean(told["served"])))
            late = _run(part, said, costs, [*before, new], new, usd, seed, known_at_once=False)
            runs.append((told, late))
        worth = float(np.mean(worths))
        used = [
            (
                _adopted(np.asarray(told["served"]), worth),
                _adopted(np.asarray(late["served"]), worth),
            )
            if worth > 0.02
            else (float("nan"), float("nan"))
            for told, late in runs
        ]
        later = np.array([late - told for told, late in used])
        spends = [float(run["spend"]) for _, run in runs]  # type: ignore[arg-type]
        table[f"{new} beside {', '.join(before)}, ${usd:g} a request"] = {
            "share it is worth": worth,
            "share it got": float(np.mean([np.mean(run["served"]) for _, run in runs])),
            "requests until adopted, known at once": float(np.median([told for told, _ in used])),
            "not known": float(np.median([late for _, late in used])),
            "later by, median": float(np.median(later)),
            "later by, most": float(np.max(later)),
            "quality": float(np.mean([float(r["quality"]) for _, r in runs])),  # type: ignore[arg-type]
            "quality, known at once": float(np.mean([float(t["quality"]) for t, _ in runs])),  # type: ignore[arg-type]
            "spend over ceiling, mean": float(np.mean(spends)),
            "most": float(np.max(spends)),
            "of it learning": float(np.mean([float(r["learning"]) for _, r in runs])),  # type: ignore[arg-type]
        }
    return table
