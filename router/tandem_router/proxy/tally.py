"""What finished requests add up to: noted one by one, and counted together when somebody asks.

Metrics, totals and spend are sums that people read once in a while, and a request has its part in
twenty of them. So what ended is only noted; `fold` counts it before any of the sums is read, and
once in so many requests.
"""

from __future__ import annotations

import time
from functools import lru_cache

from msgspec import Struct

from tandem_router.openai.usage import Usage
from tandem_router.routing.decision_log import DecisionLog, DecisionRecord
from tandem_router.store.records import Spend
from tandem_router.store.writer import Store
from tandem_router.telemetry.metrics import Metrics

FOLDED_EVERY = 256


class _Sums(Struct, gc=False):
    """Of the requests of one day, tenant and tier that came out in one way."""

    num: int = 0
    prompt_tokens: int = 0  # of what was served
    output_tokens: int = 0
    cost_usd: float = 0.0
    all_large_usd: float = 0.0
    billed_prompt_tokens: int = 0  # by the tier that answered
    billed_output_tokens: int = 0
    billed_usd: float = 0.0


class Tally:
    """Of one router; all that is told of a finished request but its record and its money."""

    def __init__(self, metrics: Metrics, decisions: DecisionLog, store: Store) -> None:
        self._metrics, self._decisions, self._store = metrics, decisions, store
        self._noted: list[tuple[DecisionRecord, Usage, Usage, float]] = []
        metrics.before_read = decisions.before_read = store.before_read = self.fold

    def note(self, record: DecisionRecord, used: Usage, billed: Usage, billed_usd: float) -> None:
        """A request has ended; its record changes no more.

        used: by the attempt that ended it; billed: of that, what is not in the tier's counters yet.
        """
        self._noted.append((record, used, billed, billed_usd))
        if len(self._noted) >= FOLDED_EVERY:
            self.fold()

    def fold(self) -> None:
        """Count what was noted."""
        if not self._noted:
            return
        noted, self._noted = self._noted, []
        sums = dict[tuple[int, str, str, str, str], _Sums]()
        answered: dict[str, tuple[list[float], list[float], list[float]]] = {}
        for record, used, billed, billed_usd in noted:
            tier, status = record.tier, record.status
            label = "broke_off" if status == 200 and record.error is not None else _label(status)
            key = (int(record.time) // 86_400, record.tenant, tier, record.reason, label)
            row = sums.get(key)
            if row is None:
                row = sums[key] = _Sums()
            row.num += 1
            row.prompt_tokens += record.prompt_tokens or 0
            row.output_tokens += record.output_tokens or 0
            row.cost_usd += record.cost_usd or 0.0
            row.all_large_usd += record.cost_all_large_usd or 0.0
            row.billed_prompt_tokens += billed.prompt_tokens
            row.billed_output_tokens += billed.output_tokens
            row.billed_usd += billed_usd
            if status == 200 and record.e2e_s is not None:
                values = answered.get(tier)
                if values is None:
                    values = answered[tier] = ([], [], [])
                values[0].append(record.e2e_s)
                values[1].append(used.prompt_tokens)
                values[2].append(used.output_tokens)
        for tier, (times, prompts, outputs) in answered.items():
            bound = self._metrics.tiers[tier]
            bound.e2e.observe_all(times)
            bound.prompt_length.observe_all(prompts)
            bound.output_length.observe_all(outputs)
        for (day, tenant, tier, reason, label), row in sums.items():
            self._add(_day(day), tenant, tier, reason, label, row)

    def _add(self, day: str, tenant: str, tier: str, reason: str, label: str, row: _Sums) -> None:
        metrics, bound = self._metrics, self._metrics.tiers[tier]
        metrics.decisions[(tier, reason)].inc(row.num)
        metrics.requests[(tier, label)].inc(row.num)
        metrics.tenant_cost[(tenant,)].inc(row.cost_usd)
        metrics.cost_all_large.inc(row.all_large_usd)
        bound.prompt_tokens.inc(row.billed_prompt_tokens)
        bound.output_tokens.inc(row.billed_output_tokens)
        bound.cost.inc(row.billed_usd)
        served = (row.num, row.prompt_tokens, row.output_tokens, row.cost_usd, row.all_large_usd)
        self._decisions.finished(tier, *served)
        self._store.add_spend(Spend(day, tenant, tier, *served))


@lru_cache(maxsize=64)
def _label(status: int | None) -> str:
    return str(status)


@lru_cache(maxsize=8)
def _day(number: int) -> str:
    """The date of a day since 1970, UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime(number * 86_400))
