"""Managed scaling: from custom resources and reported JSON to replicas, threshold and status."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tandem_operator.autoscale import settings
from tandem_operator.autoscale.observe import (
    TrafficMeter,
    current_threshold,
    performance_profile,
    pool_signals,
    routing_curve,
)
from tandem_operator.autoscale.router_loops import ManagedScaling
from tandem_operator.autoscale.settings import ScheduledFloor, loop_settings, scheduled_floor
from tandem_operator.resources import Model, Router
from tandem_operator.resources.autoscaling import AutoscalingPolicySpec
from tandem_router.routing import set_points


def model(name: str, **roles) -> Model:
    spec = {"weights": {"source": "file:///models/x"}, **roles}
    return Model.model_validate({"metadata": {"name": name, "namespace": "default"}, "spec": spec})


def router(**spec) -> Router:
    return Router.model_validate(
        {
            "metadata": {"name": "chat", "namespace": "default"},
            "spec": {
                "tiers": [
                    {"name": "small", "modelRef": {"name": "s"}},
                    {"name": "large", "modelRef": {"name": "l"}},
                ],
                "slo": {
                    "ttft": {"percentile": 95, "target": "1s"},
                    "tpot": {"percentile": 99, "target": "60ms"},
                },
                "scaling": {"mode": "Managed"},
                "predictor": {"artifact": "configmap://p"},
                **spec,
            },
        }
    )


MODELS = {
    "s": model("s", unified={"replicas": 1, "gpus": 1, "usdPerHour": "2"}),
    "l": model(
        "l",
        prefill={"replicas": 1, "gpus": 2, "usdPerHour": "6", "maxReplicas": 5},
        decode={"replicas": 1, "gpus": 2, "usdPerHour": "6", "minReplicas": 2},
    ),
}
WORKERS = {("small", "unified"): 1, ("large", "prefill"): 1, ("large", "decode"): 2}
CURVE = [
    {"threshold": -0.1, "shares": {"small": 0.0, "large": 1.0}, "quality_ratio": 1.0},
    {"threshold": 0.1, "shares": {"small": 0.6, "large": 0.4}, "quality_ratio": 0.97},
    {"threshold": 0.3, "shares": {"small": 1.0, "large": 0.0}, "quality_ratio": 0.8},
]
AT_THE_FLOOR = 0.1 + 0.2 * (0.97 - 0.95) / (0.97 - 0.8)  # of 0.95, between two points


def state(
    requests: float,
    inflight: int = 0,
    threshold: float = 0.0,
    *,
    arrived: float | None = None,
    wanted: tuple[str, ...] = ("small", "large"),
):
    """A router's report: served requests, held ones, and arrivals (all served, if not given)."""
    asked = requests if arrived is None else arrived
    return {
        "arrivals": {
            "num_refused": 0,
            "tiers": {
                name: {
                    "num_arrived": asked / len(wanted) if name in wanted else 0,
                    "prompt_tokens": 1000 * asked / len(wanted) if name in wanted else 0,
                    "num_held": inflight / len(wanted) if name in wanted else 0,
                }
                for name in ("small", "large")
            },
        },
        "tiers": [
            {
                "name": name,
                "num_requests": requests / 2,
                "prompt_tokens": 500 * requests,
                "output_tokens": 100 * requests,
            }
            for name in ("small", "large")
        ],
        "num_inflight": inflight,
        "curve": CURVE,
        "set_points": {"gain_threshold": threshold},
    }


def worker(role: str, scale: float = 1.0):
    profile = {"prefill": [0.02 * scale, 1e-4 * scale, 0.0], "decode": [0.02 * scale, 5e-8, 5e-5]}
    return {
        "role": role,
        "profile": {
            half: numbers for half, numbers in profile.items() if role == "unified" or role == half
        },
        "kv_blocks": {"total": 5000, "used": 1000},
        "block_size": 64,
        "num_running": 3,
        "pending_prefill_tokens": 0,
    }


LOADS = [
    ("small", worker("unified", 0.3)),
    ("large", worker("prefill")),
    ("large", worker("decode")),
]


# Settings.


