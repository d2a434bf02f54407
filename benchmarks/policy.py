"""What the online controllers are worth on real outcomes with real arrival times.

    python benchmarks/policy.py [budget|share|floor|change|cascade|all] [--runs 200] [--json FILE]

Outcomes: mmlu and gsm8k of `shared/data/routing` (Mixtral-8x7B against GPT-4-1106); arrivals,
prompt and answer lengths: Azure's conversation trace of 2023. Compared with

* a frozen threshold, set as RouteLLM does: the quantile of calibration scores that gives the
  wanted share of large calls (routellm/calibrate_threshold.py);
* ParetoBandit's pacer (arXiv 2604.00136): a ceiling per request, dual ascent on an exponential
  average of cost, and for adaptation geometric forgetting of the statistics;
* plain dual ascent on spend per second.

Everything is replayed on a virtual clock through the production `decide` and controllers.
"""

from __future__ import annotations

import argparse
import gzip
import heapq
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from outcomes import DATA, LARGE_PRICE, SMALL_PRICE, Outcomes, azure_arrivals, load, markdown

from tandem_router.cascade import (
    VIEWS,
    AnswerVerifier,
    CascadeTerms,
    Verdict,
    VerifierPower,
    Zone,
    choose_zone,
    escalate,
)
from tandem_router.control import (
    BudgetPacer,
    OnlineControl,
    QualityFloor,
    ShadowLabel,
    ShadowSampler,
    ShareTracker,
    TrafficShift,
    price_of_money,
)
from tandem_router.policy import (
    PlainScore,
    PolicySetPoints,
    PolicyState,
    Reason,
    RouteRequest,
    TierOption,
    cost_usd,
    decide,
)

TIERS = (
    TierOption("small", True, *SMALL_PRICE),
    TierOption("large", True, *LARGE_PRICE),
)
SERVICE_S = 6.0  # an answer's cost is known this long after its arrival
BURST_S = 300.0


@dataclass
class Stream:
    """A sequence of requests: when, how long, what both tiers would have made of it."""

    at_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    answer_tokens: NDArray[np.int64]
    p: NDArray[np.float64]  # (n, 2) predicted
    q: NDArray[np.float64]  # (n, 2) measured
    lengths: tuple[float, float, float]  # what the length head says: quantiles of the first 10 min

    def __len__(self) -> int:
        return len(self.at_s)

    @property
    def gain(self) -> NDArray[np.float64]:
        return self.p[:, 1] - self.p[:, 0]

    def request(self, i: int) -> RouteRequest:
        score = PlainScore(
            {"small": float(self.p[i, 0]), "large": float(self.p[i, 1])},
            {"small": self.lengths, "large": self.lengths},
        )
        return RouteRequest(int(self.prompt_tokens[i]), score, max_tokens=1000)

    def cost(self, i: int, tier: int) -> float:
        return cost_usd(TIERS[tier], int(self.prompt_tokens[i]), int(self.answer_tokens[i]))


def columns(outcomes: Outcomes, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], ...]:
    p = np.stack([outcomes.p_small[rows], outcomes.p_large[rows]], axis=1)
    return p, np.stack([outcomes.small[rows], outcomes.large[rows]], axis=1)


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


# ---------------------------------------------------------------- budget


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
    pacer = BudgetPacer(usd_per_hour, float(stream.at_s[0]), burst_s=BURST_S)
    control = OnlineControl(PolicySetPoints(), pacer=pacer)
    policy_state = PolicyState()
    open_answers: list[tuple[float, int, object, float]] = []
    spent_at, spent, quality, stops, refused = [], [], 0.0, 0, 0
    overdraft = 0.0
    for i in range(len(stream)):
        now = float(stream.at_s[i])
        while open_answers and open_answers[0][0] <= now:
            at, _, reservation, usd = heapq.heappop(open_answers)
            control.settle(at, reservation, usd)  # type: ignore[arg-type]
            if lever:
                lever.learn(at, usd)
        points = control.set_points(now)
        if lever:
            points = replace(points, lambda_per_usd=lever.value(now), gain_threshold=0.0)
        decision = decide(stream.request(i), TIERS, points, policy_state)
        reservation = control.decided(now, decision, int(stream.prompt_tokens[i]))
        overdraft = min(overdraft, pacer.bucket.balance_usd(now))
        if decision.tier is None:
            refused += 1
            continue
        stops += decision.reason is Reason.BUDGET
        tier = int(decision.tier == "large")
        usd = stream.cost(i, tier)
        heapq.heappush(open_answers, (now + SERVICE_S, i, reservation, usd))
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
        "overdraft_share_of_capacity": -overdraft / pacer.bucket.capacity_usd,
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


