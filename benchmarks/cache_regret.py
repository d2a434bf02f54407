"""What it is worth that the choice of tier and worker prices a lost prefix, on Mooncake's trace.

    python benchmarks/cache_regret.py [--seeds 3] [--requests 12031] [--json FILE]

The trace says when, how long, and which 512-token blocks a prompt begins with. Its first block is
the same in all prompts, so a conversation is what shares the second: each draws a row of
`shared/data/routing` (measured qualities of two models, predictions out of fold). Two tiers of
four workers stand behind the router's own `Routing`, `Steering`, `Picker` and quality floor, on a
virtual clock; modelled are the workers: the KV blocks that each really has (least recently used
go), and how long it takes. A cost is what was computed: tokens of the prompt that the worker had
not, and the answer, at the tier's prices.

Compared are routers at equal *measured* quality: the blind ones run at several floors, and their
cost is read where their quality is that of the router under test.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from outcomes import DATA, Outcomes, load

from tandem_router.api.app import RouterApp
from tandem_router.config import parse_config
from tandem_router.limits.ledger import ANONYMOUS, Hold
from tandem_router.openai.body import Bodies
from tandem_router.openai.request import parse_inference
from tandem_router.policy import NO_OVERRIDES, PlainScore, ScoreStatus
from tandem_router.routing.predictor_source import ArtifactPredictor
from tandem_router.routing.scorer import Scored

BLOCK_TOKENS, PER_BLOCK = 512, 8  # of the trace; the router's blocks are 64 tokens
# USD per million tokens, of a model ten times as large; a worker computes nothing that it has.
PRICES = {"small": (0.2, 0.4), "large": (2.0, 4.0)}
NUM_WORKERS = 4
KV_BLOCKS = 4_000  # of 512 tokens, per worker: two million tokens
PREFILL_S, TOKEN_S = {"small": 1e-5, "large": 6e-5}, {"small": 0.008, "large": 0.025}
FLOORS = (0.95, 0.97, 0.98, 0.99)
FLOOR = 0.97


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a conversation: the row says what both tiers' answers are worth."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    conversation: int
    row: int


def turns(num_rows: int, rng: random.Random, other: float, limit: int) -> list[Turn]:
    """The trace; other: share of later turns that ask something else, of another row."""
    path = DATA / "traces" / "mooncake" / "conversation_trace.jsonl"
    if not path.exists():
        raise SystemExit(f"{path} is absent; this study needs the shared data folder")
    rows: dict[int, int] = {}
    found = []
    with path.open() as lines:
        for line, _ in zip(lines, range(limit), strict=False):
            one = json.loads(line)
            blocks = tuple(one["hash_ids"])
            root = blocks[1] if len(blocks) > 1 else -len(found) - 1
            if root not in rows or rng.random() < other:
                rows[root] = rng.randrange(num_rows)
            lengths = one["input_length"], one["output_length"]
            found.append(Turn(one["timestamp"] / 1000.0, *lengths, blocks, root, rows[root]))
    return found


class Stated(ArtifactPredictor):
    """A learned predictor as the router knows it, of which only the training gains are asked."""

    def __init__(self, pairs: Sequence[tuple[float, float]]) -> None:
        self._pairs = pairs

    def training_gains(self, dearest: str, cheapest: str) -> list[tuple[float, float]]:
        return list(self._pairs)


@dataclass
class Kept:
    """The KV blocks of one worker."""

    blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def held(self, blocks: Sequence[int]) -> int:
        found = 0
        for block in blocks:
            if block not in self.blocks:
                break
            found += 1
        return found

    def take(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        while len(self.blocks) > KV_BLOCKS:
            self.blocks.popitem(last=False)


@dataclass
class Served:
    """What became of a turn, and what it would have cost at each tier's best worker."""

    turn: Turn
    tier: str
    reason: str
    usd: float
    held: dict[str, int]  # blocks that the tier's nearest worker had
    gain: float
    usd_per_quality: float  # what the router pays for a whole point of quality at this time


