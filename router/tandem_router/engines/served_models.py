"""What a server lists in `/v1/models`: whether it serves the model that is asked for; adapters."""

from __future__ import annotations

import json
from typing import Any

from tandem_router.engines.protocol import Ask


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
