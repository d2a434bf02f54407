"""What a store keeps, as plain values, and what any store has to be able to do.

Nothing here holds an API key: only its keyed hash; and no word of a prompt or an answer, except
that a label keeps the prompt where its Router's `learning.capture` says Prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from msgspec import Struct


class Spend(Struct):
    """What one tenant used of one tier on one day (UTC, YYYY-MM-DD)."""

    day: str
    tenant: str
    tier: str
    num_requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    cost_all_large_usd: float = 0.0

    def plus(self, other: Spend) -> Spend:
        return Spend(
            self.day,
            self.tenant,
            self.tier,
            self.num_requests + other.num_requests,
            self.prompt_tokens + other.prompt_tokens,
            self.output_tokens + other.output_tokens,
            self.cost_usd + other.cost_usd,
            self.cost_all_large_usd + other.cost_all_large_usd,
        )


LabelSource = Literal["feedback", "shadow", "judge", "cascade", "gold", "explored"]
LABEL_SOURCES: tuple[LabelSource, ...] = get_args(LabelSource)


@dataclass(frozen=True, slots=True)
class Label:
    """What was found out about the quality of one request's answers; one per request and source.

    source: `feedback`: a user's verdict; `shadow`: another tier answered too, and the answers were
    compared; `judge`: an external judge graded them; `cascade`: the verifier read the small tier's
    answer or both were compared after an escalation; `gold`: the right answer is known.
    probability: with which the request was chosen to be looked at, for weighting by its inverse.
    quality: 0 to 1, of each tier whose answer is known to be good or bad. predicted: what the
    predictor expected of each tier at the time. cost_usd: what finding it out cost beyond the
    answer. features, prompt: only where the Router captures them; JSON.
    """

    request_id: str
    source: LabelSource
    at: float  # Unix
    tenant: str
    tier: str  # that answered the client
    probability: float
    quality: Mapping[str, float]
    gold: bool = False  # known, where others are judged
    predicted: Mapping[str, float] = field(default_factory=dict)
    cost_usd: float = 0.0
    features: Mapping[str, Any] | None = None
    prompt: Any = None  # a text, or a chat's messages


@dataclass(frozen=True, slots=True)
class Key:
    """An API key by its keyed hash; limits are its own, inside those of its tenant."""

    id: str
    tenant: str
    hash: str
    created: float  # Unix
    expires: float | None = None
    revoked: float | None = None
    max_concurrency: int | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    usd_per_hour: float | None = None

    def works(self, now: float) -> bool:
        return self.revoked is None and (self.expires is None or now < self.expires)


@dataclass(slots=True)
class Batch:
    """What is written in one transaction. A writer's sequence makes a repeated batch harmless."""

    writer: str
    sequence: int
    spend: list[Spend] = field(default_factory=list)
    decisions: list[Mapping[str, Any]] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.spend or self.decisions or self.labels)


MOST_LABELS_READ = 100_000


class StoreError(Exception):
    """The store is full, locked or away; the message says which, for status."""


class Backend(Protocol):
    """One kind of store. Every method raises StoreError when it cannot be done now."""

    kind: str

    async def open(self) -> None:
        """Connect, and make the tables where there are none."""
        ...

    async def close(self) -> None: ...

    async def write(self, batch: Batch) -> None:
        """All of a batch or nothing; one that was written before changes nothing."""
        ...

    async def spend(self, since_day: str = "") -> Sequence[Spend]: ...

    async def decisions(self, limit: int, before: float | None = None) -> list[dict[str, Any]]:
        """Newest first; `before` is a Unix time."""
        ...

    async def decision(self, request_id: str) -> dict[str, Any] | None: ...

    async def labels(self, since: float = 0.0, limit: int = MOST_LABELS_READ) -> Sequence[Label]:
        """Oldest first, at most `limit`; `since` is a Unix time, itself included."""
        ...

    async def forget_labels(self, before: float, captured_before: float) -> int:
        """Delete labels older than `before`, and what is captured in those older than the other.

        Returns how many rows changed.
        """
        ...

    async def keys(self) -> Sequence[Key]: ...

    async def put_key(self, key: Key) -> None:
        """Add a key or change it; a revocation is never taken back."""
        ...

    async def secret(self, proposed: str) -> str:
        """The secret of minted keys' hashes: the one that is kept, else `proposed`, kept now."""
        ...

    async def keep(self, name: str, body: bytes | None) -> None:
        """Keep some bytes under a name; None forgets them."""
        ...

    async def kept(self, name: str) -> bytes | None: ...

    async def kept_names(self, prefix: str) -> list[str]: ...

    async def claim(self, name: str, holder: str, for_s: float) -> bool:
        """Whether `holder` has the name for so long from now, by the store's clock."""
        ...

    async def lease(
        self, bucket: str, want: float, per_s: float, capacity: float, owed: float = 0.0
    ) -> float:
        """Take up to `want` from a shared bucket (negative hands back); returns what was moved.

        `owed` of it was used already and is taken even where it is not there.
        The bucket refills at `per_s` up to `capacity` by the store's clock and starts full.
        """
        ...
