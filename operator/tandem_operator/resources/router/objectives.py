"""What a Router promises and may spend: quality, latency, money."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tandem_operator.resources.base import Decimal, Duration, Fraction, Resource

# The floor of a Learned predictor that is given none; nothing measures quality without one.
DEFAULT_QUALITY_FLOOR = 0.95


class Objective(Resource):
    """What the cheapest choice must keep."""

    quality_floor: Fraction | None = Field(
        default=None,
        description="Least quality to keep, as a fraction of the last tier's quality. When absent: "
        "0.95 with a Learned predictor that has no threshold, else none. With Length only labels "
        "(learning) hold it; with Fixed, or without them, nothing does: condition FloorNotHeld "
        "says so.",
    )


class LatencyTarget(Resource):
    """A latency that a share of requests must meet."""

    percentile: int = Field(
        default=95,
        ge=50,
        le=99,
        description="Share of the last five minutes' requests that must meet it, in percent.",
    )
    target: Duration = Field(description="The latency, such as 500ms.")


class SLO(Resource):
    """Latency objectives."""

    ttft: LatencyTarget | None = Field(default=None, description="Time to first token.")
    tpot: LatencyTarget | None = Field(
        default=None, description="Time per output token after the first."
    )


class Budget(Resource):
    """What may be spent."""

    gpus: int | None = Field(
        default=None, ge=0, le=100_000, description="Most GPUs over all tiers, a count."
    )
    usd_per_hour: Decimal | None = Field(
        default=None,
        description="Most US dollars per hour, worker hours plus external tokens. Beside an "
        "external tier, workers have the price of the replicas that their Models ask for, and "
        "tokens the rest.",
    )
    on_exhausted: Literal["Downgrade", "Queue", "Reject"] = Field(
        default="Downgrade", description="What happens to requests beyond the budget."
    )
