"""What caching by saved cost is worth, jointly with tier choice, on real outcomes.

    python benchmarks/cache.py [drift] [--requests 20000] [--json FILE]

Queries are rows of mmlu and gsm8k with their measured outcomes, drawn by a Zipf law; a query's
answer lengths are drawn from Azure's conversation trace once and stay. A selector of accuracy a
knows with probability a (per query, fixed) whether the small tier's answer is good where the large
tier's is; when it says small and is wrong, the answer is escalated, so both tiers are paid, as in
Zhu et al. 2023, section 6. The prices are those of `outcomes.py`.

Compared: eviction LRU, GDSF and LEC, each with always-large and with a selector; and "joint",
where the choice also counts how often the answer will be reused (quality instead of escalation).

drift: what is wanted changes: every 2,000 requests the queries move up by a twentieth of the ranks,
so that those most wanted are soon the least. The sketch halves its counts every 10,000 requests.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from outcomes import LARGE_PRICE, SMALL_PRICE, azure_arrivals, load, markdown

from tandem_router.cache import (
    CachedAnswer,
    Eviction,
    FrequencySketch,
    ResponseCache,
    cache_key,
    worth_upgrading,
)
from tandem_router.policy import (
    PlainScore,
    PolicySetPoints,
    RouteRequest,
    TierOption,
    cost_usd,
    decide,
)

SMALL = TierOption("small", True, *SMALL_PRICE)
LARGE = TierOption("large", True, *LARGE_PRICE)
SALT = b"benchmark-salt-16"
BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class World:
    """All queries and a sequence of requests for them."""

    keys: list[bytes]
    cost: NDArray[np.float64]  # (num_queries, 2) USD
    tokens: NDArray[np.int64]  # answer length
    prompt_tokens: NDArray[np.int64]
    quality: NDArray[np.float64]  # (num_queries, 2)
    p: NDArray[np.float64]  # (num_queries, 2) predicted
    sequence: NDArray[np.int64]


DRIFT_EVERY, DRIFT_BY = 2_000, 0.05


def make_world(exponent: float, num_requests: int, seed: int, drifts: bool = False) -> World:
    rng = np.random.default_rng(seed)
    sets = [load("mmlu"), load("gsm8k")]
    quality = np.concatenate([np.stack([s.small, s.large], axis=1) for s in sets])
    p = np.concatenate([np.stack([s.p_small, s.p_large], axis=1) for s in sets])
    count = len(quality)
    _, prompts, answers = azure_arrivals("conv")
    rows = rng.integers(0, len(answers), count)
    cost = np.array(
        [[cost_usd(t, int(prompts[r]), int(answers[r])) for t in (SMALL, LARGE)] for r in rows]
    )
    popularity = 1.0 / np.arange(1, count + 1) ** exponent
    order = rng.permutation(count)
    ranks = rng.choice(count, size=num_requests, p=popularity / popularity.sum())
    if drifts:
        ranks += np.arange(num_requests) // DRIFT_EVERY * int(DRIFT_BY * count)
    sequence = order[ranks % count]
    keys = [cache_key(SALT, "", {"prompt": i, "temperature": 0}) or b"" for i in range(count)]
    return World(keys, cost, answers[rows], prompts[rows], quality, p, sequence)


def run(
    world: World,
    eviction: Eviction,
    capacity: int,
    selector: float | None,
    seed: int,
    window: int | None = None,
):
    """Mean cost and quality per request; `selector=None` is always-large.

    window: requests that the sketch remembers; None: all.
    """
    rng = np.random.default_rng(seed)
    count = len(world.keys)
    # The small tier suffices where it is as good as the large one.
    suffices = world.quality[:, 0] >= world.quality[:, 1]
    says_small = np.zeros(count, dtype=bool)
    if selector is not None:
        knows = rng.random(count) < selector
        says_small = np.where(knows, suffices, ~suffices)
    cache = ResponseCache(
        capacity,
        eviction=eviction,
        admission=eviction is not Eviction.LRU,
        sketch=FrequencySketch(window=window or len(world.sequence)),
    )
    usd, good = 0.0, 0.0
    for step, query in enumerate(world.sequence):
        answer = cache.get(world.keys[query], float(step))
        if answer is None:
            small = bool(says_small[query])
            cost = world.cost[query, 0] if small else world.cost[query, 1]
            if small and not suffices[query]:
                cost += world.cost[query, 1]
            rank = int(not small or not suffices[query])
            body = b"x" * int(world.tokens[query] * BYTES_PER_TOKEN)
            answer = CachedAnswer(body, ("small", "large")[rank], rank, float(cost), float(step))
            cache.put(world.keys[query], answer)
            usd += cost
        good += world.quality[query, answer.tier_rank]
    n = len(world.sequence)
    return {"usd_per_1k": 1000 * usd / n, "quality": good / n, "hit_rate": cache.stats.hits / n}


def run_joint(world: World, capacity: int, price: float, reuse: bool):
    """Predicted gains through the production `decide`; no oracle, no escalation."""
    cache = ResponseCache(
        capacity, eviction=Eviction.LEC, sketch=FrequencySketch(window=len(world.sequence))
    )
    points = PolicySetPoints(lambda_per_usd=price)
    usd, good, upgrades = 0.0, 0.0, 0
    for step, query in enumerate(world.sequence):
        key = world.keys[query]
        answer = cache.get(key, float(step))
        uses = cache.expected_uses(key) if reuse else 1.0
        tokens = float(world.tokens[query])
        score = PlainScore(
            {"small": float(world.p[query, 0]), "large": float(world.p[query, 1])},
            dict.fromkeys(("small", "large"), (tokens, tokens, tokens)),
        )
        request = RouteRequest(int(world.prompt_tokens[query]), score, num_expected_uses=uses)
        if answer is None or (reuse and answer.tier_rank == 0):
            decision = decide(request, (SMALL, LARGE), points)
            rank = int(decision.tier == "large")
            priced = price * world.cost[query, rank]
            if answer is None or worth_upgrading(answer, rank, decision.gain, priced, uses):
                upgrades += answer is not None
                body = b"x" * int(tokens * BYTES_PER_TOKEN)
                cost = float(world.cost[query, rank])
                answer = CachedAnswer(body, ("small", "large")[rank], rank, cost, float(step))
                cache.put(key, answer)
                usd += cost
        good += world.quality[query, answer.tier_rank]
    n = len(world.sequence)
    return {
        "usd_per_1k": 1000 * usd / n,
        "quality": good / n,
        "hit_rate": cache.stats.hits / n,
        "upgrades": float(upgrades),
    }


def drift(num_requests: int, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """The three orders where popularity stays and where it moves on."""
    results = {}
    for drifts in (False, True):
        world = make_world(0.9, num_requests, seed, drifts)
        total = int((world.tokens * BYTES_PER_TOKEN + 256).sum())
        for share in (0.02, 0.1):
            table = {}
            for eviction in (Eviction.LRU, Eviction.GDSF, Eviction.LEC):
                for selector in (None, 0.8):
                    who = "always large" if selector is None else f"selector {selector:.0%}"
                    table[f"{eviction.value.upper()}, {who}"] = run(
                        world, eviction, int(share * total), selector, seed, 10_000
                    )
            base = table["LRU, always large"]["usd_per_1k"]
            for row in table.values():
                row["times_cheaper"] = base / row["usd_per_1k"]
            moves = "moves on" if drifts else "stays"
            title = f"what is wanted {moves}, cache of {share:.0%} of all answers"
            results[title] = table
            print(markdown({title: table}), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", default="all", choices=["all", "drift"])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write all numbers to this file")
    options = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    if options.part == "drift":
        results = drift(options.requests, options.seed)
    for exponent in (0.7, 0.9, 1.1) if options.part == "all" else ():
        world = make_world(exponent, options.requests, options.seed)
        total = int((world.tokens * BYTES_PER_TOKEN + 256).sum())
        for share in (0.02, 0.1):
            capacity = int(share * total)
            table: dict[str, dict[str, float]] = {}
            for eviction in (Eviction.LRU, Eviction.GDSF, Eviction.LEC):
                for selector in (None, 0.8, 1.0):
                    who = "always large" if selector is None else f"selector {selector:.0%}"
                    table[f"{eviction.value.upper()}, {who}"] = run(
                        world, eviction, capacity, selector, options.seed
                    )
            base = table["LRU, always large"]["usd_per_1k"]
            for row in table.values():
                row["times_cheaper"] = base / row["usd_per_1k"]
            joint = {}
            for price in (5.0, 10.0, 20.0, 40.0):
                for reuse in (False, True):
                    who = "counting reuse" if reuse else "per request"
                    joint[f"LEC, predicted, {who}, lambda {price:g}"] = run_joint(
                        world, capacity, price, reuse
                    )
            title = f"Zipf {exponent}, cache of {share:.0%} of all answers"
            results[title] = table | joint
            print(markdown({title: results[title]}), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
