"""Autoscaling core: pure decisions from observed load to replicas and threshold.

    autoscaler = Autoscaler(LoopSettings(pools, slo, ceilings, quality_floor=0.95))
    plan = autoscaler.step(now, Observation(load, workers, curve, profiles, threshold))
    # then write plan.workers to WorkerPools (/scale), plan.threshold to routers,
    # plan.decisions to the Router's status

`curve` is a list of operating points (threshold, shares, quality ratio) from the predictor's own
evaluation re-weighted to recent traffic; `profiles` come from `GET /v1/load` of ready workers.
"""

from tandem_operator.autoscale.forecast import RateForecast
from tandem_operator.autoscale.loop import (
    Autoscaler,
    LoopSettings,
    Observation,
    Plan,
    ScalingDecision,
    Speed,
)
from tandem_operator.autoscale.profile import Load, PerformanceProfile, Slo
from tandem_operator.autoscale.sizing import (
    Ceilings,
    Operating,
    PoolSpec,
    Role,
    Sizes,
    size,
    workers_for_slo,
)

__all__ = [
    "Autoscaler",
    "Ceilings",
    "Load",
    "LoopSettings",
    "Observation",
    "Operating",
    "PerformanceProfile",
    "Plan",
    "PoolSpec",
    "RateForecast",
    "Role",
    "ScalingDecision",
    "Sizes",
    "Slo",
    "Speed",
    "size",
    "workers_for_slo",
]
