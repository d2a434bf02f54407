"""From the YAML that `tandem up` and kubectl apply to what is simulated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tandem_operator.autoscale.loop import Plan
from tandem_operator.autoscale.profile import Slo
from tandem_operator.autoscale.router_loops import ManagedScaling
from tandem_operator.autoscale.settings import loop_settings
from tandem_operator.plan.objects import Settings
from tandem_operator.plan.router_config import router_config
from tandem_operator.plan.worker_config import worker_config
from tandem_operator.resources import AutoscalingPolicy, Model, Router
from tandem_operator.simulate.cluster import PoolPlan, Role
from tandem_operator.simulate.engine import EngineSettings
from tandem_operator.simulate.front import TierPlan
from tandem_operator.simulate.outcome import Targets
from tandem_operator.simulate.profiles import Profile
from tandem_operator.simulate.simulation import SimulationPlan
from tandem_router.control.floor_limit import MARGIN
from tandem_router.limits.prices import Prices
from tandem_router.predictor import Predictor
from tandem_router.routing.predictor_source import training_gains

ROLES: tuple[Role, ...] = ("prefill", "decode", "unified")
EXTERNAL_TTFT_S = 0.5
EXTERNAL_TPOT_S = 0.02
DEFAULT_THRESHOLD = 0.1


class PlanError(ValueError):
    """A plan cannot be simulated; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Resources:
    """The custom resources of a plan."""

    router: Router
    models: Mapping[str, Model]
    policy: AutoscalingPolicy | None


def resources_of(
    found: Iterable[Model | Router | AutoscalingPolicy],
) -> Resources:
    """The one Router of some resources, with its Models and its policy.

    Raises PlanError.
    """
    found = list(found)
    routers = [one for one in found if isinstance(one, Router)]
    if len(routers) != 1:
        names = ", ".join(r.metadata.name for r in routers) or "none"
        raise PlanError(f"a plan holds one Router, this one has {len(routers)}: {names}")
    router = routers[0]
    models = {one.metadata.name: one for one in found if isinstance(one, Model)}
    for tier in router.spec.tiers:
        if tier.model_ref is not None and tier.model_ref.name not in models:
            raise PlanError(
                f"tier {tier.name} uses the Model {tier.model_ref.name!r}, which the files lack; "
                f"name the file that holds it"
            )
    ref = router.spec.scaling.policy_ref
    policies = {one.metadata.name: one for one in found if isinstance(one, AutoscalingPolicy)}
    if ref is not None and ref.name not in policies:
        raise PlanError(f"the Router's policyRef {ref.name!r} is in none of the files")
    return Resources(router, models, policies[ref.name] if ref is not None else None)


def simulation_plan(
    resources: Resources,
    profiles: Mapping[str, Profile],
    *,
    seed: int = 0,
    startup_s: float = 60.0,
    scaling: bool = True,
    predictor: Predictor | None = None,
) -> SimulationPlan:
    """What is simulated for these resources.

    Args:
        profiles: By tier name, for each tier with a Model.
        scaling: Whether `mode: Managed` moves replicas and threshold.
        predictor: The router's artifact, whose training data stands for traffic at the start.

    Raises PlanError.
    """
    router, models = resources.router, resources.models
    settings = Settings()
    missing = [t.name for t in router.spec.tiers if t.model_ref and t.name not in profiles]
    if missing:
        raise PlanError(
            f"no profile for tier {missing[0]}; measure it with `tandem profile` and give it as "
            f"--profile {missing[0]}=FILE"
        )
    unknown = sorted(set(profiles) - {t.name for t in router.spec.tiers})
    if unknown:
        names = ", ".join(t.name for t in router.spec.tiers)
        raise PlanError(f"--profile {unknown[0]}: there is no such tier; the Router has {names}")
    config = router_config(router, models, settings)
    pools: dict[tuple[str, Role], PoolPlan] = {}
    tiers: list[TierPlan] = []
    for tier in router.spec.tiers:
        rendered = config.tier(tier.name)
        tiers.append(
            TierPlan(
                tier.name,
                rendered.usd_per_1m_input_tokens,
                rendered.usd_per_1m_output_tokens,
                rendered.max_share,
                EXTERNAL_TTFT_S if tier.external is not None else None,
                EXTERNAL_TPOT_S,
            )
        )
        if tier.model_ref is not None:
            for pool in _pools(tier.name, models[tier.model_ref.name], profiles[tier.name]):
                pools[pool.key] = pool
    plan = SimulationPlan(
        tuple(tiers),
        pools,
        fallback=router.spec.fallback_tier,
        threshold=DEFAULT_THRESHOLD if config.threshold is None else config.threshold,
        quality_floor=None if config.threshold is not None else config.objective.quality_floor,
        targets=Targets(_ms(config.slo.ttft_ms), _ms(config.slo.tpot_ms)),
        picking=config.picking,
        startup_s=startup_s,
        seed=seed,
        margin=MARGIN if config.learning.shadow_share > 0.0 else 0.0,
    )
    if predictor is not None and len(config.tiers) > 1:
        prices = Prices(config)
        known = training_gains(predictor, prices.dearest, prices.cheapest)
        plan = replace(plan, training=tuple(known))
    if scaling and router.spec.scaling.mode == "Managed":
        plan = replace(plan, scale=_managed(resources))
    return plan


