"""Our own worker: a configuration file, the weights and the peer token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem_operator.plan.objects import CONFIG_DIR, PEER_DIR, SCRATCH_DIR, Settings, log_variables
from tandem_operator.plan.worker_config import worker_config
from tandem_operator.resources import Model, RoleSpec
from tandem_operator.resources.base import Object


class TandemPod:
    ready_path = "/ready"
    health_path = "/health"
    reads_config = True

    def config(self, model: Model, role: str, settings: Settings, revision: str) -> Object | None:
        config = worker_config(model, role, settings, revision)
        return config.model_dump(mode="json", exclude_unset=True)

    def container(
        self, model: Model, role: str, spec: RoleSpec, weights: str, revision: str, at: Settings
    ) -> Object:
        config, token = f"{CONFIG_DIR}/config.json", f"{PEER_DIR}/token"
        return {
            "args": ["--config", config, "--weights", weights, "--peer-token-file", token],
            "env": [
                {"name": "TANDEM_REVISION", "value": revision},
                {"name": "TRITON_CACHE_DIR", "value": f"{SCRATCH_DIR}/triton"},
                *log_variables(at),
            ],
        }

    def router_fields(self, model: Model) -> Mapping[str, Any]:
        return {}
