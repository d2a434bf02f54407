"""The control loop against the in-memory cluster: what it asks, what it writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from tandem_operator.autoscale.seasons import HourlyRates
from tandem_operator.local.store import Store
from tandem_operator.plan import Settings
from tandem_operator.plan.model_status import pool_status
from tandem_operator.plan.objects import MANAGED, MODEL_LABEL, ROLE_LABEL, SCALED_ANNOTATION
from tandem_operator.reconcile.actuator import KEEP_RATES_S, PERIOD_S, WAKE_PERIOD_S, ScalingDriver
from tandem_operator.reconcile.events import news_in
from tandem_operator.resources import Model, Router
from tandem_operator.resources.base import Object

SETTINGS = Settings()
CURVE = [
    {"threshold": -0.1, "shares": {"small": 0.0, "large": 1.0}, "quality_ratio": 1.0},
    {"threshold": 0.1, "shares": {"small": 0.6, "large": 0.4}, "quality_ratio": 0.97},
    {"threshold": 0.3, "shares": {"small": 1.0, "large": 0.0}, "quality_ratio": 0.8},
]
AT_THE_FLOOR = 0.1 + 0.2 * (0.97 - 0.95) / (0.97 - 0.8)  # of 0.95, between two points


def pod(name: str, ip: str, labels: Mapping[str, str]) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": dict(labels)},
        "spec": {"containers": []},
        "status": {"podIP": ip, "conditions": [{"type": "Ready", "status": "True"}]},
    }


def pool(name: str, model: str, role: str) -> Object:
    return {
        "apiVersion": "tandem.dev/v1alpha1",
        "kind": "WorkerPool",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"modelRef": {"name": model}, "role": role, "replicas": 1},
    }


class ManagedCopies:
    """A store as the operator's copies show it: ConfigMaps only with the labels it lists by."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        found = await self._store.get(kind, namespace, name)
        if kind != "ConfigMap" or found is None:
            return found
        labels = found["metadata"].get("labels") or {}
        return found if MANAGED.items() <= labels.items() else None


