"""What a router can be told, field by field.

The operator renders this class into a ConfigMap and the router parses the same class, so the
two cannot disagree. Of what a pod mounts, files that belong to a tier, a judge or the predictor are
fields, since those change while a router runs; the rest are command-line arguments. Importing this
package costs pydantic and nothing else.
"""

from tandem_router.config.access import TenantConfig
from tandem_router.config.endpoints import (
    EndpointSliceEndpoints,
    FileEndpoints,
    PickingConfig,
    ServiceRef,
)
from tandem_router.config.failover import FailoverConfig, OutlierConfig
from tandem_router.config.learning import JudgeConfig, LearningConfig
from tandem_router.config.limits import LimitsConfig
from tandem_router.config.prediction import CascadeConfig, PredictorConfig
from tandem_router.config.router import RouterConfig, load_config, parse_config, served_by
from tandem_router.config.tiers import TierConfig

__all__ = [
    "CascadeConfig",
    "EndpointSliceEndpoints",
    "FailoverConfig",
    "FileEndpoints",
    "JudgeConfig",
    "LearningConfig",
    "LimitsConfig",
    "OutlierConfig",
    "PickingConfig",
    "PredictorConfig",
    "RouterConfig",
    "ServiceRef",
    "TenantConfig",
    "TierConfig",
    "load_config",
    "parse_config",
    "served_by",
]
