"""The planner finds the cheapest plan that passes, and says what breaks the next cheaper one."""

from __future__ import annotations

import random

import pytest
import yaml

from tandem_operator.autoscale.profile import Slo
from tandem_operator.planner.candidates import (
    Candidate,
    TierSpec,
    busiest,
    candidate,
    propose,
    shares_of,
)
from tandem_operator.planner.report import manifests, sentences
from tandem_operator.planner.search import Found, Score, Wanted, search
from tandem_operator.resources import Model, Router
from tandem_operator.simulate.arrivals import Arrival
from tandem_operator.simulate.plan_file import (
    PlanError,
    Resources,
    fixed_plan,
    wanted_floor,
    with_floor,
)
from tandem_operator.simulate.profiles import Profile
from tandem_operator.simulate.simulation import Simulation

PROFILE = Profile((0.02, 1e-4, 0.0), (0.02, 1e-7, 1e-4), kv_tokens=400_000)
SMALL = TierSpec("small", PROFILE, 1, 2.0, 64)
LARGE = TierSpec("large", PROFILE, 2, 8.0, 64)
TIERS = (SMALL, LARGE)


def traffic(count: int = 600, rate: float = 10.0) -> list[Arrival]:
    """Half of the prompts are good with either tier; the prediction knows which."""
    rng, now, found = random.Random(1), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        easy = rng.random() < 0.5
        quality = {"small": 1.0 if easy else 0.2, "large": 1.0}
        predicted = {"small": 0.95 if easy else 0.25, "large": 1.0}
        found.append(Arrival(now, 500, {"": 80}, quality=quality, predicted=predicted))
    return found


def resources_of_two_tiers() -> tuple[Router, dict[str, Model]]:
    """A Router over Models small and large with an SLO."""
    tiers = [{"name": n, "modelRef": {"name": n}} for n in ("small", "large")]
    slo = {"ttft": {"target": "1s"}, "tpot": {"target": "100ms"}}
    metadata = {"name": "r", "namespace": "n"}
    router = Router.model_validate({"metadata": metadata, "spec": {"tiers": tiers, "slo": slo}})
    models = {
        name: Model.model_validate(
            {
                "metadata": {**metadata, "name": name},
                "spec": {"weights": {"source": "hf://a/b"}, "unified": {}},
            }
        )
        for name in ("small", "large")
    }
    return router, models


def capacity(plan: Candidate, num_requests: int) -> Score:
    """A stand-in for the simulator: small needs 3 workers, large 2 in whatever layout."""
    small = sum(count for (tier, _), count in plan.workers if tier == "small")
    large = sum(count for (tier, _), count in plan.workers if tier == "large")
    met = min(1.0, small / 3.0) * min(1.0, large / 2.0)
    return Score(met, 1.0, 0.1, 0.01)


def run(wanted: Wanted) -> Found:
    arrivals = traffic()
    points = shares_of(arrivals, ["small", "large"], "large")
    plans = propose(TIERS, points, arrivals, Slo(1.0, 0.1), wanted.quality_floor)
    return search(list(plans), TIERS, wanted, capacity, 400, lambda text: None)


def test_the_cheapest_plan_that_holds_is_found_and_the_next_cheaper_fails() -> None:
    found = run(Wanted(0.95, quality_floor=0.99))

    assert found.best is not None
    workers = dict(found.best.candidate.workers)
    assert sum(n for (tier, _), n in workers.items() if tier == "small") == 3
    assert sum(n for (tier, _), n in workers.items() if tier == "large") == 2
    assert found.next_cheaper is not None
    assert found.next_cheaper.candidate.usd_per_hour < found.best.candidate.usd_per_hour
    assert found.next_cheaper.score.slo_met < 0.95


def test_a_budget_that_is_too_small_is_told_with_what_holding_costs() -> None:
    wanted = Wanted(0.95, quality_floor=0.99, usd_per_hour=10.0)

    found = run(wanted)

    assert found.best is None
    (line,) = sentences(found, wanted, scored=True)
    assert "this budget cannot hold this SLO: $10.00/h" in line
    assert "$22.00/h" in line