class World:
    """A store, pods that answer, and a clock."""

    def __init__(self, **spec: Any) -> None:
        self.store = Store()
        self.now = 1_800_000_000.0
        self.requests = 0.0
        self.arrived = {"small": 0.0, "large": 0.0}
        self.threshold = 0.25
        self.limit: float | None = None  # of the routers' quality floor
        self.asked: float | None = None
        self.puts: list[Object] = []
        self.silent = False
        self.refuses = False
        self.held = {"small": 0, "large": 0}
        self.wanted = ("small", "large")
        self.curve: list[Object] = CURVE
        self.router = Router.model_validate(
            {
                "metadata": {"name": "chat", "namespace": "default"},
                "spec": {
                    "tiers": [
                        {"name": "small", "modelRef": {"name": "s"}},
                        {"name": "large", "modelRef": {"name": "l"}},
                    ],
                    "slo": {"ttft": {"target": "1s"}, "tpot": {"target": "60ms"}},
                    "scaling": {"mode": "Managed"},
                    "predictor": {"artifact": "configmap://p"},
                    **spec,
                },
            }
        )
        self.models = {
            name: Model.model_validate(
                {
                    "metadata": {"name": name, "namespace": "default"},
                    "spec": {"weights": {"source": "file:///m"}, "unified": {"gpus": 1}},
                }
            )
            for name in ("s", "l")
        }
        self.router_pods = [pod("chat-0", "10.0.0.1", {})]
        for name in ("s", "l"):
            self.store.write(pool(f"{name}-unified", name, "unified"), manager="test")
            self.store.write(pod(f"{name}-0", f"10.0.0.{name}", {MODEL_LABEL: name}), manager="t")
        self.start_operator()

    def start_operator(self) -> None:
        """One that remembers nothing but what the store holds."""
        api = ManagedCopies(self.store)
        self.driver = ScalingDriver(api, SETTINGS, lambda: self.now, self.ask)

    async def ask(self, host, port, path, body=None, token="", timeout_s=2.0, method=None):
        if self.silent:
            raise TimeoutError
        if path == "/admin/state":
            tiers = [
                {
                    "name": "small",
                    "num_requests": self.requests,
                    "prompt_tokens": 1000 * self.requests,
                    "output_tokens": 200 * self.requests,
                }
            ]
            points = {"gain_threshold": self.threshold}
            arrivals = {
                name: {
                    "num_arrived": self.arrived[name] + self.held[name],
                    "prompt_tokens": 1000 * (self.arrived[name] + self.held[name]),
                    "num_held": self.held[name],
                }
                for name in ("small", "large")
            }
            return 200, {
                "tiers": tiers,
                "curve": self.curve,
                "set_points": points,
                "threshold": {
                    "asked": self.asked,
                    "limit": self.limit,
                    "in_force": self.threshold,
                },
                "arrivals": {"num_refused": 0, "tiers": arrivals},
            }
        if path == "/admin/set-points":
            assert method == "PUT"
            self.puts.append(body)
            if self.refuses:
                return 401, {"error": {"message": "set-points need x-tandem-peer-token"}}
            self.asked = self.threshold = body["gain_threshold"]
            if self.limit is not None:
                self.threshold = min(self.threshold, self.limit)
            return 200, {}
        assert path == "/v1/load"
        profile = {"prefill": [0.02, 1e-4, 0.0], "decode": [0.02, 5e-8, 5e-5]}
        blocks = {"total": 5000, "used": 0}
        return 200, {"role": "unified", "profile": profile, "kv_blocks": blocks, "block_size": 64}

    async def run(self, rate: float, steps: int) -> list[dict[str, str]]:
        decisions: list[dict[str, str]] = []
        for _ in range(steps):
            self.now += PERIOD_S
            self.requests += rate * PERIOD_S
            for name in self.wanted:
                self.arrived[name] += rate * PERIOD_S / len(self.wanted)
            decisions = await self.driver.step(self.router, self.models, self.router_pods)
        return decisions

    def replicas(self, name: str) -> int:
        found = self.store.read("WorkerPool", "default", name)
        assert found is not None
        return found["spec"]["replicas"]


def sleepy(**spec: Any) -> World:
    """A world whose pools may sleep after a minute without a request."""
    world = World(scaling={"mode": "Managed", "policyRef": {"name": "p"}}, **spec)
    world.store.write(
        {
            "apiVersion": "tandem.dev/v1alpha1",
            "kind": "AutoscalingPolicy",
            "metadata": {"name": "p", "namespace": "default"},
            "spec": {"idle": {"scaleToZero": True, "after": "1m"}},
        },
        manager="test",
    )
    return world


async def test_load_moves_replicas_and_threshold_and_says_why():
    world = World()

    decisions = await world.run(40.0, 40)

    assert world.replicas("l-unified") > 1
    assert world.replicas("s-unified") > 1
    assert world.puts == [{"gain_threshold": pytest.approx(AT_THE_FLOOR)}]
    assert {"threshold", "large/unified", "small/unified"} <= {d["pool"] for d in decisions}
    assert all(d["reason"] for d in decisions)


async def test_the_loop_asks_for_no_more_than_the_routers_floor_lets_through():
    free, held = World(budget={"gpus": 4}), World(budget={"gpus": 4})
    held.threshold = held.limit = 0.05

    await free.run(200.0, 60)
    decisions = await held.run(200.0, 60)

    assert free.threshold > 0.05
    assert held.threshold == 0.05
    assert held.puts == []
    assert "threshold" not in {decision["pool"] for decision in decisions}


async def test_a_limit_that_falls_under_what_was_asked_is_not_fought():
    world = World()
    await world.run(40.0, 40)
    assert world.puts == [{"gain_threshold": pytest.approx(AT_THE_FLOOR)}]

    world.threshold = world.limit = 0.04
    await world.run(40.0, 40)

    assert len(world.puts) == 1


