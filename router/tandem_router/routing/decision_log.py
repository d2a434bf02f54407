"""The last decisions of a router, for the dashboard, /admin/decisions and the demo.

A record holds numbers and names, never a word of the prompt or the answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from msgspec import Struct

from tandem_router.policy import TierVerdict
from tandem_router.store.records import Spend as SpentBefore


@dataclass(frozen=True, slots=True)
class Attempt:
    """A try that gave no answer: where, what was wrong, what it cost all the same."""

    tier: str
    fault: str
    cost_usd: float


class DecisionRecord(Struct, eq=False, gc=False):
    """One request; filled in as it proceeds."""

    sequence: int
    request_id: str
    time: float
    tenant: str
    model: str
    kind: str
    stream: bool
    tier: str
    reason: str
    gain: float | None
    threshold: float | None
    difficulty: float | None
    quality: Mapping[str, float]
    expected_cost_usd: float
    status: int | None = None
    error: str | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
    max_tokens: int | None = None  # forwarded because a ceiling pays no more
    usage_estimated: bool = False  # the provider's own numbers were missing or senseless
    cost_all_large_usd: float | None = None
    num_failovers: int = 0
    attempts: tuple[Attempt, ...] = ()  # those that gave no answer
    advised: str | None = None  # what would have been taken, where routing only advises
    # Of an answer that was read before another or itself was sent: by whom it was, what the
    # verifier and the judge said, what became of it, what it cost.
    read: Mapping[str, Any] | None = None
    verdicts: tuple[TierVerdict, ...] = ()  # how every tier stood
    decode_worker: str | None = None
    prefill_worker: str | None = None


_RECORDED = tuple(name for name in DecisionRecord.__struct_fields__ if name != "verdicts")
_JUDGED = TierVerdict.__struct_fields__


def explained(record: DecisionRecord) -> dict[str, Any]:
    """A record as JSON, with the runner-up and by how much it lost.

    The margin is in quality points after price, threshold and latency; None where nothing was
    scored or nothing else was left.
    """
    # Not dataclasses.asdict, which copies every value and takes five times as long.
    fields = {name: getattr(record, name) for name in _RECORDED}
    fields["attempts"] = [asdict(attempt) for attempt in record.attempts]
    tiers = [{name: getattr(tier, name) for name in _JUDGED} for tier in record.verdicts]
    taken = next((tier for tier in tiers if tier["tier"] == record.tier), None)
    others = [
        tier
        for tier in tiers
        if tier is not taken and tier["utility"] is not None and tier["excluded"] is None
    ]
    runner_up = max(others, key=lambda tier: tier["utility"], default=None)
    margin = None
    if taken is not None and runner_up is not None and taken["utility"] is not None:
        margin = taken["utility"] - runner_up["utility"]
    return {
        **fields,
        "tiers": tiers,
        "runner_up": runner_up["tier"] if runner_up is not None else None,
        "margin": margin,
    }


@dataclass
class TierTotals:
    num_requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0


@dataclass
class DecisionLog:
    """A bounded log and running totals since the start.

    before_read: called before totals are read, for who has not told them all yet.
    """

    max_kept: int
    sequence: int = 0
    before_read: Callable[[], None] = lambda: None
    _totals: dict[str, TierTotals] = field(default_factory=dict)
    _cost_all_large_usd: float = 0.0
    _kept: deque[DecisionRecord] = field(default_factory=deque)

    @property
    def totals(self) -> dict[str, TierTotals]:
        """By tier."""
        self.before_read()
        return self._totals

    @property
    def cost_all_large_usd(self) -> float:
        """What all of it would have cost on the dearest tier."""
        self.before_read()
        return self._cost_all_large_usd

    def next_sequence(self) -> int:
        self.sequence += 1
        return self.sequence

    def add(self, record: DecisionRecord) -> None:
        self._kept.append(record)
        if len(self._kept) > self.max_kept:
            self._kept.popleft()

    def add_totals(self, tier: str, spend: SpentBefore) -> None:
        """Count what earlier processes have served."""
        totals = self._totals.setdefault(tier, TierTotals())
        totals.num_requests += spend.num_requests
        totals.prompt_tokens += spend.prompt_tokens
        totals.output_tokens += spend.output_tokens
        totals.cost_usd += spend.cost_usd
        self._cost_all_large_usd += spend.cost_all_large_usd

    def finished(
        self,
        tier: str,
        num_requests: int,
        prompt_tokens: int,
        output_tokens: int,
        cost_usd: float,
        cost_all_large_usd: float,
    ) -> None:
        """Count requests of this process."""
        totals = self._totals.get(tier)
        if totals is None:
            totals = self._totals[tier] = TierTotals()
        totals.num_requests += num_requests
        totals.prompt_tokens += prompt_tokens
        totals.output_tokens += output_tokens
        totals.cost_usd += cost_usd
        self._cost_all_large_usd += cost_all_large_usd

    def last(self, number: int, after: int = 0) -> list[dict[str, Any]]:
        """Newest first, at most `number`, only those with a sequence above `after`."""
        result: list[dict[str, Any]] = []
        for record in reversed(self._kept):
            if len(result) >= number or record.sequence <= after:
                break
            result.append(explained(record))
        return result

    def find(self, request_id: str) -> dict[str, Any] | None:
        for record in reversed(self._kept):
            if record.request_id == request_id:
                return explained(record)
        return None

    def records(self) -> Iterable[DecisionRecord]:
        return iter(self._kept)
