"""What serves a tier's requests: one adapter per engine, and nothing about engines elsewhere.

`engine_of` is the only place that knows their names; `protocol` says what an adapter must offer,
and `docs/contract.md` what is lost where an engine does not offer it.
"""

from __future__ import annotations

from tandem_router.engines.openai import OpenAIEngine
from tandem_router.engines.protocol import Ask, Engine, LoadReader, Resumption, Told, Wire
from tandem_router.engines.tandem import TandemEngine
from tandem_router.engines.vllm import VLLMEngine

_ENGINES: dict[str, Engine] = {
    "Tandem": TandemEngine(),
    "VLLM": VLLMEngine(),
    "OpenAI": OpenAIEngine(),
}


def engine_of(name: str) -> Engine:
    """The adapter of an engine type, as the configuration names it."""
    return _ENGINES[name]


__all__ = ["Ask", "Engine", "LoadReader", "Resumption", "Told", "Wire", "engine_of"]
