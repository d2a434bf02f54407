"""One admitted request as one value, from its arrival to its accounting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from tandem_router.config import FailoverConfig
from tandem_router.config.access import OutwardConfig
from tandem_router.errors import bad_request
from tandem_router.limits.ledger import Hold
from tandem_router.limits.turns import turn
from tandem_router.openai.headers import RequestHeaders
from tandem_router.openai.prompt_size import images_of
from tandem_router.openai.request import DEFAULT_OUTPUT_TOKENS, InferenceRequest
from tandem_router.policy import Overrides
from tandem_router.proxy.context import Services

# A longest answer assumed for the deadline of a whole reply, and the most that counts.
UNBOUNDED_ANSWER_TOKENS = 1024
LONGEST_ANSWER_TOKENS = 4096


class Arrival(Struct, frozen=True):
    """What every station of a request reads; nothing in it changes."""

    request: InferenceRequest
    overrides: Overrides  # with the tier that the client named, if it named one
    adapter: str | None  # of that tier, where the client named one
    priority: int | None  # as its client asked
    turn: int | None  # the same, behind what its tenant has under way
    no_cache: bool
    tenant: str | None  # None where nobody needs a key
    hold: Hold
    request_id: str
    created: int  # Unix time
    started_at: float  # of the router's clock
    deadline: float  # of the router's clock: no worker, no first token by then is a refusal
    answer_s: float  # beyond it, the time that the length of a whole reply may take
    cache_key: bytes | None  # None where the answer must not be reused
    forced: bool  # whether the client named the tier


def admit(
    services: Services,
    request: InferenceRequest,
    headers: RequestHeaders,
    tenant: str,
    key: str | None,
    request_id: str,
    started_at: float,
) -> Arrival:
    """Pass all gates. Raises ApiError: 404 for an unknown model, 429 above a limit."""
    routing, priority = services.routing, headers.priority
    forced = adapter = None
    if request.model != routing.router_name:
        forced, adapter = routing.forced_tier(request.model), routing.adapter(request.model)
    elif request.kind == "embeddings":
        forced = routing.embedding_tier()
    if priority is not None and priority < (highest := services.ledger.highest_priority(tenant)):
        raise bad_request(
            f"header x-tandem-priority: {priority} goes before others; tenant {tenant!r} "
            f"may send {highest} or more (its `highest_priority`)",
            "x-tandem-priority",
        )
    if "images" in request.needs.features:
        check_images(request.fields, services.config.outward)
    expected = DEFAULT_OUTPUT_TOKENS
    if request.max_tokens is not None:
        expected = min(request.max_tokens, LONGEST_ANSWER_TOKENS)
    num_tokens = float(request.num_prompt_tokens + expected * request.num_choices)
    hold = services.ledger.hold(tenant, num_tokens, key)
    failover = services.config.failover
    # By place: names would cost as much as the rest.
    return Arrival(
        request,
        headers.overrides if forced is None else replace(headers.overrides, tier=forced),
        adapter,
        priority,
        None
        if key is None and priority is None
        else turn(priority, hold.accounts[-1].num_inflight if key is not None else 0),
        headers.no_cache,
        tenant if key is not None else None,
        hold,
        request_id,
        int(services.wall_clock()),
        started_at,
        started_at + failover.wait_s,
        0.0 if request.stream else answer_s(request, failover),
        services.reuse.key(request, tenant),
        forced is not None,
    )


def check_images(fields: Mapping[str, Any], outward: OutwardConfig) -> None:
    """Refuse images that a server of ours would fetch from where only pods may ask.

    What a name stands for the server finds out itself: `networkPolicies.restrictEgress` is for
    that. Raises ApiError (400).
    """
    for url, _ in images_of(fields.get("messages")):
        scheme, colon, _ = url.strip()[:16].partition(":")
        scheme = scheme.lower()
        if not colon or scheme == "data":
            continue
        why = outward.rule.refused_url(url.strip()) if scheme in ("http", "https") else None
        if scheme not in ("http", "https"):
            why = "is neither https:, http: nor data:"
        if why is not None:
            raise bad_request(
                f"the image {url[:100]!r} {why}; send it as a data: URL, or add its network to "
                "outward.allowed_networks",
                "messages",
            )


def answer_s(request: InferenceRequest, failover: FailoverConfig) -> float:
    """A stream shows life with its first token, a whole reply only with its last."""
    if request.stream:
        return 0.0
    most = request.max_tokens if request.max_tokens is not None else UNBOUNDED_ANSWER_TOKENS
    return failover.answer_s_per_token * min(most, LONGEST_ANSWER_TOKENS)