def test_settings_are_read_from_router_models_and_policy():
    policy = AutoscalingPolicySpec.model_validate(
        {
            "decode": {
                "signals": [{"name": "KVUtilization", "target": "0.7"}],
                "up": {"window": "10s", "maxStep": 2, "period": "20s"},
            },
            "idle": {"scaleToZero": True, "after": "5m"},
        }
    )

    found = loop_settings(router(budget={"gpus": 8, "usdPerHour": "24"}), MODELS, policy)

    bounds = {pool.key: (pool.minimum, pool.maximum, pool.gpus) for pool in found.pools}
    assert bounds == {
        ("small", "unified"): (0, 64, 1),
        ("large", "prefill"): (0, 5, 2),
        ("large", "decode"): (2, 64, 2),
    }
    assert (found.slo.ttft_s, found.slo.ttft_percentile) == (1.0, 95.0)
    assert (found.slo.tpot_s, found.slo.tpot_percentile) == (0.06, 99.0)
    assert (found.ceilings.gpus, found.ceilings.usd_per_hour) == (8, 24.0)
    assert (found.up["decode"].window_s, found.up["decode"].max_step) == (10.0, 2)
    assert found.signals == {"decode": {"KVUtilization": 0.7}}
    assert found.idle_after_s == 300.0


def test_an_awake_policy_keeps_a_worker_and_external_tiers_have_no_pool():
    external = {"name": "api", "external": {"url": "https://x.test/v1", "model": "m"}}
    tiers = [{"name": "small", "modelRef": {"name": "s"}}, external]
    found = loop_settings(router(tiers=tiers), MODELS, None)
    assert [(pool.key, pool.minimum) for pool in found.pools] == [(("small", "unified"), 1)]
    assert found.idle_after_s is None


def schedules(*entries) -> AutoscalingPolicySpec:
    return AutoscalingPolicySpec.model_validate(
        {"schedules": [{"duration": "90m", "minReplicas": 4, **entry} for entry in entries]}
    )


@pytest.mark.parametrize(
    ("cron", "zone", "when", "holds"),
    [
        ("0 8 * * 1-5", "UTC", "2026-11-20T08:00", True),  # a Friday
        ("0 8 * * 1-5", "UTC", "2026-11-20T09:29", True),
        ("0 8 * * 1-5", "UTC", "2026-11-20T09:30", False),
        ("0 8 * * MON-FRI", "UTC", "2026-11-20T08:30", True),
        ("0 8 * * 1-5", "UTC", "2026-11-21T08:30", False),
        ("0 8 * * *", "Europe/Berlin", "2026-11-20T07:30", True),
        ("0 8 * * *", "Europe/Berlin", "2026-07-20T06:30", True),  # summer time
        ("30 2 * * *", "Europe/Berlin", "2026-03-29T01:10", True),  # 2:30 does not exist: at 3:00
        ("*/30 * 20 11 *", "UTC", "2026-11-20T23:59", True),
        ("0 8 1 * 5", "UTC", "2026-11-20T08:00", True),  # either day will do, as cron has it
        ("0 0 29 2 *", "UTC", "2026-11-20T08:00", False),
    ],
)
def test_a_schedule_holds_for_its_duration(cron, zone, when, holds):
    policy = schedules({"name": "day", "cron": cron, "timeZone": zone})

    found = scheduled_floor(policy, datetime.fromisoformat(when).replace(tzinfo=UTC))

    assert found == (ScheduledFloor(4, "day") if holds else ScheduledFloor())


