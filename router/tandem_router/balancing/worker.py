"""What the router knows of one worker: its load report, what this router sent it, its failures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from tandem_router.balancing.file_discovery import Role
from tandem_router.balancing.outliers import Outcomes
from tandem_router.balancing.prefix_index import PrefixIndex
from tandem_router.policy import Capabilities

# What a worker can that reports no capabilities.
TEXT_WORKER = Capabilities(tools=False, structured_output=False, images=False, embeddings=False)
# One request in flight delays a new one by about as much as prefilling this many tokens: its
# decode steps share the batch. Only the order of candidates depends on it.
TOKENS_PER_RUNNING_REQUEST = 64.0
# The same where the worker says how many tokens it still expects of its answers: a request of the
# usual length weighs as much.
TOKENS_PER_EXPECTED_TOKEN = 0.5
# A worker with less than this share of KV blocks free or reclaimable will preempt.
KV_SCARCE_SHARE = 0.05
KV_SCARCE_PENALTY_TOKENS = 4096.0


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker said about itself (GET /v1/load)."""

    ready: bool = True
    draining: bool = False
    num_requests: int = 0
    pending_prefill_tokens: int = 0
    expected_tokens: float | None = None
    kv_free_share: float = 1.0
    revision: str | None = None
    max_model_len: int | None = None
    step_time_s: float | None = None
    prefill_profile: tuple[float, float, float] | None = None
    decode_profile: tuple[float, float, float] | None = None
    capabilities: Capabilities = TEXT_WORKER
    adapters: frozenset[str] = frozenset()  # LoRA adapters, by the names that requests use

    @classmethod
    def parse(cls, data: Any) -> Load:
        """From the decoded JSON; unknown or missing parts keep their defaults."""
        if not isinstance(data, dict):
            return cls()
        blocks = data.get("kv_blocks")
        free_share = 1.0
        if isinstance(blocks, dict) and _number(blocks.get("total")) > 0:
            free = _number(blocks.get("free")) + _number(blocks.get("cached"))
            free_share = min(1.0, free / _number(blocks["total"]))
        revision = data.get("revision")
        max_len = data.get("max_model_len")
        profile = data.get("profile")
        halves = profile if isinstance(profile, dict) else {}
        max_model_len = max_len if isinstance(max_len, int) else None
        return cls(
            ready=bool(data.get("ready", True)),
            draining=bool(data.get("draining", False)),
            num_requests=int(_number(data.get("num_running")) + _number(data.get("num_waiting"))),
            pending_prefill_tokens=int(_number(data.get("pending_prefill_tokens"))),
            expected_tokens=(
                _number(data["expected_tokens"]) if "expected_tokens" in data else None
            ),
            kv_free_share=free_share,
            revision=revision if isinstance(revision, str) and revision else None,
            max_model_len=max_model_len,
            step_time_s=_number(data.get("step_time_s")) or None,
            prefill_profile=_three(halves.get("prefill")),
            decode_profile=_three(halves.get("decode")),
            capabilities=_capabilities(data.get("capabilities"), max_model_len),
            adapters=_names(data.get("adapters")),
        )


_FLAGS = ("generation", "tools", "structured_output", "images", "logprobs", "embeddings")


def _capabilities(said: Any, max_model_len: int | None) -> Capabilities:
    """What a report says; a worker that says nothing of them is one that serves plain text."""
    if not isinstance(said, dict):
        return replace(TEXT_WORKER, context_length=max_model_len)
    length = said.get("context_length")
    return Capabilities(
        **{name: bool(said.get(name, getattr(TEXT_WORKER, name))) for name in _FLAGS},
        context_length=length if isinstance(length, int) and length > 0 else max_model_len,
    )


def _names(said: Any) -> frozenset[str]:
    return (
        frozenset(n for n in said if isinstance(n, str)) if isinstance(said, list) else frozenset()
    )


def _three(numbers: Any) -> tuple[float, float, float] | None:
    if not isinstance(numbers, list) or len(numbers) != 3:
        return None
    return _number(numbers[0]), _number(numbers[1]), _number(numbers[2])


def _number(value: Any) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if good and value == value and abs(value) < 1e18 else 0.0


UNREPORTED = Load()


@dataclass(eq=False)
class Worker:
    """One endpoint and everything this router knows of it."""

    url: str
    tier: str
    role: Role
    prefixes: PrefixIndex
    load: Load | None = None
    num_inflight: int = 0
    sent_tokens: float = 0.0  # expected of the answers asked for since the last report
    pending_tokens: float = 0.0
    num_failures: int = 0
    down_until: float = 0.0
    draining: bool = False
    last_error: str | None = None
    # Of the whole replies asked for since it was idle, the most tokens that one may have.
    longest_answer: int = 1
    heard_at: float = -math.inf  # loop time: the last byte of an answer that has begun or ended
    outcomes: Outcomes = field(default_factory=Outcomes)

    def usable(self, now: float, ejected_too: bool = False) -> bool:
        if self.draining or now < self.down_until:
            return False
        if now < self.outcomes.ejected_until and not ejected_too:
            return False
        load = self.load
        return load is None or (load.ready and not load.draining)

    @cached_property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    def pending(self) -> float:
        """Tokens of prefill before a new request."""
        load = self.load or UNREPORTED
        return max(self.pending_tokens, float(load.pending_prefill_tokens))

    def queued_tokens(self) -> float:
        """Work before a new request, in prefill-token equivalents."""
        load, pending = self.load or UNREPORTED, self.pending()
        if load.expected_tokens is not None:
            cost = pending + TOKENS_PER_EXPECTED_TOKEN * (load.expected_tokens + self.sent_tokens)
        else:
            running = max(self.num_inflight, load.num_requests)
            cost = pending + TOKENS_PER_RUNNING_REQUEST * running
        if load.kv_free_share < KV_SCARCE_SHARE:
            cost += KV_SCARCE_PENALTY_TOKENS
        return cost