async def test_a_pool_says_why_the_loop_scaled_it():
    world = World()

    decisions = await world.run(40.0, 40)
    pool = world.store.read("WorkerPool", "default", "l-unified")
    last = [d for d in decisions if d["pool"] == "large/unified"][-1]
    step = f"{last['before']}>{last['after']}"
    assert pool["metadata"]["annotations"][SCALED_ANNOTATION] == f"{step} {last['reason']}"

    before = {"status": {"lastScale": {"after": int(last["before"])}}}
    said = pool_status({**pool, **before}, [], "", "now")["lastScale"]
    assert said["reason"] == last["reason"]


async def test_a_count_set_by_somebody_else_is_not_the_loops():
    world = World()
    await world.run(40.0, 40)
    world.store.change("WorkerPool", "default", "l-unified", {"spec": {"replicas": 9}})
    pool = world.store.read("WorkerPool", "default", "l-unified")

    before = {"status": {"lastScale": {"after": 1}}}
    said = pool_status({**pool, **before}, [], "", "now")["lastScale"]

    assert said["reason"] == "set through /scale"


async def test_a_settled_cluster_is_left_alone():
    world = World()
    await world.run(20.0, 150)
    puts = len(world.puts)
    version = json.dumps([world.store.read("WorkerPool", "default", n) for n in POOLS])

    await world.run(20.0, 20)

    assert len(world.puts) == puts
    assert json.dumps([world.store.read("WorkerPool", "default", n) for n in POOLS]) == version


POOLS = ("s-unified", "l-unified")


async def test_silence_holds_everything():
    world = World()
    await world.run(40.0, 20)
    before = [world.replicas(name) for name in POOLS]
    world.silent = True

    decisions = await world.run(40.0, 20)

    assert [world.replicas(name) for name in POOLS] == before
    assert "holding" in decisions[-1]["reason"]


async def test_a_budget_of_gpus_is_kept():
    world = World(budget={"gpus": 4})
    await world.run(200.0, 60)
    assert sum(world.replicas(name) for name in POOLS) <= 4


async def test_a_router_pod_that_refuses_its_threshold_is_told(caplog):
    world = World()
    world.refuses = True

    await world.run(40.0, 40)

    assert world.puts
    assert "router pod chat-0 refused its threshold: 401" in caplog.text
    assert "set-points need x-tandem-peer-token" in caplog.text


async def test_a_new_router_does_not_inherit_what_one_of_its_name_did():
    world = World()
    assert await world.run(40.0, 40)

    world.driver.forget("default", "chat")

    assert {d["pool"] for d in await world.run(40.0, 1)} == {"all"}


async def test_mode_external_leaves_replicas_to_their_owner():
    world = World(scaling={"mode": "External"})
    assert await world.run(200.0, 20) == []
    assert [world.replicas(name) for name in POOLS] == [1, 1]
    assert world.puts == []


async def test_a_clock_that_is_set_back_stops_nothing():
    world = World()
    await world.run(40.0, 40)
    before = world.replicas("l-unified")

    world.now -= 86_400.0
    await world.run(400.0, 3)

    assert world.replicas("l-unified") > before


async def test_steps_closer_than_the_period_do_nothing():
    world = World()
    await world.run(40.0, 30)
    before = [world.replicas(name) for name in POOLS]
    world.requests += 1e6
    world.now += PERIOD_S / 10

    await world.driver.step(world.router, world.models, world.router_pods)

    assert [world.replicas(name) for name in POOLS] == before


@pytest.mark.parametrize("curve", [CURVE, []], ids=["known curve", "no curve yet"])
async def test_pools_that_nobody_asks_sleep_after_the_time_given(curve):
    """A minute after the last request, not a scale-down window later, whatever else is known."""
    world = sleepy()
    world.curve = curve
    await world.run(1.0, 4)
    awake = [world.replicas(name) for name in POOLS]

    await world.run(0.0, 11)
    nearly = [world.replicas(name) for name in POOLS]
    decisions = await world.run(0.0, 2)

    assert min(awake) >= 1
    assert min(nearly) >= 1
    assert [world.replicas(name) for name in POOLS] == [0, 0]
    assert decisions[-1]["reason"] == "nobody asks: sleeping"


