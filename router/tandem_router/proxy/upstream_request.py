"""What an attempt sends: to a worker the client's bytes and our headers, to a provider its own.

Nothing internal leaves for a provider: no header of ours but the request's id, no peer token, and
in the body only what the client sent, with the provider's name of the model.
"""

from __future__ import annotations

import json

from tandem_router.balancing.endpoint_picker import Pick
from tandem_router.config import TierConfig
from tandem_router.engines import Told, engine_of
from tandem_router.openai.request import InferenceRequest, with_max_tokens
from tandem_router.proxy.arrival import Arrival
from tandem_router.proxy.context import Services
from tandem_router.proxy.tier_assignment import TierAssignment

Headers = list[tuple[bytes, bytes]]


def target(tier: TierConfig, base: str, path: str) -> str:
    """A provider's base URL ends in /v1 already."""
    return base + (path.removeprefix("/v1") if tier.kind == "external" else path)


def told(services: Services, assignment: TierAssignment, pick: Pick) -> Told:
    """What the router knows of the request that a worker of ours may use."""
    arrival, tier = assignment.arrival, assignment.tier
    slo_s = arrival.overrides.ttft_slo_s
    slo_ms = slo_s * 1000.0 if slo_s is not None else services.config.slo.ttft_ms
    deadline_ms = None
    if slo_ms is not None:
        left_ms = slo_ms - (services.clock() - arrival.started_at) * 1000.0
        deadline_ms = max(1, round(left_ms))
    score = assignment.scored.score
    lengths = getattr(score, "mean_tokens", None)
    return Told(
        request_id=arrival.request_id,
        created=arrival.created,
        seed=arrival.seed,
        served_model=tier.served_model,
        prefill_url=pick.prefill.url if pick.prefill is not None else None,
        deadline_ms=deadline_ms,
        priority=arrival.priority,
        expected_tokens=(lengths or {}).get(tier.name),
        order=tier.engine_order,
        peer_token=services.peer_token,
    )


def upstream_headers(services: Services, tier: TierConfig, arrival: Arrival, told: Told) -> Headers:
    headers = [
        (b"content-type", b"application/json"),
        (b"x-request-id", arrival.request_id.encode()),
    ]
    if tier.kind == "external":
        key = services.external_keys.get(tier.name)
        if key:
            headers.append((b"authorization", b"Bearer " + key.encode()))
        return headers
    return headers + engine_of(tier.engine).headers(told, arrival.request.stream)


def upstream_body(
    tier: TierConfig, request: InferenceRequest, body: bytes, max_tokens: int | None, told: Told
) -> bytes:
    """`body` as the tier's engine takes it; a provider gets its model's name and tells its usage.

    max_tokens: what the ceilings of money leave of an answer; None: as `body` says.
    """
    if tier.kind == "external":
        fields = {**request.fields, "model": tier.served_model}
        if request.stream:
            options = dict(fields.get("stream_options") or {})
            fields["stream_options"] = {**options, "include_usage": True}
        body = json.dumps(fields, ensure_ascii=False).encode()
    else:
        body = engine_of(tier.engine).body(request, body, told)
    if max_tokens is not None:
        body = with_max_tokens(request.kind, body, max_tokens, tier.max_tokens_field)
    return body