class Replay:
    """One router over the trace.

    picks_blindly: workers are chosen by load alone. weighs: what the choice of tier weighs:
    nothing (a threshold on the gain), what is held, or every request's own saving.
    """

    def __init__(
        self,
        outcomes: Outcomes,
        lengths: tuple[float, float, float],
        floor: float,
        weighs: str,
        picks_blindly: bool,
    ) -> None:
        self._lengths = lengths
        self._outcomes, self._blind, self._weighs = outcomes, picks_blindly, weighs
        self.now = 1000.0
        config = {
            "name": "chat",
            "tiers": [
                {
                    "name": name,
                    "served_model": name,
                    "usd_per_1m_input_tokens": price_in,
                    "usd_per_1m_output_tokens": price_out,
                }
                for name, (price_in, price_out) in PRICES.items()
            ],
            "fallback_tier": "large",
            "objective": {"quality_floor": floor},
        }
        app = RouterApp(
            parse_config(json.dumps(config)), endpoints_path=Path("none"), clock=lambda: self.now
        )
        urls = {name: [f"http://{name}{n}" for n in range(NUM_WORKERS)] for name in PRICES}
        app.set_table({name: {"unified": tuple(found)} for name, found in urls.items()})
        self.services, self.picker = app.services, app.picker
        self._kept = {url: Kept() for found in urls.values() for url in found}
        self._urls = urls
        pairs = list(zip(outcomes.gain[:2000], outcomes.p_large[:2000], strict=True))
        steering = self.services.steering
        steering.predictor_changed(Stated([(float(g), float(q)) for g, q in pairs]))
        if weighs != "saving":
            floor_limit = steering._floor
            assert floor_limit is not None
            floor_limit.weigh = lambda stakes: False  # type: ignore[method-assign]
        body = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "x"}]})
        self._request = parse_inference("chat", body.encode(), Bodies(app.config.limits))
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def serve(self, turn: Turn) -> Served:
        arrives = 1000.0 + turn.at_s
        while self._events and self._events[0][0] <= arrives:
            self.now, _, what = heapq.heappop(self._events)
            what()
        self.now = arrives
        chain = [hash((block, part)) for block in turn.blocks for part in range(PER_BLOCK)]
        services, outcomes, row = self.services, self._outcomes, turn.row
        quality = {"small": float(outcomes.p_small[row]), "large": float(outcomes.p_large[row])}
        request = replace(
            self._request,
            num_prompt_tokens=turn.prompt_tokens,
            most_prompt_tokens=turn.prompt_tokens,
        )
        lengths = dict.fromkeys(PRICES, self._lengths)
        points = services.steering.set_points
        decision = services.routing.choose(
            request,
            NO_OVERRIDES,
            Hold(ANONYMOUS, (), 0.0),
            Scored(PlainScore(quality, lengths), ScoreStatus.OK),
            points,
            1.0,
            frozenset(),
            () if self._weighs == "gain" else chain,
        )
        tier = decision.tier
        assert tier is not None
        services.steering.count(decision, request, points)
        pick = self.picker.pick(
            tier, () if self._blind else chain, float(turn.prompt_tokens), frozenset()
        )
        assert pick is not None
        held = {
            name: max(self._kept[url].held(turn.blocks) for url in urls)
            for name, urls in self._urls.items()
        }
        worker = self._kept[pick.decode.url]
        computed = turn.prompt_tokens - BLOCK_TOKENS * worker.held(turn.blocks)
        computed = max(1, computed)
        worker.take(turn.blocks)
        began = self.now + computed * PREFILL_S[tier]
        self._at(began, lambda: self.picker.first_token(pick))
        ended = began + turn.output_tokens * TOKEN_S[tier]
        self._at(ended, lambda: self.picker.finished(pick))
        usual = points.usual_saving_usd or services.steering._saving.usd
        threshold = max(1e-3, points.gain_threshold)
        return Served(
            turn,
            tier,
            str(decision.reason),
            cost(tier, computed, turn.output_tokens),
            held,
            quality["large"] - quality["small"],
            usual / threshold,
        )


def cost(tier: str, computed: int, output: int) -> float:
    price_in, price_out = PRICES[tier]
    return (computed * price_in + output * price_out) / 1e6


@dataclass
class Result:
    usd: float
    quality: float
    share: float  # of the large tier
    cached: float  # of all blocks
    served: list[Served]


def replay(outcomes: Outcomes, every: Iterable[Turn], floor: float, *how: Any) -> Result:
    every = list(every)
    outputs = [turn.output_tokens for turn in every[:500]]
    low, mid, high = map(float, np.quantile(outputs, [0.1, 0.5, 0.9]))
    router = Replay(outcomes, (low, mid, high), floor, *how)
    served = [router.serve(turn) for turn in every]
    measured = {"small": outcomes.small, "large": outcomes.large}
    tokens = sum(s.turn.prompt_tokens for s in served)
    prompt = sum(s.usd - cost(s.tier, 0, s.turn.output_tokens) for s in served)
    full = sum(cost(s.tier, s.turn.prompt_tokens, 0) for s in served)
    assert tokens
    return Result(
        sum(s.usd for s in served),
        statistics.fmean(float(measured[s.tier][s.turn.row]) for s in served),
        statistics.fmean(s.tier == "large" for s in served),
        1.0 - prompt / full,
        served,
    )


