"""What chance does to a few seconds of traffic starts no workers."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from tandem_operator.autoscale.demand import Demand
from tandem_operator.autoscale.forecast import RateForecast
from tandem_operator.autoscale.observe import TrafficMeter
from tandem_operator.autoscale.profile import Load, PerformanceProfile, shared_tpot_s

STEP_S = 5.0


def poisson(rng: random.Random, mean: float) -> int:
    count, product, least = 0, rng.random(), math.exp(-mean)
    while product > least:
        count += 1
        product *= rng.random()
    return count


def counted(rate: float, seconds: float, seed: int = 0) -> list[tuple[float, float]]:
    """(time, requests per second) as arrivals of a Poisson process are counted."""
    rng = random.Random(seed)
    steps = int(seconds / STEP_S)
    return [(i * STEP_S, poisson(rng, rate * STEP_S) / STEP_S) for i in range(steps)]


@pytest.mark.parametrize("rate", [2.0, 10.0, 40.0])
def test_a_steady_rate_is_forecast_with_a_small_margin_however_it_is_counted(rate: float) -> None:
    forecast = RateForecast(60.0)
    predicted = []
    for now, sample in counted(rate, 3600.0):
        forecast.observe(now, sample)
        if now > 600.0:
            predicted.append(forecast.predict() or 0.0)

    # The counts of five seconds differ by sqrt(rate / 5) each: that is not added.
    assert rate <= statistics.mean(predicted) <= rate + 0.75 * math.sqrt(rate / STEP_S)


def test_a_rate_that_really_changes_keeps_its_margin() -> None:
    forecast = RateForecast(60.0)
    for step in range(240):
        forecast.observe(step * STEP_S, 20.0 if step // 12 % 2 else 5.0)

    assert (forecast.predict() or 0.0) > 17.0


def test_chance_at_a_low_rate_is_no_burst_and_a_burst_is_one() -> None:
    demand = Demand(60.0, None)
    wanted = []
    for now, sample in counted(1.0, 3600.0, seed=4):
        demand.observe(now, Load(sample, 100.0, 2e4, 50.0), None, ("t",), ("t",))
        wanted.append(demand.rate(now, sample))
    demand.observe(3600.0, Load(8.0, 100.0, 2e4, 50.0), None, ("t",), ("t",))

    assert max(wanted[60:]) < 2.2
    assert demand.rate(3600.0, 8.0) == 8.0


def test_lengths_of_a_few_requests_do_not_move_the_mean_that_pools_are_sized_for() -> None:
    rng = random.Random(1)
    meter = TrafficMeter()
    count = prompt = output = 0.0
    means = []
    for step in range(400):
        for _ in range(10):
            count += 1
            prompt += rng.expovariate(1.0 / 1000.0)
            output += rng.expovariate(1.0 / 200.0)
        tiers = {"t": {"num_arrived": count, "prompt_tokens": prompt, "num_held": 0}}
        state = {
            "arrivals": {"num_refused": 0, "tiers": tiers},
            "tiers": [{"name": "t", "num_requests": count, "output_tokens": output}],
        }
        traffic = meter.read(step * STEP_S, {"r": state})
        if traffic is not None and step > 60:
            means.append((traffic.load.prompt_tokens, traffic.load.output_tokens))

    assert all(850.0 < p < 1150.0 and 165.0 < o < 235.0 for p, o in means)


def test_prompts_of_unequal_length_slow_the_unlucky_answers_of_a_unified_worker() -> None:
    profile = PerformanceProfile((0.02, 1e-4, 0.0), (0.02, 1e-7, 2e-4), 100_000)
    equal = Load(2.0, 1000.0, 1000.0**2, 200.0)
    unequal = Load(2.0, 1000.0, 4.0 * 1000.0**2, 200.0)

    assert shared_tpot_s(unequal, profile, 1, 99.0) > 1.05 * shared_tpot_s(equal, profile, 1, 99.0)
    assert shared_tpot_s(unequal, profile, 1, 50.0) == shared_tpot_s(equal, profile, 1, 50.0)
