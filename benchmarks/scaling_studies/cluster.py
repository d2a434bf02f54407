"""The cluster that is scaled: two tiers, as custom resources and as profiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tandem_operator.resources import AutoscalingPolicy, Model, Router
from tandem_operator.simulate.cluster import PoolPlan, Role
from tandem_operator.simulate.plan_file import Resources, simulation_plan
from tandem_operator.simulate.profiles import Profile
from tandem_operator.simulate.simulation import Scale, SimulationPlan

Key = tuple[str, Role]
SMALL: Key = ("small", "unified")
PREFILL: Key = ("large", "prefill")
DECODE: Key = ("large", "decode")
POOLS = (SMALL, PREFILL, DECODE)

# An 8B model on one inference GPU and a 70B model on four training GPUs, so that peaks need some
# ten workers a pool: with one or two, every controller is right by rounding.
PROFILES = {
    "small": Profile((0.02, 1.2e-4, 2e-10), (0.02, 1.5e-7, 2e-4), 120_000, name="small"),
    "large": Profile((0.03, 1.5e-4, 1e-9), (0.025, 1.2e-7, 2.5e-4), 300_000, name="large"),
    # Of the ramp: some seven unified workers for 10 requests/s.
    "one": Profile((0.03, 1.6e-4, 2e-10), (0.025, 2e-7, 2.6e-4), 150_000, name="one"),
}
GPUS = {"small": 1, "large": 4, "one": 1}
USD_PER_HOUR = {"small": 1.0, "large": 8.0, "one": 2.0}
TTFT_S, TPOT_S, PERCENTILE = 2.0, 0.06, 99
FLOOR = 0.95
STARTUP_S = 90.0


def resources(
    *,
    usd_per_hour: float | None = None,
    tiers: tuple[str, ...] = ("small", "large"),
    bounds: Mapping[Role, tuple[int, int]] | None = None,
    roles: Mapping[str, tuple[Role, ...]] | None = None,
) -> Resources:
    """The custom resources as a user would write them; a Router in mode Managed."""
    roles = roles or {"small": ("unified",), "large": ("prefill", "decode")}
    low_high = bounds or {}
    models = {}
    for tier in tiers:
        spec: dict[str, Any] = {
            "weights": {"source": "hf://a/b"},
            "engine": {"maxNumSeqs": 128, "maxBatchedTokens": 2048},
        }
        for role in roles[tier]:
            low, high = low_high.get(role, (1, 64))
            spec[role] = {
                "replicas": low,
                "minReplicas": low,
                "maxReplicas": high,
                "usdPerHour": str(USD_PER_HOUR[tier]),
                "gpus": GPUS[tier],
            }
        models[tier] = Model.model_validate({"metadata": _named(tier), "spec": spec})
    router: dict[str, Any] = {
        "tiers": [{"name": t, "modelRef": {"name": t}} for t in tiers],
        "fallbackTier": tiers[-1],
        "slo": {
            "ttft": {"percentile": PERCENTILE, "target": f"{1000 * TTFT_S:.0f}ms"},
            "tpot": {"percentile": PERCENTILE, "target": f"{1000 * TPOT_S:.0f}ms"},
        },
        "scaling": {"mode": "Managed"},
    }
    if len(tiers) > 1:
        router["predictor"] = {"type": "Learned", "artifact": "configmap://difficulty"}
        router["objective"] = {"qualityFloor": str(FLOOR)}
    if usd_per_hour is not None:
        router["budget"] = {"usdPerHour": f"{usd_per_hour:.2f}"}
    policy: AutoscalingPolicy | None = None
    return Resources(
        Router.model_validate({"metadata": _named("chat"), "spec": router}), models, policy
    )


def _named(name: str) -> dict[str, str]:
    return {"name": name, "namespace": "bench"}


def plan(
    found: Resources,
    replicas: Mapping[Key, int],
    *,
    startup_s: float = STARTUP_S,
    interval_s: float = 10.0,
    scale: Scale | None = None,
) -> SimulationPlan:
    """What the simulator replays of them, with so many workers at the start."""
    tiers = {tier.name for tier in found.router.spec.tiers}
    profiles = {tier: PROFILES[tier] for tier in tiers}
    made = simulation_plan(found, profiles, startup_s=startup_s, scaling=False)
    pools: dict[Key, PoolPlan] = {}
    for key, pool in made.pools.items():
        settings = replace(pool.settings, prefix_cache=False)
        pools[key] = replace(pool, settings=settings, replicas=replicas[key])
    return replace(made, pools=pools, interval_s=interval_s, scale=scale)
