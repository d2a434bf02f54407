"""Load reports of pods: as our own workers give them, or put together by their engine's adapter.

The adapters are the router's (`tandem_router.engines`): router and operator read an engine the
same way, and what comes out has the shape of `GET /v1/load`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from tandem_operator.plan.engines.protocol import ENGINE_LABEL, SERVED_ANNOTATION
from tandem_operator.plan.objects import ROLE_LABEL, Object
from tandem_operator.reconcile.pod_http import ask_pod
from tandem_router.engines import Ask, LoadReader, engine_of
from tandem_router.errors import UpstreamError

MAX_READERS = 4096
HANDOVER_TIMEOUT_S = 30.0


def is_foreign(pod: Object) -> bool:
    """Whether the pod's worker is another engine than ours."""
    return ENGINE_LABEL in (pod["metadata"].get("labels") or {})


class EngineReports:
    """One reader per pod: what a server said before is needed to read what it says now."""

    def __init__(self) -> None:
        self._readers: dict[str, LoadReader] = {}

    async def read(self, pod: Object, port: int, timeout_s: float) -> Mapping[str, Any] | None:
        """The report of a foreign pod; None where it does not answer."""
        metadata = pod["metadata"]
        key = f"{metadata.get('namespace')}/{metadata.get('uid')}"
        reader = self._readers.pop(key, None)
        if reader is None:
            served = (metadata.get("annotations") or {}).get(SERVED_ANNOTATION, "")
            engine, role = metadata["labels"][ENGINE_LABEL], metadata["labels"].get(ROLE_LABEL, "")
            reader = engine_of(engine).reader(served, role, probe=False)
        self._readers[key] = reader  # the latest last
        while len(self._readers) > MAX_READERS:
            self._readers.pop(next(iter(self._readers)))
        try:
            async with asyncio.timeout(timeout_s):
                return await reader.read(asker(pod["status"]["podIP"], port))
        except (OSError, TimeoutError, ValueError, UpstreamError):
            return None


async def handover(prefill: Object, decode: Object, port: int) -> tuple[bool, str] | None:
    """The KV link test of two foreign pods. Raises OSError, TimeoutError or ValueError."""
    metadata = prefill["metadata"]
    served = (metadata.get("annotations") or {}).get(SERVED_ANNOTATION, "")
    async with asyncio.timeout(HANDOVER_TIMEOUT_S):
        return await engine_of(metadata["labels"][ENGINE_LABEL]).test_handover(
            served, asker(prefill["status"]["podIP"], port), asker(decode["status"]["podIP"], port)
        )


def asker(host: str, port: int) -> Ask:
    """How an adapter asks a pod. What it raises is OSError or ValueError."""

    async def ask(path: str, body: bytes = b"") -> tuple[int, bytes]:
        headers = {"content-type": "application/json"} if body else {}
        return await ask_pod(host, port, "POST" if body else "GET", path, body, headers)

    return ask