def test_the_schedule_that_asks_for_most_counts_however_long_ago_it_began():
    month = {"cron": "0 0 1 * *", "duration": "744h"}
    policy = schedules(*({"name": f"s{i}", **month, "minReplicas": i} for i in range(16)))

    found = scheduled_floor(policy, datetime(2026, 11, 29, 12, 0, tzinfo=UTC))

    assert found == ScheduledFloor(15, "s15")


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("cron", "99 99 99 99 99", "bad minute; give minute \\(0-59\\)"),
        ("cron", "0 8 * * *  *", "has 6 fields; give minute"),
        ("cron", "0 8 31 2 *", "bad day-of-month"),
        ("cron", "a * * * * ", "bad minute"),
        ("cron", "*/0 * * * *", "bad minute"),
        ("timeZone", "Mars/Olympus", "'Mars/Olympus' is not a time zone; use an IANA name"),
        ("timeZone", "../etc/passwd", "is not a time zone"),
    ],
)
def test_a_schedule_that_cannot_be_read_is_refused(field, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        schedules({"name": "x", "cron": "0 8 * * *", field: value})


# Observations.


def test_rates_come_from_totals_and_survive_pods_that_come_and_go():
    meter = TrafficMeter()
    assert meter.read(0.0, {"a": state(100)}) is None

    both = meter.read(10.0, {"a": state(150), "b": state(1000)})
    restarted = meter.read(20.0, {"a": state(10), "b": state(1020)})

    assert both is not None
    assert restarted is not None
    assert both.load.requests_per_s == pytest.approx(5.0)
    assert both.load.prompt_tokens == pytest.approx(1000.0)
    assert both.load.output_tokens == pytest.approx(200.0)
    assert restarted.load.requests_per_s == pytest.approx(2.0)


def test_arrivals_count_whether_or_not_they_are_served():
    """Thirty a second are asked and five served: the loop sizes for thirty."""
    meter = TrafficMeter()
    meter.read(0.0, {"a": state(100, arrived=100)})

    traffic = meter.read(10.0, {"a": state(150, arrived=400, inflight=40)})

    assert traffic is not None
    assert traffic.load.requests_per_s == pytest.approx(30.0)
    assert traffic.load.prompt_tokens == pytest.approx(1000.0)
    assert traffic.held == {"small": 20.0, "large": 20.0}


def test_a_profile_is_put_together_from_prefill_and_decode_workers():
    profile = performance_profile([worker("prefill"), worker("decode")])
    assert profile is not None
    assert profile.prefill == (0.02, 1e-4, 0.0)
    assert profile.kv_tokens == 5000 * 64
    assert performance_profile([worker("prefill")]) is None


def test_signals_are_means_per_worker():
    assert pool_signals([worker("decode"), worker("decode")]) == {
        "RunningRequests": 3.0,
        "PendingPrefillTokens": 0.0,
        "KVUtilization": 0.2,
    }


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                [
                    "tiers",
                    "curve",
                    "shares",
                    "threshold",
                    "quality_ratio",
                    "set_points",
                    "profile",
                    "prefill",
                    "decode",
                    "kv_blocks",
                    "total",
                    "role",
                    "num_requests",
                    "num_inflight",
                ]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.lists(json_values, max_size=4))
@example([{"set_points": {"gain_threshold": 10**400}}])
def test_odd_reports_read_as_not_measured(bodies):
    meter = TrafficMeter()
    for now, body in enumerate(bodies):
        load = meter.read(float(now), {"pod": body})
        assert load is None or load.load.usable
    routing_curve(bodies)
    current_threshold(bodies)
    performance_profile(bodies)
    pool_signals(bodies)


# The whole step.


def run(
    managed: ManagedScaling, rates, *, policy=None, workers=None, start=1_800_000_000.0, **spec
):
    total, workers, plans = 0.0, dict(workers or WORKERS), []
    for number, rate in enumerate(rates):
        total += rate * 10.0
        plan = managed.step(
            start + 10.0 * number,
            "default/chat",
            router(**spec),
            MODELS,
            policy,
            workers,
            {"pod-1": json.loads(json.dumps(state(total, threshold=0.2)))},
            LOADS if any(workers.values()) else [],
        )
        workers = dict(plan.workers)
        plans.append(plan)
    return plans


def test_load_scales_pools_up_and_sets_the_threshold_of_the_floor():
    managed = ManagedScaling()
    plans = run(managed, [0.0] + [60.0] * 30)

    last = plans[-1]
    assert last.threshold == pytest.approx(AT_THE_FLOOR)
    assert last.workers["large", "prefill"] > 1
    assert last.slo_met
    decisions = managed.status_decisions("default/chat")
    assert 1 <= len(decisions) <= 10
    assert {"time", "pool", "before", "after", "reason"} == set(decisions[0])
    Router.model_validate(
        {**router().model_dump(by_alias=True), "status": {"decisions": decisions}}
    )


def test_the_first_step_holds_because_nothing_is_measured_yet():
    plan = run(ManagedScaling(), [5.0])[0]
    assert dict(plan.workers) == WORKERS
    assert "holding" in plan.decisions[0].reason