def moves(result: Result) -> dict[str, float]:
    """Conversations that changed their tier, and how many of these changes were worth less than
    they cost, once all later turns are known.

    A move lasts until the next one, or the end. Held against it is what the same turns would have
    cost where the conversation was (where each turn's predecessor would be held). Quality is
    what was predicted, at the price that the router pays for it.
    """
    conversations: dict[int, list[Served]] = {}
    for served in result.served:
        conversations.setdefault(served.turn.conversation, []).append(served)
    num_moves = num_lost = num_down = num_down_lost = 0
    for all_turns in conversations.values():
        starts = [
            at
            for at in range(1, len(all_turns))
            if all_turns[at].tier != all_turns[at - 1].tier
            and all_turns[at].held[all_turns[at - 1].tier] > 1
        ]
        for number, start in enumerate(starts):
            end = starts[number + 1] if number + 1 < len(starts) else len(all_turns)
            old = all_turns[start - 1].tier
            moved = stayed = gained = 0.0
            for at in range(start, end):
                one = all_turns[at]
                held = one.held[old]
                if at > start:
                    held = max(held, _common(one.turn.blocks, all_turns[at - 1].turn.blocks))
                left = max(1, one.turn.prompt_tokens - BLOCK_TOKENS * held)
                moved += one.usd
                stayed += cost(old, left, one.turn.output_tokens)
                gained += one.gain * one.usd_per_quality
            is_down = old == "large"
            worth = -gained if is_down else gained
            num_moves += 1
            num_lost += worth + stayed - moved < 0.0
            num_down += is_down
            num_down_lost += is_down and moved > stayed
    return {
        "moves": num_moves,
        "losing share": num_lost / max(1, num_moves),
        "downward": num_down,
        "downward that cost more": num_down_lost,
    }


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    number = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        number += 1
    return number


# (what the choice of tier weighs, whether workers are picked by load alone)
ROUTERS = {
    "blind to caches": ("gain", True),
    "blind in the tier": ("gain", False),
    "prices what is held": ("held", False),
    "the default": ("saving", False),
}

BLIND = ("blind to caches", "blind in the tier")


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval of Student's t."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    times = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.6)
    half = times * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"


def study(name: str, other: float, seeds: int, limit: int) -> dict[str, Any]:
    outcomes = load(name)
    found: dict[str, list[dict[str, float]]] = {router: [] for router in ROUTERS}
    for seed in range(seeds):
        every = turns(len(outcomes), random.Random(seed), other, limit)
        best = statistics.fmean(float(outcomes.large[turn.row]) for turn in every)
        runs = {
            (router, floor): replay(outcomes, every, floor, *how)
            for router, how in ROUTERS.items()
            for floor in (FLOORS if router in BLIND else (FLOOR,))
        }
        curves = {
            router: sorted((r.quality, r.usd) for r in (runs[router, floor] for floor in FLOORS))
            for router in BLIND
        }
        for router in ROUTERS:
            result = runs[router, FLOOR]
            row = {
                "usd": result.usd,
                "quality ratio": result.quality / best,
                "large share": result.share,
                "cached": result.cached,
                "moved": statistics.fmean(s.reason == "prefix" for s in result.served),
                **moves(result),
            }
            for blind, curve in curves.items():
                at = [float(np.interp(result.quality, *zip(*curve, strict=True)))]
                row[f"cost over {blind}"] = result.usd / at[0]
            found[router].append(row)
    return {"rows": name, "other": other, "routers": found}


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['rows']}, {100 * result['other']:g} % of later turns ask something else")
    keys = list(next(iter(result["routers"].values()))[0])
    for router, runs in result["routers"].items():
        print(f"  {router}")
        for key in keys:
            print(f"    {key:28s} {interval([run[key] for run in runs])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=12_031)
    parser.add_argument("--rows", nargs="*", default=["mixed14_qwen25-7b_train", "mmlu"])
    parser.add_argument("--other", nargs="*", type=float, default=[0.0, 0.3])
    parser.add_argument("--json", type=Path, help="write the figures there")
    asked = parser.parse_args()
    results = [
        study(name, other, asked.seeds, asked.requests)
        for name in asked.rows
        for other in asked.other
    ]
    for result in results:
        show(result)
    if asked.json is not None:
        asked.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
