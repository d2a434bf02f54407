"""Autoscaling: predictions, sizes inside budgets, a loop that neither flaps nor starves."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_operator.autoscale import (
    Autoscaler,
    Ceilings,
    Load,
    LoopSettings,
    Observation,
    Operating,
    PerformanceProfile,
    PoolSpec,
    RateForecast,
    Slo,
    Speed,
    size,
    workers_for_slo,
)
from tandem_operator.autoscale.profile import erlang_c, mean_batch, tpot_s, ttft_s

SMALL = PerformanceProfile((0.005, 2e-5, 0.0), (0.006, 1e-8, 1e-5), kv_tokens=800_000)
LARGE = PerformanceProfile((0.02, 1.2e-4, 2e-9), (0.02, 8e-8, 5e-5), kv_tokens=400_000)
PROFILES = {"small": SMALL, "large": LARGE}
POOLS = (
    PoolSpec("small", "unified", gpus=1, usd_per_hour=2.0),
    PoolSpec("large", "prefill", gpus=2, usd_per_hour=6.0),
    PoolSpec("large", "decode", gpus=2, usd_per_hour=6.0),
)
SLO = Slo(ttft_s=1.0, tpot_s=0.06)
CURVE = tuple(
    Operating(threshold, {"small": 1 - share, "large": share}, 0.82 + 0.18 * share**0.5)
    for threshold, share in ((-0.1, 1.0), (0.0, 0.8), (0.1, 0.5), (0.2, 0.2), (0.3, 0.0))
)


def load(rate: float) -> Load:
    return Load(rate, 1000.0, 2.5e6, 200.0)


loads = st.builds(
    lambda rate, mean, spread, out: Load(rate, mean, mean * mean * spread, out),
    st.floats(0.0, 300.0),
    st.floats(1.0, 8000.0),
    st.floats(1.0, 4.0),
    st.floats(1.0, 1000.0),
)


# Predictions.


def test_erlang_c_agrees_with_the_closed_form_for_one_and_two_servers():
    assert erlang_c(1, 0.7) == pytest.approx(0.7)
    rho = 0.6
    assert erlang_c(2, 1.2) == pytest.approx(2 * rho**2 / (1 + rho))


def test_predicted_ttft_agrees_with_a_simulated_queue():
    rng = random.Random(1)
    profile = PerformanceProfile((0.05, 0.0, 0.0), (0.0, 0.0, 0.0), 10**6)
    arrivals, free, waits, now = 60_000, [0.0] * 4, [], 0.0
    for _ in range(arrivals):
        now += rng.expovariate(60.0)
        server = min(range(4), key=free.__getitem__)
        start = max(now, free[server])
        free[server] = start + 0.05
        waits.append(start - now + 0.05)
    simulated = sorted(waits)[int(0.95 * arrivals)]

    predicted = ttft_s(Load(60.0, 100.0, 10_000.0, 1.0), profile, 4, 95.0)

    assert predicted == pytest.approx(simulated, rel=0.2)


@settings(max_examples=150, deadline=None)
@given(load=loads, workers=st.integers(1, 60))
def test_latency_never_rises_with_workers_nor_falls_with_load(load, workers):
    for latency in (ttft_s, tpot_s):
        now = latency(load, LARGE, workers, 95.0)
        assert latency(load, LARGE, workers + 1, 95.0) <= now * (1 + 1e-9)
        assert latency(load.scaled(1.1), LARGE, workers, 95.0) >= now * (1 - 1e-9)


def test_the_decode_batch_is_what_littles_law_asks_for():
    batch = mean_batch(load(30.0), LARGE, 4)
    step = LARGE.step_s(batch, 1100.0)
    assert batch == pytest.approx(30.0 / 4 * 200.0 * step)


@settings(max_examples=150, deadline=None)
@given(load=loads)
def test_sizes_are_minimal(load):
    for pool in POOLS:
        count, met = workers_for_slo(pool, load, PROFILES[pool.tier], SLO)
        assert pool.minimum <= count <= pool.maximum
        if met and count > max(1, pool.minimum):
            fewer = replace(pool, maximum=count - 1)
            assert not workers_for_slo(fewer, load, PROFILES[pool.tier], SLO)[1]


def test_a_promise_nobody_can_keep_does_not_take_every_gpu():
    impossible = Slo(ttft_s=0.001)
    count, met = workers_for_slo(POOLS[1], load(5.0), LARGE, impossible)
    assert not met
    assert count < 16


# Sizes within budgets.


def test_the_cheapest_threshold_that_meets_the_floor_is_taken():
    sizes = size(POOLS, load(20.0), CURVE, PROFILES, SLO, 0.9, Ceilings())
    assert sizes.quality_ratio == pytest.approx(0.9)
    assert 0.2 <= sizes.threshold <= min(p.threshold for p in CURVE if p.quality_ratio < 0.9)
    assert sizes.slo_met


def test_between_two_known_points_the_threshold_goes_as_far_as_the_floor_allows():
    curve = [
        Operating(0.1, {"small": 0.4, "large": 0.6}, 0.96),
        Operating(0.2, {"small": 0.6, "large": 0.4}, 0.94),
    ]

    sizes = size(POOLS, load(20.0), curve, PROFILES, SLO, 0.95, Ceilings())

    assert sizes.threshold == pytest.approx(0.15)
    assert sizes.quality_ratio == pytest.approx(0.95)


def test_an_unreachable_floor_takes_the_best_point_and_says_so():
    lame = [replace(point, quality_ratio=0.5 + point.shares["large"] / 10) for point in CURVE]
    sizes = size(POOLS, load(20.0), lame, PROFILES, SLO, 0.9, Ceilings())
    assert sizes.threshold == -0.1
    assert "no threshold reaches the quality floor 0.9" in sizes.notes[0]


def test_over_the_budget_the_threshold_moves_to_cheaper_tiers_first():
    free = size(POOLS, load(60.0), CURVE, PROFILES, SLO, 0.98, Ceilings())
    tight = size(POOLS, load(60.0), CURVE, PROFILES, SLO, 0.98, Ceilings(gpus=free.gpus - 4))

    assert tight.threshold > free.threshold
    assert tight.gpus <= free.gpus - 4
    assert tight.slo_met
    assert "threshold moved" in tight.notes[0]


def test_when_even_the_cheapest_mix_is_over_workers_go_where_they_save_most():
    only_large = (Operating(0.0, {"small": 0.5, "large": 0.5}, 1.0),)
    sizes = size(POOLS, load(200.0), only_large, PROFILES, SLO, None, Ceilings(gpus=8))
    assert sizes.gpus <= 8
    assert not sizes.slo_met
    assert sizes.workers["small", "unified"] >= 1
    assert "even the cheapest mix" in sizes.notes[-1]


@settings(max_examples=40, deadline=None)
@given(
    load=loads,
    gpus=st.one_of(st.none(), st.integers(0, 60)),
    usd=st.one_of(st.none(), st.floats(0.0, 200.0)),
    floor=st.one_of(st.none(), st.floats(0.0, 1.0)),
)
def test_sizes_never_exceed_a_ceiling(load, gpus, usd, floor):
    ceilings = Ceilings(gpus, usd)
    sizes = size(POOLS, load, CURVE, PROFILES, SLO, floor, ceilings)
    assert gpus is None or sizes.gpus <= gpus
    assert usd is None or sizes.usd_per_hour <= usd + 1e-6


@settings(max_examples=40, deadline=None)
@given(load=loads, gpus=st.tuples(st.integers(0, 60), st.integers(0, 60)))
def test_more_gpus_never_lower_quality(load, gpus):
    few, many = (
        size(POOLS, load, CURVE, PROFILES, SLO, 0.95, Ceilings(gpus=count)).quality_ratio
        for count in sorted(gpus)
    )
    assert many >= few


def test_a_tier_without_a_profile_is_named():
    with pytest.raises(ValueError, match="no performance profile for large; their workers report"):
        size(POOLS, load(1.0), CURVE, {"small": SMALL}, SLO, None, Ceilings())


# Forecast.


def test_the_forecast_leads_a_ramp_and_follows_a_plateau():
    forecast = RateForecast(60.0)
    for t in range(0, 600, 5):
        forecast.observe(t, 10.0 + 0.1 * t)
    ramp = forecast.predict()
    for t in range(600, 1800, 5):
        forecast.observe(t, 70.0)
    assert ramp > 10.0 + 0.1 * 600
    assert forecast.predict() == pytest.approx(70.0, rel=0.05)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(), st.one_of(st.none(), st.floats())), max_size=40))
def test_a_forecast_is_finite_and_not_negative_whatever_it_is_told(samples):
    forecast = RateForecast()
    for now, rate in samples:
        if math.isfinite(now) and abs(now) < 1e9 and (rate is None or not abs(rate) > 1e9):
            forecast.observe(now, rate)
    predicted = forecast.predict()
    assert predicted is None or (math.isfinite(predicted) and predicted >= 0.0)


# The loop.


def make_loop(**changes) -> Autoscaler:
    return Autoscaler(replace(LoopSettings(POOLS, SLO, quality_floor=0.95), **changes))


class Cluster:
    """Obeys every plan at once."""

    def __init__(self, loop: Autoscaler) -> None:
        self.loop = loop
        self.workers = {pool.key: 1 for pool in POOLS}
        self.threshold = 0.1
        self.now = 0.0

    def run(self, seconds: float, rate: float | None, every: float = 5.0):
        plans = []
        for _ in range(int(seconds / every)):
            self.now += every
            seen = Observation(
                None if rate is None else load(rate), self.workers, CURVE, PROFILES, self.threshold
            )
            plan = self.loop.step(self.now, seen)
            self.workers, self.threshold = dict(plan.workers), plan.threshold
            plans.append(plan)
        return plans


def test_a_burst_is_answered_at_once_and_let_go_after_the_window():
    cluster = Cluster(make_loop())
    cluster.run(300, 5.0)
    quiet = sum(cluster.workers.values())

    first = cluster.run(15, 80.0)[-1]
    busy = sum(cluster.workers.values())
    cluster.run(120, 5.0)
    soon = sum(cluster.workers.values())
    cluster.run(1800, 5.0)
    late = sum(cluster.workers.values())

    assert busy > quiet
    assert first.decisions or busy > quiet
    assert soon >= busy * 0.9
    assert late == quiet


def test_a_steady_load_makes_no_decisions():
    cluster = Cluster(make_loop())
    cluster.run(900, 20.0)
    assert not [d for plan in cluster.run(600, 20.0) for d in plan.decisions]


def test_noise_does_not_flap():
    cluster, rng, changes = Cluster(make_loop()), random.Random(3), 0
    cluster.run(600, 20.0)
    for _ in range(360):
        changes += len(cluster.run(5, 20.0 * rng.uniform(0.8, 1.2))[0].decisions)
    assert changes <= 8


def test_missing_metrics_hold_and_say_so():
    cluster = Cluster(make_loop())
    cluster.run(300, 40.0)
    before = dict(cluster.workers)

    plan = cluster.run(60, None)[-1]

    assert cluster.workers == before
    assert plan.slo_met is None
    assert plan.decisions[0].reason == "the load is not measured: holding"


@pytest.mark.parametrize("missing", ["Hold", "ScaleUp"])
@pytest.mark.parametrize(
    ("gpus", "woken"), [(5, {"small", "large"}), (4, {"small"}), (1, {"small"}), (0, set())]
)
def test_a_held_request_wakes_the_tiers_that_the_budget_allows(missing, gpus, woken):
    """A worker of each pool needs 5 GPUs; a prefill worker without a decode worker is no use."""
    loop = make_loop(ceilings=Ceilings(gpus=gpus), missing_metrics=missing, idle_after_s=60.0)
    asleep = {pool.key: 0 for pool in POOLS}
    seen = Observation(load(1.0), asleep, (), {}, 0.1)

    plan = loop.step(5.0, seen)

    assert plan.workers == {key: int(key[0] in woken) for key in asleep}
    assert plan.within_budget
    told = plan.decisions[-1].reason
    assert ("the budget allows no more workers" in told) == (gpus < 5)


@given(
    gpus=st.integers(0, 30),
    workers=st.tuples(*(st.integers(0, 8) for _ in POOLS)),
    missing=st.sampled_from(["Hold", "ScaleUp"]),
    rate=st.sampled_from([None, 0.0, 10.0]),
)
def test_without_metrics_nothing_shrinks_and_nothing_grows_over_the_budget(
    gpus, workers, missing, rate
):
    loop = make_loop(ceilings=Ceilings(gpus=gpus), missing_metrics=missing)
    before = {pool.key: count for pool, count in zip(POOLS, workers, strict=True)}
    seen = Observation(None if rate is None else load(rate), before, (), {}, 0.1)

    plan = loop.step(5.0, seen)

    assert all(plan.workers[key] >= count for key, count in before.items())
    assert plan.within_budget or plan.workers == before


def test_idle_pools_sleep_only_after_the_time_given_and_wake_on_load():
    cluster = Cluster(make_loop(idle_after_s=600.0, down={}))
    cluster.run(60, 10.0)
    cluster.run(300, 0.0)
    awake = dict(cluster.workers)
    cluster.run(1200, 0.0)
    asleep = dict(cluster.workers)
    cluster.run(10, 10.0)

    assert min(awake.values()) >= 1
    assert set(asleep.values()) == {0}
    assert min(cluster.workers.values()) >= 1


@settings(max_examples=25, deadline=None)
@given(
    rates=st.lists(st.floats(0.0, 150.0), min_size=1, max_size=12),
    gpus=st.integers(5, 40),
)
def test_a_plan_that_can_fit_the_budget_does_in_every_step(rates, gpus):
    """One worker per pool needs 5 GPUs: from there on no step may ask for more than there are."""
    cluster = Cluster(make_loop(ceilings=Ceilings(gpus=gpus)))
    for rate in rates:
        plan = cluster.run(10, rate)[-1]
        assert sum(pool.gpus * plan.workers[pool.key] for pool in POOLS) <= gpus
        assert plan.within_budget


def test_the_last_ten_decisions_are_kept_with_their_reasons():
    cluster, rng = Cluster(make_loop()), random.Random(0)
    for _ in range(60):
        cluster.run(30, rng.choice([1.0, 150.0]))
    recent = cluster.loop.recent
    assert len(recent) == 10
    assert all(decision.reason and decision.before != decision.after for decision in recent)


def test_a_role_obeys_its_own_windows_steps_and_periods():
    slow = {role: Speed(window_s=60.0, max_step=1, period_s=30.0) for role in ("decode", "unified")}
    cluster = Cluster(make_loop(up=slow))
    cluster.run(120, 1.0)
    cluster.run(50, 200.0)
    held = dict(cluster.workers)
    cluster.run(70, 200.0)

    assert held["large", "decode"] == 1
    assert held["large", "prefill"] > 1
    assert 2 <= cluster.workers["large", "decode"] <= 4


def test_a_measured_signal_can_lead_instead_of_the_forecast():
    loop = make_loop(signals={"decode": {"KVUtilization": 0.5}})
    workers = {pool.key: 4 for pool in POOLS}
    seen = Observation(
        load(1.0),
        workers,
        CURVE,
        PROFILES,
        0.1,
        signals={("large", "decode"): {"KVUtilization": 0.9}},
    )
    assert loop.step(0.0, seen).workers["large", "decode"] == 8


def test_a_query_gives_the_whole_pools_number_and_its_target_is_a_workers_part():
    loop = make_loop(signals={"decode": {"Prometheus": 10.0}})
    workers = {pool.key: 2 for pool in POOLS}
    seen = Observation(load(1.0), workers, CURVE, PROFILES, 0.1)

    more = loop.step(0.0, replace(seen, queried={("large", "decode"): 45.0}))
    same = loop.step(5.0, replace(seen, queried={("large", "decode"): 19.0}))

    assert more.workers["large", "decode"] == 5
    assert same.workers["large", "decode"] == 2


def test_a_query_without_a_number_holds_the_pool_and_says_so_once():
    loop = make_loop(
        signals={"decode": {"Prometheus": 10.0}}, down={"decode": Speed(0.0, max_step=8)}
    )
    seen = Observation(
        load(1.0),
        {pool.key: 3 for pool in POOLS},
        CURVE,
        PROFILES,
        0.1,
        queried={("large", "decode"): "Prometheus does not answer: late"},
    )

    plans = [loop.step(5.0 * step, seen) for step in range(3)]

    assert {plan.workers["large", "decode"] for plan in plans} == {3}
    said = [d.reason for d in loop.recent if d.pool == "large/decode"]
    assert said == [
        "the query of the policy gives no number, holding: Prometheus does not answer: late"
    ]


def test_a_schedule_holds_its_floor_even_over_sleep():
    cluster = Cluster(make_loop(idle_after_s=10.0))
    seen = Observation(load(0.0), cluster.workers, CURVE, PROFILES, 0.1, floor=3)
    for step in range(200):
        plan = cluster.loop.step(5.0 * step, seen)
        seen = replace(seen, workers=plan.workers)
    assert set(plan.workers.values()) == {3}


@pytest.mark.parametrize("gpus", [None, 14])
def test_a_curve_that_jitters_does_not_move_the_threshold(gpus):
    """With and without a budget that binds: estimates differ from step to step, needs do not."""
    cluster, rng = Cluster(make_loop(ceilings=Ceilings(gpus=gpus))), random.Random(5)
    seen = set()
    for step in range(120):
        cluster.now += 5.0
        curve = [
            replace(
                p,
                threshold=p.threshold + rng.uniform(-0.02, 0.02),
                quality_ratio=min(1.0, p.quality_ratio + rng.uniform(-0.004, 0.004)),
            )
            for p in CURVE
        ]
        plan = cluster.loop.step(
            cluster.now,
            Observation(load(40.0), cluster.workers, curve, PROFILES, cluster.threshold),
        )
        cluster.workers, cluster.threshold = dict(plan.workers), plan.threshold
        if step > 20:
            seen.add(plan.threshold)
    assert len(seen) <= 3


# Without a floor: nothing measures quality, or the threshold is the user's.


def test_without_a_floor_the_threshold_stays_where_it_was_put():
    cluster = Cluster(make_loop(quality_floor=None, base_threshold=0.1))

    plans = cluster.run(900, 20.0) + cluster.run(300, 60.0) + cluster.run(900, 1.0)

    assert {plan.threshold for plan in plans} == {0.1}


def test_without_a_floor_a_short_budget_moves_the_threshold_and_gives_it_back():
    loop = make_loop(quality_floor=None, base_threshold=0.1, ceilings=Ceilings(gpus=10))
    cluster = Cluster(loop)
    cluster.run(300, 5.0)
    assert cluster.threshold == 0.1

    cluster.run(300, 60.0)
    short = cluster.threshold
    cluster.run(1800, 5.0)

    assert short > 0.1
    assert cluster.threshold == 0.1
    assert any("allows 0.1 again" in decision.reason for decision in loop.recent)


def test_a_schedule_is_named_where_it_raises_a_pool_even_while_nothing_is_measured():
    loop = make_loop()
    pools = {pool.key: 1 for pool in POOLS}
    quiet = Observation(load(0.1), pools, CURVE, PROFILES, 0.1, floor=3, floor_name="office-hours")
    blind = replace(quiet, load=None, curve=())

    for seen in (blind, quiet):
        loop = make_loop()
        plan = [loop.step(5.0 * n, seen) for n in range(2)][-1]
        assert set(plan.workers.values()) == {3}
        reasons = {d.reason.split(":")[0].split(";")[0] for d in loop.recent if "/" in d.pool}
        assert reasons == {"schedule office-hours asks for 3"}


def test_ttft_and_tpot_are_sized_each_to_its_own_percentile():
    decode, much = POOLS[2], load(200.0)

    def workers(**percentiles):
        return workers_for_slo(decode, much, LARGE, replace(SLO, tpot_s=0.03, **percentiles))[0]

    assert workers(ttft_percentile=99.0) == workers()
    assert workers(tpot_percentile=99.0) > workers() > workers(tpot_percentile=50.0)
