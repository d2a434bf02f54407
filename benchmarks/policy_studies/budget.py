"""Money: spend against the ceiling under a load step, a change of prompts and longer answers."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace
from outcomes import Outcomes, azure_arrivals

from policy_studies.streams import TIERS, Stream, columns
from tandem_router.control import BudgetPacer, OnlineControl, budget_bucket, price_of_money
from tandem_router.policy import Decision, PolicySetPoints, PolicyState, Reason, decide

SERVICE_S = 6.0  # an answer's cost is known this long after its arrival
BURST_S = 300.0


def load_step_stream(mmlu: Outcomes, gsm8k: Outcomes, seed: int) -> Stream:
    """Azure arrivals thinned to a third, then all of them (a threefold step), then a third.

    Prompts are mmlu until 60 % of the requests and gsm8k after; answers grow by 30 % from 70 %
    on, which the length head does not know.
    """
    rng = np.random.default_rng(seed)
    at, prompt, answer = azure_arrivals("conv")
    third = at[-1] / 3
    keep = (rng.random(len(at)) < 1 / 3) | ((at > third) & (at < 2 * third))
    at, prompt, answer = at[keep], prompt[keep], answer[keep]
    n, cut = len(at), int(0.6 * len(at))
    a = columns(mmlu, rng.integers(0, len(mmlu), cut))
    b = columns(gsm8k, rng.integers(0, len(gsm8k), n - cut))
    known = answer[at < 600.0]
    lengths = tuple(float(x) for x in np.quantile(known, [0.1, 0.5, 0.9]))
    grown = answer.astype(float)
    grown[int(0.7 * n) :] *= 1.3
    return Stream(
        at,
        prompt,
        np.minimum(grown, 1000).astype(np.int64),
        np.concatenate([a[0], b[0]]),
        np.concatenate([a[1], b[1]]),
        lengths,  # type: ignore[arg-type]
    )


@dataclass
class Lever:
    """A way of setting lambda: what it is now, and what it learns from a realised cost."""

    value: Callable[[float], float]
    learn: Callable[[float, float], None] = field(default=lambda now, usd: None)


def frozen(price: float) -> Lever:
    return Lever(lambda now: price)


def pareto_pacer(ceiling_per_request: float, scale: float) -> Lever:
    """Dual ascent on an exponential average of cost per request over its ceiling.

    eta, alpha and the cap as published; the multiplier acts on cost relative to the dear tier.
    """
    state = {"dual": 0.0, "average": ceiling_per_request}

    def learn(now: float, usd: float) -> None:
        state["average"] += 0.05 * (usd - state["average"])
        step = 0.05 * (state["average"] / ceiling_per_request - 1.0)
        state["dual"] = min(5.0, max(0.0, state["dual"] + step))

    return Lever(lambda now: state["dual"] / scale, learn)


def dual_ascent(usd_per_s: float, start: float) -> Lever:
    """lambda moved once a second by the relative error of that second's spend, log scale."""
    state = {"log": math.log(max(start, 1e-9)), "at": 0.0, "spent": 0.0}

    def learn(now: float, usd: float) -> None:
        state["spent"] += usd
        if now - state["at"] >= 1.0:
            error = state["spent"] / (usd_per_s * (now - state["at"])) - 1.0
            state["log"] += 0.05 * min(2.0, max(-1.0, error))
            state["at"], state["spent"] = now, 0.0

    return Lever(lambda now: math.exp(state["log"]), learn)


