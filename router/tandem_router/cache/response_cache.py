"""Answers served again from the cache, in the form each client asked for.

The cache holds whole replies (`chat.completion`, `text_completion`). A stream that ended well is
assembled into one, and a hit for a streaming client is played back as events, so both kinds of
client share entries. Requests with log-probabilities or tools pass by: their streams carry more
than text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from tandem_router.cache import (
    CachedAnswer,
    Demand,
    Eviction,
    ResponseCache,
    cache_key,
    worth_upgrading,
)
from tandem_router.config import RouterConfig, served_by
from tandem_router.limits.prices import list_price
from tandem_router.openai.request import InferenceRequest
from tandem_router.openai.said import choices_of, chunk_of, finish_of, part_of
from tandem_router.openai.sse import (
    DONE,
    decode_json,
    encode_event,
    encode_json,
    event_data,
    split_events,
)
from tandem_router.policy import Decision

_MORE_THAN_TEXT = ("logprobs", "top_logprobs", "tools", "functions", "audio", "modalities")


class Reuse:
    """The response cache of one router, or nothing where it is off."""

    def __init__(self, config: RouterConfig, clock: Callable[[], float]) -> None:
        self.cache: ResponseCache | None = None
        # Of this process only: keys cannot be computed outside it.
        self._salt = secrets.token_bytes(32)
        self._clock = clock
        self._models: dict[str, tuple[str | None, ...]] = {}
        self._ranks: dict[str, int] = {}
        self.reconfigure(config)

    def reconfigure(self, config: RouterConfig) -> None:
        """Take other bounds and tiers; answers stay, but for those of another model than now."""
        bounds = config.cache
        eviction = Eviction[bounds.eviction]
        if not bounds.enabled:
            self.cache = None
        elif self.cache is None:
            self.cache = ResponseCache(bounds.max_bytes, ttl_s=bounds.ttl_s, eviction=eviction)
        else:
            self.cache.resize(bounds.max_bytes, ttl_s=bounds.ttl_s, eviction=eviction)
        models = {tier.name: served_by(config, tier) for tier in config.tiers}
        ranks = {tier.name: rank for rank, tier in enumerate(sorted(config.tiers, key=list_price))}
        if self.cache is not None and (models, ranks) != (self._models, self._ranks):
            same = {t: rank for t, rank in ranks.items() if models[t] == self._models.get(t)}
            self.cache.rerank(same)
        self._models, self._ranks = models, ranks

    def key(self, request: InferenceRequest, tenant: str) -> bytes | None:
        """None when the answer must not be reused."""
        if self.cache is None or request.kind == "embeddings":
            return None
        if any(request.fields.get(name) for name in _MORE_THAN_TEXT):
            return None
        return cache_key(self._salt, f"{request.kind}/{tenant}", request.fields)

    def expected_uses(self, key: bytes | None) -> float:
        return 1.0 if key is None or self.cache is None else self.cache.expected_uses(key)

    def find(
        self,
        key: bytes,
        decision: Decision,
        forced: str | None,
        quality_demanded: bool,
        lambda_per_usd: float,
    ) -> CachedAnswer | None:
        """An answer good enough for a request that would otherwise go to `decision.tier`."""
        if self.cache is None:  # switched off a moment ago
            return None
        assert decision.tier is not None
        rank = self._ranks[decision.tier]
        demand = Demand(exact_tier=forced, min_rank=rank if quality_demanded else 0)
        answer = self.cache.get(key, self._clock(), demand)
        if answer is None:
            return None
        quality = {verdict.tier: verdict.quality for verdict in decision.verdicts}
        wanted, held = quality.get(decision.tier), quality.get(answer.tier)
        gain = wanted - held if wanted is not None and held is not None else None
        price = lambda_per_usd * decision.expected_cost_usd
        if forced is None and worth_upgrading(answer, rank, gain, price, self.expected_uses(key)):
            return None
        return answer

    def keep(self, key: bytes, body: bytes, tier: str, cost_usd: float) -> None:
        """Unless it says more than text, or the cache or the tier went while it was made."""
        rank = self._ranks.get(tier)
        if self.cache is not None and rank is not None and _is_text(body):
            self.cache.put(key, CachedAnswer(body, tier, rank, cost_usd, self._clock()))


def _is_text(body: bytes) -> bool:
    """Whether text is all that a whole reply says: thoughts and calls do not fit every form."""
    try:
        choices = choices_of(decode_json(body))
    except (ValueError, AttributeError, RecursionError):
        return False
    return bool(choices) and all(_is_plain(part_of(choice, "message")) for choice in choices)


def _is_plain(said: Mapping[str, Any]) -> bool:
    """Whether a message or delta says text and nothing else."""
    return all(not value or name in ("content", "role") for name, value in said.items())


def assemble(events: bytes, kind: str, usage: Mapping[str, Any] | None) -> bytes | None:
    """The whole reply that a finished one-choice stream amounts to; None when it is not plain."""
    text = []
    finish: str | None = None
    first: dict[str, Any] | None = None
    for event in split_events(events):
        chunk = chunk_of(event)
        if chunk is None and event_data(event).startswith(b"{"):
            return None
        if chunk is None or not chunk.get("choices"):
            continue
        first = first or chunk
        choices = choices_of(chunk)
        if len(choices) != 1 or choices[0].get("index", 0) != 0:
            return None
        said = part_of(choices[0], "delta") if kind == "chat" else choices[0]
        piece = said.get("content" if kind == "chat" else "text")
        if not isinstance(piece, str | None) or (kind == "chat" and not _is_plain(said)):
            return None
        text.append(piece or "")
        finish = finish_of(choices[0]) or finish
    if first is None or finish is None or usage is None:
        return None
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
    if kind == "chat":
        choice["message"] = {"role": "assistant", "content": "".join(text)}
    else:
        choice["text"] = "".join(text)
    whole = {
        "id": first.get("id"),
        "object": "chat.completion" if kind == "chat" else "text_completion",
        "created": first.get("created"),
        "model": first.get("model"),
        "choices": [choice],
        "usage": usage,
    }
    return encode_json(whole)


def with_new_id(body: bytes, kind: str, request_id: str, created: int) -> dict[str, Any]:
    """A cached reply as a fresh one: every reply has its own id."""
    prefix = "chatcmpl" if kind == "chat" else "cmpl"
    return {**json.loads(body), "id": f"{prefix}-{request_id}", "created": created}


def _delta(message: Mapping[str, Any]) -> dict[str, Any]:
    """All of a message as one piece of a stream: its thought and its calls of tools, too."""
    more = {name: value for name, value in message.items() if value is not None}
    if calls := more.get("tool_calls"):
        more["tool_calls"] = [{"index": at, **call} for at, call in enumerate(calls)]
    return {"role": "assistant", "content": None, **more}


def as_stream(reply: Mapping[str, Any], kind: str, include_usage: bool) -> bytes:
    """A whole reply as the events of a stream."""
    chat = kind == "chat"
    frame = {
        "id": reply["id"],
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": reply["created"],
        "model": reply.get("model"),
    }
    events = []
    for choice in reply["choices"]:
        message = choice.get("message") or {}
        text = choice.get("text")
        part = {"index": choice.get("index", 0), "logprobs": None, "finish_reason": None}
        body = {"delta": _delta(message)} if chat else {"text": text}
        last: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        events.append(encode_event({**frame, "choices": [{**part, **body}]}))
        end = {**part, **last, "finish_reason": choice.get("finish_reason")}
        events.append(encode_event({**frame, "choices": [end]}))
    if include_usage:
        events.append(encode_event({**frame, "choices": [], "usage": reply.get("usage")}))
    return b"".join(events) + DONE