def budget_study(mmlu: Outcomes, gsm8k: Outcomes, seeds: int) -> dict[str, object]:
    table: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
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


# ---------------------------------------------------------------- share


def share_stream(mmlu: Outcomes, gsm8k: Outcomes, seed: int, half: int = 4000) -> Stream:
    rng = np.random.default_rng(seed)
    a = columns(mmlu, rng.permutation(len(mmlu))[:half])
    b = columns(gsm8k, np.concatenate([rng.permutation(len(gsm8k)) for _ in range(6)])[:half])
    n = 2 * half
    ones = np.full(n, 400, dtype=np.int64)
    return Stream(
        np.arange(n, dtype=float),
        ones,
        ones,
        np.concatenate([a[0], b[0]]),
        np.concatenate([a[1], b[1]]),
        (100.0, 200.0, 400.0),
    )


def replay_share(stream: Stream, control: OnlineControl, target: float) -> dict[str, float]:
    state, large = PolicyState(), np.zeros(len(stream), dtype=bool)
    for i in range(len(stream)):
        decision = decide(stream.request(i), TIERS, control.set_points(stream.at_s[i]), state)
        control.decided(float(stream.at_s[i]), decision, 400)
        large[i] = decision.tier == "large"
    counts = np.concatenate([[0], np.cumsum(large)])
    windows = (counts[500:] - counts[:-500]) / 500
    half = len(stream) // 2
    return {
        "share_before": float(large[:half].mean()),
        "share_after": float(large[half:].mean()),
        "worst_window_points": float(100 * np.abs(windows - target).max()),
        "quality": float(np.where(large, stream.q[:, 1], stream.q[:, 0]).mean()),
    }


def geometric_quantile(target: float, gamma: float = 0.997) -> ShareTracker:
    """Forgetting alone: the quantile of recent gains (window of 1/(1-gamma)), no feedback."""
    window = round(1 / (1 - gamma))
    return ShareTracker(target, step=1e-9, slack=0.0, gentle_step=0.0, window=window)


def share_study(mmlu: Outcomes, gsm8k: Outcomes, seeds: int) -> dict[str, object]:
    result: dict[str, object] = {}
    for target in (0.3, 0.5):
        rows: dict[str, list[dict[str, float]]] = {}
        for seed in range(seeds):
            stream = share_stream(mmlu, gsm8k, seed)
            calibrated = float(np.quantile(mmlu.gain, 1 - target))
            ways = {
                "frozen threshold (RouteLLM's way)": OnlineControl(
                    PolicySetPoints(gain_threshold=calibrated)
                ),
                "forgetting quantile, no feedback": OnlineControl(
                    PolicySetPoints(), share=geometric_quantile(target)
                ),
                "ShareTracker": OnlineControl(
                    PolicySetPoints(),
                    share=ShareTracker(target, initial_threshold=calibrated),
                ),
            }
            for name, control in ways.items():
                rows.setdefault(name, []).append(replay_share(stream, control, target))
        result[f"target {target:.0%}"] = {
            name: {
                key: float(
                    (np.max if key.startswith("worst") else np.mean)([r[key] for r in list_])
                )
                for key in list_[0]
            }
            for name, list_ in rows.items()
        }
    return result


# ---------------------------------------------------------------- floor


def true_ratio(q: NDArray[np.float64], gain: NDArray[np.float64], threshold: float) -> float:
    return float(np.where(gain > threshold, q[:, 1], q[:, 0]).mean() / q[:, 1].mean())


