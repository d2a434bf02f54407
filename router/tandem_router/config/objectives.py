"""What is promised and what may be spent: quality, latency, money."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tandem_router.config.section import Fraction, Positive, Section, Usd


class ObjectiveConfig(Section):
    """What the cheapest choice must keep."""

    quality_floor: Fraction | None = Field(
        default=None,
        description="Smallest acceptable mean quality, as a fraction of the dearest tier's; "
        "a learned predictor's threshold is chosen to hold it, and `threshold` clipped to that.",
    )


class SloConfig(Section):
    """Latency promised to clients."""

    ttft_ms: Positive | None = Field(default=None, description="Time to first token, ms.")
    tpot_ms: Positive | None = Field(default=None, description="Time per output token, ms.")
    ttft_percentile: float = Field(
        default=95.0, gt=0.0, lt=100.0, description="Requests that must meet ttft_ms, percent."
    )
    tpot_percentile: float = Field(
        default=95.0, gt=0.0, lt=100.0, description="Requests that must meet tpot_ms, percent."
    )


class BudgetConfig(Section):
    """Money."""

    usd_per_hour: Usd | None = Field(
        default=None,
        description="What this process may spend on answers of external tiers, $/h; workers are "
        "paid by the hour and held within the budget by the operator. 0: they use all of it.",
    )
    on_exhausted: Literal["Downgrade", "Queue", "Reject"] = Field(
        default="Downgrade",
        description="Downgrade: cheapest tier; Queue: wait for budget; Reject: 429.",
    )
    max_paid_tokens: int = Field(
        default=4096,
        ge=1,
        le=10_000_000,
        description="Under any ceiling of money an answer has a bound, because a price has. This "
        "is it where the client sets none: forwarded as `max_tokens`, and held until the answer "
        "ends.",
    )
    min_paid_tokens: int = Field(
        default=16,
        ge=1,
        le=1_000_000,
        description="A ceiling that pays only part of an answer shortens it; one that does not "
        "pay this many tokens refuses the request.",
    )
