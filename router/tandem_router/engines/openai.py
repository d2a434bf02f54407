"""Any server inside the cluster that speaks OpenAI's API: SGLang, TGI, llama.cpp, Ollama.

It is asked for its models, and that is all it says of its load: the router knows what it sent
there itself. A stream that broke is not gone on with, and nothing is measured for the autoscaler.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tandem_router.engines.protocol import Ask, Headers, PlainWire, Told
from tandem_router.openai.request import InferenceRequest

# Nothing says what such a server can do; it refuses what it cannot, and another tier is asked.
ABLE = dict.fromkeys(("tools", "structured_output", "images", "logprobs", "embeddings"), True)


class ServedModels:
    """Checks once that a server serves the model that it is asked for."""

    def __init__(self, served_model: str) -> None:
        self._served_model = served_model
        self.entries: list[dict[str, Any]] = []

    @property
    def adapters(self) -> list[str]:
        """LoRA adapters: what a server lists with the model that they belong to."""
        return [str(entry["id"]) for entry in self.entries if entry.get("parent") and "id" in entry]

    async def read(self, ask: Ask) -> str | None:
        """A sentence where another model is served. Raises ValueError without a usable reply."""
        status, body = await ask("/v1/models")
        reply = json.loads(body) if status == 200 else None
        found = reply.get("data") if isinstance(reply, dict) else None
        if not isinstance(found, list):
            raise ValueError(f"GET /v1/models answered {status} without a list of models")
        self.entries = [entry for entry in found if isinstance(entry, dict)]
        names = [str(entry.get("id")) for entry in self.entries]
        if self._served_model in names:
            return None
        shown = ", ".join(names[:5]) or "no model"
        return (
            f"serves {shown} and not {self._served_model!r}; set servedName to what the server "
            "calls its model, or start it with that name"
        )


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