def floor_run(
    outcomes: Outcomes, floor: float, risk: float, num_requests: int, seed: int
) -> dict[str, float]:
    """Requests drawn from the set with replacement; the set itself is the truth."""
    rng = np.random.default_rng(seed)
    controller = QualityFloor(floor, risk, smallest_probability=0.05)
    sampler = ShadowSampler(0.05, 0.25)
    p, q = columns(outcomes, np.arange(len(outcomes)))
    gain = p[:, 1] - p[:, 0]
    labels: list[tuple[float, float, float, float]] = []
    seen: set[float] = set()
    large = 0
    for row, uniform in zip(
        rng.integers(0, len(gain), num_requests), rng.random(num_requests), strict=True
    ):
        chosen = "large" if gain[row] > controller.threshold else "small"
        large += chosen == "large"
        plan = sampler.draw(uniform, chosen, "small", "large")
        if plan:
            controller.observe(
                ShadowLabel(gain[row], q[row, 0], q[row, 1], plan.probability, p[row, 0], p[row, 1])
            )
            labels.append((gain[row], q[row, 0], q[row, 1], 1.0 / plan.probability))
        seen.add(controller.threshold)
    # The plug-in rule on the same labels: highest threshold whose weighted mean meets the floor.
    data = np.array(labels)
    plug_in = -math.inf
    for threshold in controller.thresholds:
        routed = np.where(data[:, 0] > threshold, data[:, 2], data[:, 1])
        if (data[:, 3] * (routed - floor * data[:, 2])).sum() >= 0:
            plug_in = float(threshold)
    # Frozen: a calibration set of 500 labelled rows from the same data, never looked at again.
    rows = rng.integers(0, len(gain), 500)
    frozen_at = max(
        (t for t in controller.thresholds if true_ratio(q[rows], gain[rows], t) >= floor),
        default=-math.inf,
    )
    return {
        "violated_ever": float(any(true_ratio(q, gain, t) < floor for t in seen)),
        "large_share": large / num_requests,
        "final_large_share": float((gain > controller.threshold).mean()),
        "num_labels": float(controller.num_labels),
        "alarms": float(controller.num_alarms),
        "plug_in_violated": float(true_ratio(q, gain, plug_in) < floor),
        "frozen_violated": float(true_ratio(q, gain, frozen_at) < floor),
    }


def floor_study(mmlu: Outcomes, gsm8k: Outcomes, runs: int) -> dict[str, object]:
    result: dict[str, object] = {}
    for outcomes in (mmlu, gsm8k):
        for floor in (0.95, 0.9):
            p, q = columns(outcomes, np.arange(len(outcomes)))
            gain = p[:, 1] - p[:, 0]
            grid = np.linspace(-0.4, 0.4, 81)
            best = max(t for t in grid if true_ratio(q, gain, t) >= floor)
            rows = [floor_run(outcomes, floor, 0.1, 7000, seed) for seed in range(runs)]
            mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
            mean["oracle_large_share"] = float((gain > best).mean())
            result[f"{outcomes.name}, floor {floor}, risk 0.1"] = mean
    return result


# ---------------------------------------------------------------- change point


