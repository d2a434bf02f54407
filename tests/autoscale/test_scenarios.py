"""What the loop does in the situations that people meet, on a simulated cluster or step by step."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tandem_operator.autoscale.demand import Demand
from tandem_operator.autoscale.loop import (
    Autoscaler,
    LoopSettings,
    Observation,
    Speed,
)
from tandem_operator.autoscale.placement import Unplaced
from tandem_operator.autoscale.profile import Load, PerformanceProfile, Slo
from tandem_operator.autoscale.seasons import HourlyRates
from tandem_operator.autoscale.sizing import Ceilings, Operating, PoolSpec
from tandem_operator.resources import Model, Router
from tandem_operator.simulate.arrivals import Arrival
from tandem_operator.simulate.plan_file import Resources, simulation_plan
from tandem_operator.simulate.profiles import Profile
from tandem_operator.simulate.simulation import Simulation

FAST = Profile((0.008, 2.2e-5, 2e-10), (0.008, 2.5e-8, 5e-5), kv_tokens=400_000)
SMALL = PoolSpec("small", "unified", gpus=1, usd_per_hour=2.0, maximum=20)
LARGE = PoolSpec("large", "unified", gpus=2, usd_per_hour=8.0, maximum=20)
PROFILE = PerformanceProfile((0.02, 1e-4, 0.0), (0.02, 1e-7, 1e-4), 400_000)
CURVE = (
    Operating(-0.1, {"small": 0.0, "large": 1.0}, 1.0),
    Operating(0.1, {"small": 0.5, "large": 0.5}, 0.985),
    Operating(0.2, {"small": 0.8, "large": 0.2}, 0.975),
    Operating(0.4, {"small": 1.0, "large": 0.0}, 0.8),
)


def one_tier(replicas: int) -> Resources:
    model = {"weights": {"source": "hf://a/b"}, "unified": {"replicas": replicas, "gpus": 1}}
    spec = {
        "tiers": [{"name": "small", "modelRef": {"name": "s"}}],
        "fallbackTier": "small",
        "slo": {"ttft": {"target": "500ms"}, "tpot": {"target": "60ms"}},
        "scaling": {"mode": "Managed"},
    }
    metadata = {"name": "s", "namespace": "default"}
    return Resources(
        Router.model_validate({"metadata": {**metadata, "name": "chat"}, "spec": spec}),
        {"s": Model.model_validate({"metadata": metadata, "spec": model})},
        None,
    )


def step_of_load(low: float, high: float, at_s: float, until_s: float) -> Iterator[Arrival]:
    rng, now = random.Random(1), 0.0
    while now < until_s:
        now += rng.expovariate(low if now < at_s else high)
        yield Arrival(now, rng.choice([400, 800, 1200]), {"": rng.choice([50, 100, 150])})


def test_a_load_that_the_workers_cannot_serve_is_seen_as_it_arrives_and_caught_up_with() -> None:
    """A worker serves some 20 a second; 60 come. No tier is scored: one model, no predictor."""
    plan = simulation_plan(one_tier(1), {"small": FAST}, startup_s=30.0)
    simulation = Simulation(plan, step_of_load(5.0, 60.0, at_s=60.0, until_s=300.0))

    simulation.run()

    waiting = [(p.at_s, p.waiting) for p in simulation.timeline]
    most = max(p.workers["small/unified"] for p in simulation.timeline)
    ups = [d for d in simulation.decisions if d["after"] > d["before"]]
    assert ups[0]["at_s"] <= 60.0 + 2 * plan.interval_s
    assert all(count < 20 for at_s, count in waiting if at_s >= 200.0)
    assert 3 <= most <= 8


class World:
    """A loop stepped every five seconds under a steady load."""

    def __init__(self, **settings_: object) -> None:
        base = LoopSettings(
            (SMALL, LARGE),
            Slo(ttft_s=1.0, tpot_s=0.1),
            quality_floor=0.97,
            down={r: Speed(30.0, 4) for r in ("unified",)},  # type: ignore[misc]
        )
        self.loop = Autoscaler(replace(base, **settings_))  # type: ignore[arg-type]
        self.now = 1_800_000_000.0
        self.workers = {SMALL.key: 2, LARGE.key: 4}
        self.threshold = 0.2
        self.rate = 20.0
        self.seen: dict[str, object] = {}

    def step(self, times: int = 1) -> list[str]:
        reasons = []
        for _ in range(times):
            self.now += 5.0
            observation = Observation(
                Load(self.rate, 800.0, 900_000.0, 100.0),
                dict(self.workers),
                CURVE,
                {"small": PROFILE, "large": PROFILE},
                self.threshold,
                arrived={"small": 5 * self.rate, "large": 5 * self.rate},
            )
            plan = self.loop.step(self.now, replace(observation, **self.seen))  # type: ignore[arg-type]
            self.workers = dict(plan.workers)
            self.threshold = plan.threshold
            reasons += [f"{d.pool}: {d.reason}" for d in plan.decisions]
        return reasons


def test_a_budget_that_is_cut_moves_the_threshold_at_once() -> None:
    world = World()
    world.step(20)
    before = world.threshold

    world.loop.reconfigure(replace(world.loop.settings, ceilings=Ceilings(usd_per_hour=10.0)))
    reasons = world.step()

    assert world.threshold > before
    assert any("threshold moved" in reason for reason in reasons)


def test_workers_that_no_node_takes_are_withdrawn_within_two_minutes_with_the_reason() -> None:
    world = World()
    world.step(20)
    world.rate = 60.0
    before = world.threshold

    reasons = []
    for _ in range(24):  # two minutes; two of the workers have a node
        missing = max(0, world.workers[LARGE.key] - 2)
        world.seen = {"unplaced": {LARGE.key: Unplaced(missing, "0/4 nodes have a GPU free")}}
        reasons += world.step()

    assert world.workers[LARGE.key] <= 2
    assert any("withdrawn" in r and "0/4 nodes have a GPU free" in r for r in reasons)
    assert world.threshold > before


def test_a_cheaper_threshold_inside_the_quality_band_is_taken_where_it_saves_money() -> None:
    world = World()
    world.threshold = 0.1  # .985 where .975 would do and cost half

    world.step(40)

    assert world.threshold == pytest.approx(0.2, abs=0.02)


def test_silence_ends_a_forecast_within_two_readings() -> None:
    demand = Demand(60.0, None)
    for second in range(0, 300, 5):
        demand.observe(float(second), Load(50.0, 1.0, 1.0, 1.0), {"small"}, {"small"}, {"small"})

    for second in (300, 305):
        demand.observe(float(second), Load(0.0, 1.0, 1.0, 1.0), set(), {"small"}, {"small"})

    assert demand.rate(305.0, 0.0) == 0.0


def test_without_traffic_pools_are_at_their_floor_within_two_readings() -> None:
    """Where the policy gives no window, and a step as large as it takes; else after its window."""
    world = World(down={"unified": Speed(0.0, 100)})
    world.rate = 60.0
    world.step(40)
    before = dict(world.workers)

    world.rate = 0.0
    world.step(2)

    assert min(before.values()) > 1
    assert set(world.workers.values()) == {1}


def test_waking_up_starts_one_worker_for_each_pool_that_is_needed() -> None:
    """Whatever traffic there was before the tiers fell asleep."""
    world = World(idle_after_s=600.0)
    world.rate = 60.0
    world.step(60)
    busy = dict(world.workers)
    world.rate = 0.0
    world.step(300)
    asleep = dict(world.workers)

    world.rate = 0.2  # one request within five seconds, of which the router tells at once
    world.seen = {"arrived": {"small": 1.0, "large": 0.0}, "backlog": {"small": 1.0}}
    world.step()

    assert sum(busy.values()) > 8
    assert set(asleep.values()) == {0}
    assert world.workers == {SMALL.key: 1, LARGE.key: 0}


def test_a_hundred_scale_downs_break_no_stream() -> None:
    """Answers of a minute while workers come and go every five seconds; each ends whole."""
    slow = Profile((0.02, 1e-4, 1e-9), (0.05, 1e-7, 2e-4), kv_tokens=400_000)
    streams = (Arrival(0.5 * number, 300, {"": 1200}) for number in range(2000))
    plan = simulation_plan(one_tier(4), {"small": slow}, startup_s=1.0, scaling=False)
    simulation = Simulation(plan, streams)
    for step in range(200):  # four, two, four, two, ...: a hundred times down
        replicas = 4 if step % 2 else 2
        at_s = 5.0 + 5.0 * step
        simulation.clock.at(at_s, simulation.cluster.scale, ("small", "unified"), replicas)

    result = simulation.run()

    assert result["served"] == result["requests"] == 2000
    assert (result["failed"], result["rejected"]) == (0, 0)
    assert result["e2e_s"]["p50"] > 60.0
    assert sum(simulation.outcomes.output_tokens) == 2000 * 1200


def test_an_hour_that_brought_more_on_other_days_is_prepared_for() -> None:
    rates = HourlyRates()
    for hour in range(48):
        for minute in range(0, 60, 10):
            rates.observe(3600.0 * hour + 60.0 * minute, 40.0 if hour % 24 >= 9 else 10.0)
    learnt = HourlyRates.parse(rates.as_json())

    before_nine = 3600.0 * (48 + 9) - 600.0
    noon = 3600.0 * (48 + 12)

    assert learnt.ahead(before_nine, 10.0, 600.0) > 12.0
    assert learnt.ahead(noon, 40.0, 600.0) == 0.0
    assert len(learnt.as_json()) < 2048


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.text(max_size=30) | st.lists(st.floats() | st.none(), max_size=200).map(str))
@example(f"[{', '.join(['1' + '0' * 400] * 168)}]")  # a number that no float holds
def test_what_was_kept_of_the_week_may_be_anything(text: str) -> None:
    learnt = HourlyRates.parse(text)

    assert learnt.ahead(1e9, 1.0, 60.0) >= 0.0


def test_a_budget_that_is_too_small_does_not_hand_workers_back_and_forth() -> None:
    """Half an hour in which the load breathes: whoever gets the scarce workers keeps them.

    The routers hold their floor, so that no threshold makes the load cheaper.
    """
    prefill = PoolSpec("large", "prefill", gpus=1, usd_per_hour=4.0, maximum=20)
    decode = PoolSpec("large", "decode", gpus=1, usd_per_hour=4.0, maximum=20)
    world = World(pools=(prefill, decode), ceilings=Ceilings(usd_per_hour=20.0))
    world.workers = {prefill.key: 2, decode.key: 3}
    world.seen = {"threshold_limit": -0.1}
    rng = random.Random(2)
    moves, before = 0, dict(world.workers)
    for step in range(360):
        world.rate = 400.0 + 40.0 * math.sin(step / 20.0) + rng.uniform(-32.0, 32.0)
        world.step()
        if step > 60:
            moves += sum(before[key] != count for key, count in world.workers.items())
        before = dict(world.workers)

    assert sum(world.workers.values()) == 5
    assert moves <= 4