def test_a_sleeping_router_wakes_for_a_held_request():
    policy = AutoscalingPolicySpec.model_validate({"idle": {"scaleToZero": True, "after": "1m"}})
    managed = ManagedScaling()
    asleep = run(
        managed,
        [0.0, 1.0] + [0.0] * 60,
        policy=policy,
        workers={**WORKERS, ("large", "decode"): 2},
    )[-1]
    zero = {("small", "unified"): 0, ("large", "prefill"): 0, ("large", "decode"): 2}
    assert dict(asleep.workers) == zero

    now = 1_800_000_000.0 + 700.0
    for offset in (0.0, 10.0):
        plan = managed.step(
            now + offset,
            "default/chat",
            router(),
            MODELS,
            policy,
            zero,
            {"pod-1": state(10.0, inflight=1)},
            [],
        )

    assert min(plan.workers.values()) >= 1


def test_changed_settings_take_effect_without_forgetting_the_traffic():
    managed = ManagedScaling()
    run(managed, [0.0] + [60.0] * 10)
    plan = managed.step(
        1_800_000_000.0 + 120.0,
        "default/chat",
        router(budget={"gpus": 9}),
        MODELS,
        None,
        WORKERS,
        {"pod-1": state(60.0 * 100 + 600.0)},
        LOADS,
    )
    assert plan is not None
    gpus = sum(count * (1 if tier == "small" else 2) for (tier, _), count in plan.workers.items())
    assert gpus <= 9
    assert plan.slo_met is not None


def test_changed_settings_forget_no_shares_where_no_prompt_is_scored():
    managed = ManagedScaling()
    for second, total, budget in (
        (0, 0.0, 50),
        (10, 600.0, 50),
        (20, 1200.0, 50),
        (30, 1200.0, 40),
    ):
        seen = {**state(total), "curve": []}
        plan = managed.step(
            1_800_000_000.0 + second,
            "default/chat",
            router(budget={"gpus": budget}),
            MODELS,
            None,
            WORKERS,
            {"pod-1": seen},
            LOADS,
        )

    assert plan is not None
    assert "no routing curve" not in "".join(d.reason for d in plan.decisions)


def test_a_router_without_pools_of_ours_has_no_loop():
    external = {"name": "api", "external": {"url": "https://x.test/v1", "model": "m"}}
    managed = ManagedScaling()
    assert managed.step(0.0, "k", router(tiers=[external]), {}, None, {}, {}, []) is None
    assert managed.status_decisions("k") == []


def test_time_is_shown_in_utc():
    managed = ManagedScaling()
    run(managed, [0.0, 60.0, 60.0])
    shown = managed.status_decisions("default/chat")[0]["time"]
    when = datetime.strptime(shown, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert abs(when - datetime.fromtimestamp(1_800_000_000.0, UTC)) < timedelta(minutes=5)


def test_a_tier_nobody_measured_yet_keeps_its_pools_while_the_threshold_moves():
    """All traffic is at the small tier because of the threshold: that must not hold the loop."""
    managed, total = ManagedScaling(), 0.0
    for number in range(20):
        total += 400.0
        plan = managed.step(
            1_800_000_000.0 + 10.0 * number,
            "k",
            router(),
            MODELS,
            None,
            WORKERS,
            {"pod-1": state(total, threshold=0.3)},
            LOADS[:1],
        )
    assert plan is not None
    assert plan.threshold == pytest.approx(AT_THE_FLOOR)
    assert plan.workers["large", "prefill"] == WORKERS["large", "prefill"]
    assert plan.workers["small", "unified"] > 1
    assert plan.slo_met is None


def test_a_held_request_is_one_arrival_however_long_it_waits():
    meter = TrafficMeter()
    rates = []
    for second, (arrived, held) in enumerate([(0, 0), (0, 0), (10, 10), (10, 10), (12, 12)]):
        traffic = meter.read(float(second), {"pod": state(0, inflight=held, arrived=arrived)})
        rates.append(traffic.load.requests_per_s if traffic is not None else None)

    assert rates == [None, 0.0, 10.0, 0.0, 2.0]


def test_loop_and_routers_begin_at_the_same_threshold():
    """The packages share no code; a loop that began elsewhere would move every router at once."""
    assert settings.DEFAULT_THRESHOLDS == set_points.DEFAULT_THRESHOLDS
