"""What an attempt sends: to a worker the client's bytes and our headers, to a provider its own.

Nothing internal leaves for a provider: no header of ours but the request's id, no peer token, and
in the body only what the client sent, with the provider's name of the model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from tandem_router.balancing.endpoint_picker import Pick
from tandem_router.config import TierConfig
from tandem_router.engines import Told, engine_of
from tandem_router.engines.openai import as_provider
from tandem_router.openai.request import InferenceRequest, with_max_tokens
from tandem_router.proxy.arrival import Arrival
from tandem_router.proxy.context import Services
from tandem_router.proxy.random_ids import seed_of
from tandem_router.proxy.tier_assignment import TierAssignment

Headers = list[tuple[bytes, bytes]]
# Fields that only our workers understand, or that say how they share and order their work.
INTERNAL = frozenset(
    {
        "cache_salt",
        "chat_template",
        "chat_template_kwargs",
        "kv_transfer_params",
        "priority",
        "return_token_ids",
        "tandem",
    }
)

_MODEL = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*"([^"\\]*)"')
_JSON_LINE = b"content-type: application/json\r\n"
_TELLS_USAGE = b'"stream_options":{"include_usage":true},'


def target(base: str, path: str, external: bool) -> str:
    """A provider's base URL ends in /v1 already."""
    return base + (path.removeprefix("/v1") if external else path)


def told(services: Services, assignment: TierAssignment, pick: Pick) -> Told:
    """What the router knows of the request that a worker of ours may use."""
    arrival, tier = assignment.arrival, assignment.tier
    slo_s = arrival.overrides.ttft_slo_s
    slo_ms = slo_s * 1000.0 if slo_s is not None else services.config.slo.ttft_ms
    deadline_ms = None
    if slo_ms is not None:
        left_ms = slo_ms - (services.clock() - arrival.started_at) * 1000.0
        deadline_ms = max(1, round(left_ms))
    return Told(
        request_id=arrival.request_id,
        created=arrival.created,
        seed=seed_of(arrival.request_id),
        served_model=arrival.adapter or tier.served_model,
        prefill_url=pick.prefill.url if pick.prefill is not None else None,
        deadline_ms=deadline_ms,
        priority=arrival.priority,
        turn=arrival.turn,
        tenant=None if arrival.tenant is None else tenant_id(arrival.tenant),
        expected_tokens=assignment.expected_tokens(),
        order=tier.engine_order,
        peer_token=services.peer_token,
        token_statistics=assignment.reads_answer,
    )


def provider_lines(services: Services, name: str, request_id: str) -> bytes:
    """`upstream_headers` of a provider as they are written; name: the tier's."""
    key = services.external_keys.get(name)
    if key is None:
        return b"%bx-request-id: %b\r\n" % (_JSON_LINE, request_id.encode())
    return b"%bx-request-id: %b\r\nauthorization: Bearer %b\r\n" % (
        _JSON_LINE,
        request_id.encode(),
        key,
    )


def upstream_headers(services: Services, tier: TierConfig, arrival: Arrival, told: Told) -> Headers:
    """For a worker of ours; a provider is told nothing but `provider_lines`."""
    headers = [
        (b"content-type", b"application/json"),
        (b"x-request-id", arrival.request_id.encode()),
    ]
    headers += engine_of(tier.engine).headers(told, arrival.request.stream)
    if services.tracing is not None:
        headers += services.tracing.headers(arrival.request_id)
    return headers


def upstream_body(
    tier: TierConfig,
    arrival: Arrival,
    body: bytes,
    max_tokens: int | None,
    told: Told | None,
) -> bytes:
    """`body` as the tier's engine takes it; a provider gets its model's name and tells its usage.

    max_tokens: what the ceilings of money leave of an answer; None: as `body` says. What needs no
    change is passed on byte by byte.
    """
    request = arrival.request
    if told is None:
        own = request.fields
        if max_tokens is None and body is request.body and INTERNAL.isdisjoint(own):
            renamed = spliced(request, tier.served_model)
            if renamed is not None:
                return renamed
        if not INTERNAL.isdisjoint(own):
            own = {name: value for name, value in own.items() if name not in INTERNAL}
        taken: Mapping[str, Any] = as_provider(request, own, tier.served_model)
        fields: Mapping[str, Any] = {}
    else:
        fields = request.fields_of(body)
        taken = engine_of(tier.engine).fields(request, fields, told)
    if max_tokens is not None:
        taken = with_max_tokens(request.kind, taken, max_tokens, tier.max_tokens_field)
    body = body if taken is fields else msgspec.json.encode(taken)
    if arrival.tenant is not None and told is not None and engine_of(tier.engine).salted:
        body = salted(request.fields, body, arrival.tenant)
    return body


def spliced(request: InferenceRequest, model: str) -> bytes | None:
    """As `engines.openai.as_provider`, and all else byte by byte; None where that is not certain.

    A body that spells `"model"` once and escapes no letter has no other such key at any depth, and
    the router has read one at the top.
    """
    body = request.body
    at = body.find(b'"model"')
    if at < 0 or body.find(b'"model"', at + 7) >= 0 or body.find(b"\\u00") >= 0:
        return None
    for spelled, before in _spellings(request.model):
        if body.startswith(spelled, at):
            start, end = at + before, at + len(spelled) - 1
            break
    else:
        found = _MODEL.match(body, at)
        if found is None or found[1] != request.model.encode():
            return None
        start, end = found.span(1)
    if request.stream:
        fields = request.fields
        if "stream_options" not in fields:
            first = body.index(b"{") + 1
            tells = body[:first] + _TELLS_USAGE
            return b"%b%b%b%b" % (tells, body[first:start], _quoted(model), body[end:])
        options = fields["stream_options"]
        if options is None or options.get("include_usage") is not True:
            return None
    return b"%b%b%b" % (body[:start], _quoted(model), body[end:])


@lru_cache(maxsize=256)
def _spellings(model: str) -> tuple[tuple[bytes, int], ...]:
    """How clients write the field, and where its value begins: as OpenAI's, or closely."""
    name = model.encode()
    if b'"' in name or b"\\" in name:
        return ()
    return ((b'"model": "%b"' % name, 10), (b'"model":"%b"' % name, 9))


@lru_cache(maxsize=256)
def _quoted(text: str) -> bytes:
    """Inside of quotes, as JSON writes it."""
    return msgspec.json.encode(text)[1:-1]


@lru_cache(maxsize=4096)
def tenant_id(tenant: str) -> str:
    """How workers tell a tenant from others: the same at every router, and nobody's name."""
    return hashlib.sha256(f"tenant\0{tenant}".encode()).hexdigest()[:16]


def salted(fields: Mapping[str, Any], body: bytes, tenant: str) -> bytes:
    """The body with a `cache_salt` of this tenant alone: prefixes are shared within it.

    What another tenant has asked must not show in `cached_tokens` or in how fast an answer begins.
    A salt that the client sends divides its own tenant further.
    """
    own = fields.get("cache_salt")
    text = f"{tenant}\0{own if isinstance(own, str) else ''}"
    salt = hashlib.sha256(text.encode()).hexdigest()[:32].encode()
    if "cache_salt" in fields:
        return msgspec.json.encode({**msgspec.json.decode(body), "cache_salt": salt.decode()})
    start = body.index(b"{") + 1
    return b'%b"cache_salt":"%b",%b' % (body[:start], salt, body[start:])