def test_a_plan_that_holds_with_other_steps_is_cheaper_and_says_so() -> None:
    def needs_small_steps(plan: Candidate, num_requests: int) -> Score:
        """Two small workers do where a step holds at most 512 tokens."""
        if (plan.max_batched_tokens or 1024) > 512:
            return capacity(plan, num_requests)
        return capacity(plan.with_workers(("small", "unified"), 3, TIERS), num_requests)

    arrivals = traffic()
    points = shares_of(arrivals, ["small", "large"], "large")
    plans = list(propose(TIERS, points, arrivals, Slo(1.0, 0.1), 0.99))
    wanted = Wanted(0.95, quality_floor=0.99)

    found = search(plans, TIERS, wanted, needs_small_steps, 400, lambda text: None)
    usual = search(plans, TIERS, wanted, capacity, 400, lambda text: None)

    assert found.best is not None
    assert usual.best is not None
    assert found.best.candidate.max_batched_tokens == 512
    assert found.best.candidate.usd_per_hour < usual.best.candidate.usd_per_hour
    assert usual.best.candidate.max_batched_tokens is None
    assert "; maxBatchedTokens 512" in sentences(found, wanted, scored=True)[0]


def test_the_choice_is_within_a_twentieth_of_the_best_of_an_exhaustive_grid() -> None:
    """Each of 24 plans simulated on the whole trace, the chosen one beside them."""
    router, models = resources_of_two_tiers()
    resources = Resources(router, models, None)
    profiles = {"small": PROFILE, "large": Profile((0.05, 3e-4, 0.0), (0.04, 2e-7, 2e-4), 200_000)}
    tiers = (SMALL, TierSpec("large", profiles["large"], 2, 8.0, 64, ("unified",), 8))
    arrivals = traffic(300, 20.0)
    points = shares_of(arrivals, ["small", "large"], "large")
    wanted = Wanted(0.95, quality_floor=0.97)

    def simulated(plan: Candidate, num_requests: int) -> Score:
        made = fixed_plan(
            resources, profiles, dict(plan.workers), plan.threshold, plan.max_batched_tokens
        )
        result = Simulation(made, iter(arrivals[:num_requests])).run()
        return Score(result["slo"]["both"] or 0.0, result["quality_ratio"], None, None)

    slo = Slo(1.0, 0.1)
    plans = list(propose(tiers, points, arrivals, slo, wanted.quality_floor))
    found = search(plans, tiers, wanted, simulated, len(arrivals), lambda text: None)

    holds = [point.threshold for point in points if (point.quality_ratio or 0.0) >= 0.97]
    grid = [
        candidate({("small", "unified"): small, ("large", "unified"): large}, threshold, tiers)
        for threshold in (holds[-1], holds[len(holds) // 2])
        for small in (1, 2, 3)
        for large in (1, 2, 3, 4)
    ]
    assert len(grid) == 24
    good = [plan for plan in grid if wanted.held(simulated(plan, len(arrivals)))]
    assert found.best is not None
    best = min(plan.usd_per_hour for plan in good)
    assert found.best.candidate.usd_per_hour <= 1.05 * best


def test_the_front_has_no_plan_that_another_beats() -> None:
    front = run(Wanted(0.95)).front

    prices = [one.candidate.usd_per_hour for one in front]
    met = [one.score.slo_met for one in front]
    assert prices == sorted(prices)
    assert met == sorted(set(met))


def test_a_threshold_is_judged_by_the_outcomes_it_leads_to() -> None:
    points = shares_of(traffic(), ["small", "large"], "large")

    assert points[0].shares["large"] == pytest.approx(1.0)
    assert points[0].quality_ratio == pytest.approx(1.0)
    half = min(points, key=lambda p: abs(p.shares["small"] - 0.5))
    assert half.quality_ratio == pytest.approx(1.0, abs=0.05)
    assert points[-1].quality_ratio == pytest.approx(0.6, abs=0.05)


def test_without_predictions_all_go_to_the_fallback_tier_and_the_report_says_so() -> None:
    blind = [Arrival(a.at_s, a.prompt_tokens, a.output_tokens) for a in traffic()]

    (point,) = shares_of(blind, ["small", "large"], "large")

    assert point.shares == {"small": 0.0, "large": 1.0}
    assert point.quality_ratio is None


def test_a_plan_is_sized_for_its_busiest_minute() -> None:
    calm = [Arrival(float(i), 100, {"": 10}) for i in range(600)]
    burst = [Arrival(300.0 + i / 20.0, 100, {"": 10}) for i in range(1200)]

    assert busiest(sorted([*calm, *burst], key=lambda a: a.at_s)) == pytest.approx(21.0, abs=0.5)


@pytest.mark.parametrize(
    ("spec", "floor"),
    [
        ({"predictor": {"artifact": "configmap://p"}}, 0.95),
        ({"predictor": {"artifact": "configmap://p"}, "threshold": "0.3"}, None),
        ({"predictor": {"artifact": "configmap://p"}, "objective": {"qualityFloor": "0.9"}}, 0.9),
        ({"objective": {"qualityFloor": "0.9"}}, 0.9),
        ({}, None),
    ],
)
def test_a_plan_has_to_hold_the_floor_that_the_router_will_hold(
    spec: dict[str, object], floor: float | None
) -> None:
    tiers = [{"name": n, "modelRef": {"name": n}} for n in ("small", "large")]
    router = Router.model_validate(
        {"metadata": {"name": "r", "namespace": "n"}, "spec": {"tiers": tiers, **spec}}
    )

    assert wanted_floor(Resources(router, {}, None)) == floor


def test_a_floor_that_is_tried_out_is_in_the_yaml_that_is_run() -> None:
    tiers = [{"name": n, "modelRef": {"name": n}} for n in ("small", "large")]
    metadata = {"name": "r", "namespace": "n"}
    router = Router.model_validate({"metadata": metadata, "spec": {"tiers": tiers}})
    role = {"weights": {"source": "hf://a/b"}, "unified": {}}
    models = {
        name: Model.model_validate({"metadata": {**metadata, "name": name}, "spec": role})
        for name in ("small", "large")
    }
    plan = candidate({("small", "unified"): 2}, 0.1, TIERS)

    tried = with_floor(Resources(router, models, None), 0.5)
    written = list(yaml.safe_load_all(manifests(plan, tried.router, models, False)))

    assert wanted_floor(tried) == 0.5
    assert written[-1]["spec"]["objective"] == {"qualityFloor": "0.5"}
    Router.model_validate({"metadata": metadata, "spec": written[-1]["spec"]})


def test_a_tier_that_another_holds_alone_is_left_out_where_that_is_cheaper() -> None:
    """The formulas would give the large tier two workers for everything; one does."""

    def large_alone(plan: Candidate, num_requests: int) -> Score:
        holds = plan.count(("large", "unified")) > 0
        return Score(1.0 if holds else 0.0, 1.0, 0.1, 0.01)

    plans = [
        candidate({("small", "unified"): 1, ("large", "unified"): 1}, 0.1, TIERS),
        candidate({("large", "unified"): 2}, 0.1, TIERS),
    ]
    wanted = Wanted(0.95, quality_floor=0.99)

    found = search(plans, TIERS, wanted, large_alone, 400, lambda text: None)

    assert found.best is not None
    assert dict(found.best.candidate.workers) == {("large", "unified"): 1}
    assert "one tier is enough: large holds everything alone" in sentences(
        found, wanted, scored=True
    )


def test_a_plan_that_sends_all_to_the_dearest_tier_is_yaml_that_is_taken() -> None:
    router, models = resources_of_two_tiers()
    plan = candidate({("small", "unified"): 1, ("large", "unified"): 1}, -0.007, TIERS)

    written = list(yaml.safe_load_all(manifests(plan, router, models, threshold_is_free=True)))

    assert written[-1]["spec"]["threshold"] == "0.0000"
    Router.model_validate({"metadata": router.metadata, "spec": written[-1]["spec"]})


@pytest.mark.parametrize(("spec", "floor"), [({"threshold": "0.3"}, 0.9), ({}, 1.5)])
def test_a_floor_that_the_router_cannot_have_is_refused(
    spec: dict[str, object], floor: float
) -> None:
    tiers = [{"name": n, "modelRef": {"name": n}} for n in ("small", "large")]
    router = Router.model_validate(
        {"metadata": {"name": "r", "namespace": "n"}, "spec": {"tiers": tiers, **spec}}
    )

    with pytest.raises(PlanError, match="floor"):
        with_floor(Resources(router, {}, None), floor)


def test_equal_plans_are_one() -> None:
    left = candidate({("small", "unified"): 2, ("large", "unified"): 0}, 0.1, TIERS)
    right = candidate({("small", "unified"): 2}, 0.1, TIERS)

    assert left == right