def replay_budget(stream: Stream, usd_per_hour: float, lever: Lever | None) -> dict[str, float]:
    """One run under a budget; `lever=None` is our pacer. The bucket's hard stop is in all."""
    begin = float(stream.at_s[0])
    bucket = budget_bucket(usd_per_hour, begin, BURST_S)
    pacer = BudgetPacer(bucket, begin)
    control = OnlineControl(PolicySetPoints(), pacer=pacer)
    policy_state = PolicyState()
    open_answers: list[tuple[float, int, Decision, float]] = []
    spent_at, spent, quality, stops, refused = [], [], 0.0, 0, 0
    overdraft = 0.0
    for i in range(len(stream)):
        now = float(stream.at_s[i])
        while open_answers and open_answers[0][0] <= now:
            at, _, answered, usd = heapq.heappop(open_answers)
            bucket.settle(at, answered.reserve_cost_usd, usd)
            control.answered(str(answered.tier), answered.expected_cost_usd, usd)
            if lever:
                lever.learn(at, usd)
        points = control.set_points(now)
        if lever:
            points = replace(points, lambda_per_usd=lever.value(now), gain_threshold=0.0)
        decision = decide(stream.request(i), TIERS, points, policy_state)
        if decision.tier is not None and not bucket.hold(now, decision.reserve_cost_usd):
            raise AssertionError("the policy chose what the bucket cannot pay")
        control.decided(now, decision, int(stream.prompt_tokens[i]))
        overdraft = min(overdraft, bucket.balance(now))
        if decision.tier is None:
            refused += 1
            continue
        stops += decision.reason is Reason.BUDGET
        tier = int(decision.tier == "large")
        usd = stream.cost(i, tier)
        heapq.heappush(open_answers, (now + SERVICE_S, i, decision, usd))
        spent_at.append(now)
        spent.append(usd)
        quality += stream.q[i, tier]
    span = float(stream.at_s[-1] - stream.at_s[0])
    when, amount = np.array(spent_at), np.array(spent)
    windows = []
    for start in np.arange(0.0, span - 600.0, 60.0):
        inside = (when >= start) & (when < start + 600.0)
        windows.append(amount[inside].sum() / (usd_per_hour / 6.0))
    return {
        "spend_over_ceiling": float(amount.sum() / (usd_per_hour * span / 3600.0)),
        "lowest_10min": float(min(windows)),
        "highest_10min": float(max(windows)),
        "quality": quality / len(stream),
        "hard_stops": stops / len(stream),
        "refused": refused / len(stream),
        "overdraft_share_of_capacity": -overdraft / bucket.capacity,
    }


def known_price(stream: Stream, upto: float, usd_per_s: float) -> tuple[float, float]:
    """Lambda and mean cost that would have met the budget on the stream's beginning."""
    rows = np.flatnonzero(stream.at_s < upto)
    costs = np.array([[stream.cost(i, 0), stream.cost(i, 1)] for i in rows])
    per_request = usd_per_s * upto / len(rows)
    return price_of_money(stream.p[rows], costs, per_request), per_request


def hindsight(stream: Stream, total_usd: float) -> float:
    """Quality of the best single lambda that knew the whole stream (and real costs)."""
    costs = np.array([[stream.cost(i, 0), stream.cost(i, 1)] for i in range(len(stream))])
    price = price_of_money(stream.p, costs, total_usd / len(stream))
    large = stream.gain > price * (costs[:, 1] - costs[:, 0])
    return float(np.where(large, stream.q[:, 1], stream.q[:, 0]).mean())


def budget_study(mmlu: Outcomes, gsm8k: Outcomes, seeds: Sequence[int]) -> dict[str, object]:
    table: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        stream = load_step_stream(mmlu, gsm8k, seed)
        everything = sum(stream.cost(i, 1) for i in range(len(stream)))
        span_h = float(stream.at_s[-1] - stream.at_s[0]) / 3600.0
        usd_per_hour = 0.3 * everything / span_h
        price, per_request = known_price(stream, 600.0, usd_per_hour / 3600.0)
        scale = float(np.mean([stream.cost(i, 1) for i in range(500)]))
        ways: dict[str, Lever | None] = {
            "frozen threshold (RouteLLM's way)": frozen(price),
            "per-request ceiling (ParetoBandit's way)": pareto_pacer(per_request, scale),
            "plain dual ascent per second": dual_ascent(usd_per_hour / 3600.0, price),
            "BudgetPacer": None,
        }
        for name, lever in ways.items():
            table.setdefault(name, []).append(replay_budget(stream, usd_per_hour, lever))
        table.setdefault("hindsight, one lambda", []).append(
            {"quality": hindsight(stream, usd_per_hour * span_h), "spend_over_ceiling": 1.0}
        )
    return {name: _mean(rows) for name, rows in table.items()}


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    errors = [abs(row["spend_over_ceiling"] - 1.0) for row in rows]
    mean["worst_error"] = max(errors)
    return mean