def _ms(value: float | None) -> float | None:
    return None if value is None else value / 1000.0


def _pools(tier: str, model: Model, profile: Profile) -> Iterable[PoolPlan]:
    for role in ROLES:
        spec = getattr(model.spec, role)
        if spec is None:
            continue
        config = worker_config(model, role, Settings())
        yield PoolPlan(
            tier,
            role,
            spec.replicas,
            profile,
            EngineSettings(
                max_num_seqs=config.max_num_seqs,
                max_batched_tokens=config.max_batched_tokens,
                order=config.scheduler,
                kv_tokens=profile.kv_tokens,
                prefix_cache=config.prefix_cache,
                max_waiting=config.max_waiting,
            ),
            usd_per_hour=float(spec.usd_per_hour or 0.0),
            gpus=spec.gpus,
            local_prefill_max_tokens=config.local_prefill_max_tokens,
        )


class _Managed:
    """The operator's own loop, fed with what a simulated cluster reports."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._loops = ManagedScaling()

    def __call__(
        self,
        now: float,
        workers: Mapping[tuple[str, Role], int],
        state: dict[str, Any],
        loads: list[Any],
    ) -> Plan | None:
        router, policy = self._resources.router, self._resources.policy
        return self._loops.step(
            now,
            f"{router.metadata.namespace}/{router.metadata.name}",
            router,
            self._resources.models,
            policy.spec if policy is not None else None,
            workers,
            {"simulated": state},
            loads,
        )


def _managed(resources: Resources) -> _Managed:
    return _Managed(resources)


def loop_slo(resources: Resources) -> Slo:
    """The Router's SLO as the control loop reads it."""
    policy = resources.policy.spec if resources.policy is not None else None
    return loop_settings(resources.router, resources.models, policy).slo


def wanted_floor(resources: Resources) -> float | None:
    """The quality floor that a plan has to hold: the Router's, with its default.

    One that its predictor cannot hold yet is asked of the outcomes all the same.
    """
    spec = resources.router.spec
    given = spec.objective.quality_floor
    return spec.held_floor if given is None else float(given)


def with_floor(resources: Resources, floor: float) -> Resources:
    """The same under another quality floor. Raises PlanError where the Router cannot have it."""
    router = resources.router
    if router.spec.threshold is not None:
        raise PlanError(
            "the Router's threshold decides where the larger tier begins, and a floor beside it "
            "would not be held; remove spec.threshold to ask for another floor"
        )
    if not 0.0 <= floor <= 1.0:
        raise PlanError(f"the floor {floor:g} is no share of the dearest tier's quality; 0 to 1")
    objective = router.spec.objective.model_copy(update={"quality_floor": f"{round(floor, 4):g}"})
    spec = router.spec.model_copy(update={"objective": objective})
    return replace(resources, router=router.model_copy(update={"spec": spec}))


def fixed_plan(
    resources: Resources,
    profiles: Mapping[str, Profile],
    workers: Mapping[tuple[str, Role], int],
    threshold: float,
    max_batched_tokens: int | None = None,
) -> SimulationPlan:
    """The same resources with other pools and another threshold, and nothing that scales.

    A pool that the Model does not have (the other layout) takes the settings of one that it has.
    max_batched_tokens: None leaves them as they are.
    """
    plan = simulation_plan(resources, profiles, scaling=False)
    pools: dict[tuple[str, Role], PoolPlan] = {}
    for (tier, role), count in workers.items():
        usual = next(pool for key, pool in plan.pools.items() if key[0] == tier)
        pool = plan.pools.get((tier, role), usual)
        if max_batched_tokens is not None:
            settings = replace(pool.settings, max_batched_tokens=max_batched_tokens)
            pool = replace(pool, settings=settings)
        pools[tier, role] = replace(pool, role=role, replicas=count, tier=tier)
    return replace(plan, pools=pools, threshold=threshold, quality_floor=None)