async def test_a_policy_that_breaks_a_rule_is_not_followed_as_the_routers_status_says():
    """An older apiserver may hold one; the status tells that built-in values hold."""
    world = sleepy()
    twice = {"signals": [{"name": "KVUtilization", "target": "0.5"}] * 2}

    class Stored(ManagedCopies):
        async def get(self, kind: str, namespace: str, name: str) -> Object | None:
            found = await super().get(kind, namespace, name)
            if found is None or kind != "AutoscalingPolicy":
                return found
            return {**found, "spec": {**found["spec"], "decode": twice}}

    world.driver = ScalingDriver(Stored(world.store), SETTINGS, lambda: world.now, world.ask)
    await world.run(1.0, 4)
    await world.run(0.0, 40)

    assert min(world.replicas(name) for name in POOLS) >= 1


async def test_a_query_of_the_policy_sets_the_count_and_the_decision_names_why():
    world = World(scaling={"mode": "Managed", "policyRef": {"name": "p"}})
    signal = {"name": "Prometheus", "target": "10"}
    world.store.write(
        {
            "apiVersion": "tandem.dev/v1alpha1",
            "kind": "AutoscalingPolicy",
            "metadata": {"name": "p", "namespace": "default"},
            "spec": {
                "query": 'jobs{tier="$tier"}',
                "unified": {"signals": [signal], "up": {"window": "0s"}},
            },
        },
        manager="test",
    )
    numbers = {'jobs{tier="small"}': 20.0, 'jobs{tier="large"}': 39.0}

    async def query(server: str, text: str) -> float:
        assert server == "http://prometheus:9090"
        return numbers[text]

    world.driver = ScalingDriver(
        ManagedCopies(world.store),
        Settings(prometheus_url="http://prometheus:9090"),
        lambda: world.now,
        world.ask,
        query,
    )
    decisions = await world.run(1.0, 8)

    assert [world.replicas(name) for name in ("s-unified", "l-unified")] == [2, 4]
    assert {"small/unified", "large/unified"} <= {d["pool"] for d in decisions}


@pytest.mark.parametrize("curve", [CURVE, []], ids=["known curve", "no curve yet"])
async def test_a_held_request_wakes_sleeping_pools_within_a_second(curve):
    world = sleepy()
    world.curve = curve
    await world.run(1.0, 4)
    await world.run(0.0, 14)
    asleep = [world.replicas(name) for name in POOLS]

    world.held = {"small": 1, "large": 1}
    world.now += WAKE_PERIOD_S
    decisions = await world.driver.step(world.router, world.models, world.router_pods)

    woken = {d["pool"] for d in decisions if (d["before"], d["after"]) == ("0", "1")}
    assert asleep == [0, 0]
    assert woken == {"small/unified", "large/unified"}
    assert [world.replicas(name) for name in POOLS] == [1, 1]


async def test_an_operator_that_starts_lets_sleeping_pools_sleep():
    world = sleepy()
    for name in POOLS:
        world.store.change("WorkerPool", "default", name, {"spec": {"replicas": 0}})

    await world.run(0.0, 20)
    slept = [world.replicas(name) for name in POOLS]
    world.held = {"small": 1, "large": 1}
    await world.run(0.0, 1)

    assert slept == [0, 0]
    assert [world.replicas(name) for name in POOLS] == [1, 1]


async def test_a_wake_up_for_one_tier_starts_that_tier_only():
    world = sleepy()
    await world.run(1.0, 4)
    await world.run(0.0, 14)

    world.held["small"] = 1
    await world.run(0.0, 1)

    assert [world.replicas(name) for name in POOLS] == [1, 0]


async def test_traffic_to_one_tier_lets_the_other_sleep():
    world = sleepy()
    await world.run(1.0, 4)
    world.wanted = ("small",)

    await world.run(1.0, 16)

    assert [world.replicas(name) for name in POOLS] == [1, 0]


def owned_world() -> World:
    world = World()
    world.router = world.router.model_copy(
        update={"metadata": world.router.metadata.model_copy(update={"uid": "router-uid"})}
    )
    world.start_operator()
    return world


