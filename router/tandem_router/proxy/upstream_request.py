"""What an attempt sends: to a worker the client's bytes and our headers, to a provider its own.

Nothing internal leaves for a provider: no header of ours but the request's id, no peer token, and
in the body only what the client sent, with the provider's name of the model.
"""

from __future__ import annotations

import json

from tandem_router.balancing.endpoint_picker import Pick
from tandem_router.config import TierConfig
from tandem_router.openai.request import InferenceRequest, with_max_tokens
from tandem_router.proxy.arrival import Arrival
from tandem_router.proxy.context import Services

Headers = list[tuple[bytes, bytes]]


def target(tier: TierConfig, base: str, path: str) -> str:
    """A provider's base URL ends in /v1 already."""
    return base + (path.removeprefix("/v1") if tier.kind == "external" else path)


def upstream_headers(services: Services, arrival: Arrival, tier: TierConfig, pick: Pick) -> Headers:
    headers = [
        (b"content-type", b"application/json"),
        (b"x-request-id", arrival.request_id.encode()),
    ]
    if tier.kind == "external":
        key = services.external_keys.get(tier.name)
        if key:
            headers.append((b"authorization", b"Bearer " + key.encode()))
        return headers
    headers += [
        (b"x-tandem-created", str(arrival.created).encode()),
        (b"x-tandem-model", tier.served_model.encode()),
        (b"x-tandem-seed", str(arrival.seed).encode()),
    ]
    if arrival.request.stream:
        headers += [(b"x-tandem-token-ids", b"1"), (b"x-tandem-usage", b"1")]
    if pick.prefill is not None:
        headers.append((b"x-tandem-prefill", pick.prefill.url.encode()))
    slo_s = arrival.overrides.ttft_slo_s
    slo_ms = slo_s * 1000.0 if slo_s is not None else services.config.slo.ttft_ms
    if slo_ms is not None:
        left_ms = slo_ms - (services.clock() - arrival.started_at) * 1000.0
        headers.append((b"x-tandem-deadline-ms", str(max(1, round(left_ms))).encode()))
    if arrival.priority is not None:
        headers.append((b"x-tandem-priority", str(arrival.priority).encode()))
    if services.peer_token:
        headers.append((b"x-tandem-peer-token", services.peer_token.encode()))
    return headers


def upstream_body(
    tier: TierConfig, request: InferenceRequest, body: bytes, max_tokens: int | None
) -> bytes:
    """`body` as it is for a worker; a provider gets its model's name and tells its usage.

    max_tokens: what the ceilings of money leave of an answer; None: as the client said.
    """
    if tier.kind == "external":
        fields = {**request.fields, "model": tier.served_model}
        if request.stream:
            options = dict(fields.get("stream_options") or {})
            fields["stream_options"] = {**options, "include_usage": True}
        body = json.dumps(fields, ensure_ascii=False).encode()
    if max_tokens is not None:
        body = with_max_tokens(request.kind, body, max_tokens, tier.max_tokens_field)
    return body
