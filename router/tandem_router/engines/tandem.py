"""Our own worker: what the router adds travels in headers, and the body is the client's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tandem_router.engines.protocol import (
    Ask,
    Headers,
    PlainWire,
    Resumption,
    SentChoice,
    Told,
)
from tandem_router.openai.request import InferenceRequest


class _Reader:
    async def read(self, ask: Ask) -> dict[str, Any]:
        status, body = await ask("/v1/load")
        if status != 200:
            raise ValueError(f"GET /v1/load answered {status}")
        report = json.loads(body)
        return report if isinstance(report, dict) else {}


class _Wire(PlainWire):
    def resume(self, sent: Sequence[SentChoice], max_tokens: int | None) -> Resumption:
        plain = super().resume(sent, max_tokens)
        if not any(choice.token_ids for choice in sent):
            return plain
        ids = [list(choice.token_ids) for choice in sent]
        fields = {**self._request.fields, "tandem": {"resume_token_ids": ids}}
        return Resumption(plain.path, json.dumps(fields, ensure_ascii=False).encode())


class TandemEngine:
    """Speaks `docs/contract.md`."""

    salted = True

    def auth(self, peer_token: str | None) -> Headers:
        return [(b"x-tandem-peer-token", peer_token.encode())] if peer_token else []

    def reader(self, served_model: str, role: str, probe: bool = True) -> _Reader:
        return _Reader()

    def headers(self, told: Told, stream: bool) -> Headers:
        headers = [
            (b"x-tandem-created", str(told.created).encode()),
            (b"x-tandem-model", told.served_model.encode()),
            (b"x-tandem-seed", str(told.seed).encode()),
        ]
        if stream:
            headers += [(b"x-tandem-token-ids", b"1"), (b"x-tandem-usage", b"1")]
        if told.token_statistics:
            headers.append((b"x-tandem-token-statistics", b"1"))
        if told.prefill_url is not None:
            headers.append((b"x-tandem-prefill", told.prefill_url.encode()))
        if told.deadline_ms is not None:
            headers.append((b"x-tandem-deadline-ms", str(told.deadline_ms).encode()))
        if told.priority is not None:
            headers.append((b"x-tandem-priority", str(told.priority).encode()))
        if told.tenant is not None:
            headers.append((b"x-tandem-tenant", told.tenant.encode()))
        if told.expected_tokens is not None:
            expected = max(1, round(told.expected_tokens))
            headers.append((b"x-tandem-expected-tokens", str(expected).encode()))
        return headers + self.auth(told.peer_token)

    def fields(
        self, request: InferenceRequest, fields: Mapping[str, Any], told: Told
    ) -> Mapping[str, Any]:
        return fields

    def prefill_order(self, request: InferenceRequest, body: bytes) -> tuple[str, bytes] | None:
        return None  # decode workers ask prefill workers by themselves

    def handed_over(self, body: bytes, reply: bytes) -> bytes:
        return body

    async def test_handover(
        self, served_model: str, prefill: Ask, decode: Ask
    ) -> tuple[bool, str] | None:
        return None  # its link test pushes a block (`/internal/kv-link`)

    def wire(self, request: InferenceRequest) -> PlainWire:
        return _Wire(request)
