"""Any OpenAI-compatible server: its flags are the Model's, who finds the rest in variables.

`engine.args` may name $(TANDEM_WEIGHTS), $(TANDEM_PORT) and $(TANDEM_SERVED_MODEL); a server that
is not started by flags gets its command through the role's podPatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem_operator.plan.engines.protocol import flags
from tandem_operator.plan.objects import SCRATCH_DIR, Settings
from tandem_operator.resources import Model, RoleSpec
from tandem_operator.resources.base import Object


class OpenAIPod:
    # The one path that every such server has.
    ready_path = "/v1/models"
    health_path = "/v1/models"
    reads_config = False

    def config(self, model: Model, role: str, settings: Settings, revision: str) -> Object | None:
        return None

    def container(
        self, model: Model, role: str, spec: RoleSpec, weights: str, revision: str, at: Settings
    ) -> Object:
        return {
            "args": flags(model.spec.engine.args),
            "env": [
                {"name": "TANDEM_WEIGHTS", "value": weights},
                {"name": "TANDEM_PORT", "value": str(at.worker_port)},
                {"name": "TANDEM_SERVED_MODEL", "value": model.served_name},
                {"name": "HOME", "value": SCRATCH_DIR},
                {"name": "HF_HUB_OFFLINE", "value": "1"},
            ],
        }

    def router_fields(self, model: Model) -> Mapping[str, Any]:
        return {"engine": "OpenAI"}