def change_run(outcomes: Outcomes, way: str, seed: int, n: int = 16_000) -> dict[str, float]:
    """From half-way on the small tier silently gets 30 % of its good answers wrong."""
    rng = np.random.default_rng(seed)
    floor = 0.95
    controller = QualityFloor(floor, 0.1, smallest_probability=0.05, drift=way != "no forgetting")
    sampler = ShadowSampler(0.05, 0.25)
    p, q = columns(outcomes, np.arange(len(outcomes)))
    gain = p[:, 1] - p[:, 0]
    broken = rng.random(len(gain)) < 0.3
    q_after = np.stack([np.where(broken, 0.0, q[:, 0]), q[:, 1]], axis=1)
    frozen_at = max(t for t in controller.thresholds if true_ratio(q, gain, t) >= floor)
    rows, uniforms = rng.integers(0, len(gain), n), rng.random(n)
    routed, reference = np.zeros(n), np.zeros(n)
    alarm_at = math.nan
    for i, (row, uniform) in enumerate(zip(rows, uniforms, strict=True)):
        truth = q if i < n // 2 else q_after
        threshold = frozen_at if way == "frozen threshold" else controller.threshold
        chosen = "large" if gain[row] > threshold else "small"
        routed[i], reference[i] = truth[row, int(chosen == "large")], truth[row, 1]
        plan = sampler.draw(uniform, chosen, "small", "large")
        label = (
            None
            if plan is None
            else ShadowLabel(
                gain[row], truth[row, 0], truth[row, 1], plan.probability, p[row, 0], p[row, 1]
            )
        )
        alarmed = label is not None and controller.observe(label)
        if way == "QualityFloor" and alarmed and i >= n // 2 and math.isnan(alarm_at):
            alarm_at = i - n // 2
    after = slice(n // 2, n)
    last = slice(3 * n // 4, n)
    return {
        "ratio_before": routed[: n // 2].sum() / reference[: n // 2].sum(),
        "ratio_after": routed[after].sum() / reference[after].sum(),
        "ratio_last_quarter": routed[last].sum() / reference[last].sum(),
        "requests_to_alarm": alarm_at,
    }


def change_study(mmlu: Outcomes, runs: int) -> dict[str, object]:
    result: dict[str, object] = {}
    for way in ("frozen threshold", "no forgetting", "QualityFloor"):
        rows = [change_run(mmlu, way, seed) for seed in range(runs)]
        result[way] = {
            key: float(np.mean([r[key] for r in rows if not math.isnan(r[key])] or [math.nan]))
            for key in rows[0]
        }
    detector_at = []
    for seed in range(runs):
        stream, shift = _drift_stream(mmlu, seed), TrafficShift()
        at = [i for i in range(len(stream)) if shift.observe(stream[i][0], stream[i][1])]
        detector_at.append(([i for i in at if i < 3000], [i for i in at if i >= 3000]))
    result["TrafficShift mmlu to gsm8k at request 3000"] = {
        "false_alarms_per_run": float(np.mean([len(a) for a, _ in detector_at])),
        "requests_to_alarm": float(
            np.mean([b[0] - 3000 if b else math.nan for _, b in detector_at])
        ),
    }
    return result


def _drift_stream(mmlu: Outcomes, seed: int) -> list[tuple[float, float]]:
    rng = np.random.default_rng(seed)
    gsm8k = load("gsm8k")
    rows = []
    for outcomes, count in ((mmlu, 3000), (gsm8k, 1000)):
        picked = rng.integers(0, len(outcomes), count)
        rows += [
            (math.log1p(t), g)
            for t, g in zip(outcomes.prompt_tokens[picked], outcomes.gain[picked], strict=True)
        ]
    return rows


# ---------------------------------------------------------------- cascade


def apgr(score: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Mean performance gap recovered over all shares of large calls, exact."""
    step = (q[:, 1] - q[:, 0])[np.argsort(-score, kind="stable")]
    curve = np.concatenate([[0.0], np.cumsum(step)]) / step.sum()
    return float((curve[1:] + curve[:-1]).mean() / 2)


def cascade_study(seeds: int) -> dict[str, object]:
    """The verifier on gsm8k answers: ranking by view, and what the three zones buy."""
    with gzip.open(DATA / "routing" / "gsm8k.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    prompts = [row["prompt"] for row in rows]
    answers = [row["responses"]["small"] for row in rows]
    q = np.array([[row["quality"]["small"], row["quality"]["large"]] for row in rows])
    prior = load("gsm8k")
    only = dict.fromkeys(VIEWS, 0.0)
    ways = {"all views": dict(VIEWS), "learned before the answer (TF-IDF heads)": None}
    ways |= {f"without {view}": {**VIEWS, view: 0.0} for view in VIEWS}
    ways |= {f"{view} only": {**only, view: 1.0} for view in VIEWS}
    results: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        folds = np.random.default_rng(seed).permutation(len(rows)) % 5
        beliefs = {name: np.zeros((len(rows), 2)) for name in ways}
        for fold in range(5):
            train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            part = [prompts[i] for i in train], [answers[i] for i in train]
            verifier = AnswerVerifier().fit(*part, q[train])
            part = [prompts[i] for i in test], [answers[i] for i in test]
            for name, views in ways.items():
                if views is not None:
                    verifier.views = views
                    beliefs[name][test] = verifier.predict(*part)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", default="all")
    parser.add_argument("--runs", type=int, default=200, help="seeded runs of the floor study")
    parser.add_argument("--seeds", type=int, default=5, help="runs of the other studies")
    parser.add_argument("--json", help="write all numbers to this file")
    options = parser.parse_args()
    mmlu, gsm8k = load("mmlu"), load("gsm8k")
    studies: dict[str, Callable[[], dict[str, object]]] = {
        "budget": lambda: budget_study(mmlu, gsm8k, options.seeds),
        "share": lambda: share_study(mmlu, gsm8k, options.seeds),
        "floor": lambda: floor_study(mmlu, gsm8k, options.runs),
        "change": lambda: change_study(mmlu, 4 * options.seeds),
        "cascade": lambda: cascade_study(options.seeds),
    }
    if options.part != "all" and options.part not in studies:
        parser.error(f"part {options.part!r} is not one of {', '.join(studies)}, all")
    results: dict[str, object] = {}
    for name, study in studies.items():
        if options.part in (name, "all"):
            started = time.monotonic()
            results[name] = study()
            print(markdown({name: results[name]}), flush=True)
            print(f"({time.monotonic() - started:.0f} s)\n", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
