"""Any server inside the cluster that speaks OpenAI's API: SGLang, TGI, llama.cpp, Ollama.

It is asked for its models, and that is all it says of its load: the router knows what it sent
there itself. A stream that broke is not gone on with, and nothing is measured for the autoscaler.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem_router.engines.protocol import Ask, Headers, PlainWire, Told
from tandem_router.engines.served_models import ServedModels
from tandem_router.openai.request import InferenceRequest

# Nothing says what such a server can do; it refuses what it cannot, and another tier is asked.
ABLE = dict.fromkeys(("tools", "structured_output", "images", "logprobs", "embeddings"), True)


class _Reader:
    def __init__(self, served_model: str, role: str) -> None:
        self._models = ServedModels(served_model)
        self._role = role

    async def read(self, ask: Ask) -> dict[str, Any]:
        problem = await self._models.read(ask)
        report = {
            "role": self._role,
            "ready": problem is None,
            "capabilities": dict(ABLE),
            "adapters": self._models.adapters,
        }
        return report if problem is None else {**report, "problem": problem}


def as_provider(request: InferenceRequest, fields: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The fields with the server's own name of the model; a stream then tells its usage."""
    taken = {**fields, "model": model}
    if request.stream:
        options = fields.get("stream_options") or {}
        taken["stream_options"] = {**options, "include_usage": True}
    return taken


class OpenAIEngine:
    """The least that a server can offer."""

    salted = False

    def auth(self, peer_token: str | None) -> Headers:
        return []

    def reader(self, served_model: str, role: str, probe: bool = True) -> _Reader:
        return _Reader(served_model, role)

    def headers(self, told: Told, stream: bool) -> Headers:
        return []

    def fields(
        self, request: InferenceRequest, fields: Mapping[str, Any], told: Told
    ) -> Mapping[str, Any]:
        return as_provider(request, fields, told.served_model)

    def prefill_order(self, request: InferenceRequest, body: bytes) -> tuple[str, bytes] | None:
        return None

    def handed_over(self, body: bytes, reply: bytes) -> bytes:
        return body

    async def test_handover(
        self, served_model: str, prefill: Ask, decode: Ask
    ) -> tuple[bool, str] | None:
        return None

    def wire(self, request: InferenceRequest) -> PlainWire:
        return PlainWire(request)
