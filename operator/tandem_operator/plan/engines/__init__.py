"""What runs in a worker pod: one module per engine, and nothing about engines elsewhere.

`engine_of` is the only place of the operator that knows their names.
"""

from __future__ import annotations

from tandem_operator.plan.engines.openai import OpenAIPod
from tandem_operator.plan.engines.protocol import EnginePod
from tandem_operator.plan.engines.tandem import TandemPod
from tandem_operator.plan.engines.vllm import VLLMPod
from tandem_operator.resources import Model

_ENGINES: dict[str, EnginePod] = {
    "Tandem": TandemPod(),
    "VLLM": VLLMPod(),
    "OpenAI": OpenAIPod(),
}


def engine_of(model: Model) -> EnginePod:
    """The adapter of the Model's engine."""
    return _ENGINES[model.spec.engine.type]


__all__ = ["EnginePod", "engine_of"]