async def learn_hours(world: World, hours: int) -> None:
    world.requests = 0.0
    for _ in range(hours * 4):
        world.now += 900.0 - PERIOD_S
        await world.run(20.0, 1)


async def test_an_operator_that_restarts_still_knows_the_week() -> None:
    world = owned_world()
    await learn_hours(world, 3)
    kept = world.store.read("ConfigMap", "default", "chat-hourly-rates")
    assert kept is not None
    learnt = HourlyRates.parse(kept["data"]["hourly"])

    world.start_operator()
    await world.run(20.0, 1)
    world.now += KEEP_RATES_S
    await world.run(20.0, 1)

    again = world.store.read("ConfigMap", "default", "chat-hourly-rates")
    assert again is not None
    assert learnt.of(world.now - 2 * 3600.0) is not None
    after = HourlyRates.parse(again["data"]["hourly"])
    assert after.of(world.now - 2 * 3600.0) == learnt.of(world.now - 2 * 3600.0)


async def test_a_config_map_of_somebody_else_is_neither_read_nor_written(caplog) -> None:
    world = owned_world()
    theirs = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "chat-hourly-rates", "namespace": "default"},
        "data": {"mine": "1"},
    }
    before = world.store.write(theirs, manager="user")

    await learn_hours(world, 2)

    assert world.store.read("ConfigMap", "default", "chat-hourly-rates") == before
    assert "chat-hourly-rates" in caplog.text
    assert "rename" in caplog.text


async def test_pods_that_no_node_takes_are_given_up_and_the_pool_says_why() -> None:
    world = World()
    why = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    reasons: set[str] = set()
    for _ in range(24):  # two minutes
        for number in range(1, world.replicas("l-unified")):
            waiting = pod(f"l-{number}", "", {MODEL_LABEL: "l", ROLE_LABEL: "unified"})
            unplaced = {"type": "PodScheduled", "status": "False", "message": why}
            waiting["status"] = {"conditions": [unplaced]}
            world.store.write(waiting, manager="t")
        reasons |= {d["reason"] for d in await world.run(200.0, 1)}

    assert world.replicas("l-unified") == 1
    assert any("withdrawn" in reason and why.rstrip(".") in reason for reason in reasons)


async def test_a_loop_that_advises_says_what_it_would_do_once_and_writes_nothing():
    world = World(scaling={"mode": "Advise"})

    decisions = await world.run(40.0, 40)

    assert world.replicas("l-unified") == world.replicas("s-unified") == 1
    assert world.puts == []
    assert world.store.read("ConfigMap", "default", "chat-hourly-rates") is None
    advice = [d for d in decisions if d["pool"] == "large/unified"]
    assert advice
    assert all(d["reason"].startswith("advised, not done: more load: ") for d in advice)
    assert len({(d["before"], d["after"]) for d in advice}) == len(advice)


async def test_advice_that_a_person_follows_is_followed_by_the_next():
    world = World(scaling={"mode": "Advise"})
    await world.run(40.0, 40)

    for name in ("l-unified", "s-unified"):
        found = world.store.read("WorkerPool", "default", name)
        assert found is not None
        found["spec"]["replicas"] = 40
        world.store.write(found, manager="a person")
    decisions = await world.run(1.0, 200)

    assert decisions[-1]["before"] == "40"
    assert "less load" in decisions[-1]["reason"]


def test_advice_is_an_event_on_the_router_once():
    decision = {
        "time": "2026-11-30T09:00:00Z",
        "pool": "large/decode",
        "before": "2",
        "after": "4",
        "reason": "advised, not done: more load",
    }
    router = {"kind": "Router", "spec": {"scaling": {"mode": "Advise"}}, "status": {}}

    first = news_in(router, {"decisions": [decision]})
    again = news_in({**router, "status": {"decisions": [decision]}}, {"decisions": [decision]})
    router["spec"] = {"scaling": {"mode": "Managed"}}
    managed = news_in(router, {"decisions": [decision]})

    assert [news.reason for news in first] == ["ScalingAdvised"]
    assert "large/decode 2 to 4" in first[0].message
    assert again == managed == []
