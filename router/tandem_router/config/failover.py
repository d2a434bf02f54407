"""How a request is carried on when workers or providers fail, and who is left out."""

from __future__ import annotations

from pydantic import Field

from tandem_router.config.section import Fraction, Positive, Section


class OutlierConfig(Section):
    """When a worker that keeps failing requests is left out, whatever its load report says."""

    consecutive_failures: int = Field(
        default=5, ge=1, description="Failed requests in a row that eject a worker."
    )
    base_ejection_s: Positive = Field(
        default=30.0, description="First ejection; each further one lasts twice as long."
    )
    max_ejection_s: Positive = Field(default=300.0, description="Longest ejection.")
    max_ejected_share: Fraction = Field(
        default=0.5,
        description="Largest share of a tier's workers that may be out at once; one always may.",
    )


class FailoverConfig(Section):
    """How long and how often a request is carried on when workers or providers fail."""

    wait_s: Positive = Field(
        default=60.0,
        description="A request that has no answer yet this long after its arrival is refused; a "
        "stream that lost its worker waits this long for another. Longer than a worker's restart "
        "with weights in page cache.",
    )
    wake_s: Positive = Field(
        default=30.0,
        description="A request for a tier that has no worker at all, because it is scaled to zero, "
        "waits this long: as long as a worker takes to start.",
    )
    tier_wait_s: float = Field(
        default=2.0,
        ge=0.0,
        le=3600.0,
        description="A routed request whose pool has no worker waits this long for a restart, "
        "then takes another tier.",
    )
    tier_patience_s: Positive = Field(
        default=15.0,
        description="A routed request leaves an external tier that has not begun to answer after "
        "this long, where another tier may answer; a pool, whose workers report their load, "
        "after half of wait_s.",
    )
    answer_s_per_token: float = Field(
        default=0.05,
        ge=0.0,
        le=60.0,
        description="A whole reply comes at its end: each token it may have (at most 4096; 1024 "
        "where max_tokens is absent) adds this to what wait_s and a tier's patience leave it.",
    )
    max_attempts: int = Field(default=8, ge=1, description="Workers tried per request.")
    retry_share: Fraction = Field(
        default=0.2,
        description="Retries on the same tier that may await an answer at once, as a share of its "
        "requests in flight.",
    )
    min_retries: int = Field(
        default=10, ge=0, le=10_000, description="Retries that may always be under way per tier."
    )
    outliers: OutlierConfig = OutlierConfig()
    connect_timeout_s: Positive = Field(default=2.0, description="Name look-up and TCP connect.")
    stall_timeout_s: Positive = Field(
        default=120.0,
        description="No byte for this long counts as a dead worker: above the longest queue "
        "wait plus prefill, because failing over a live worker only adds load. Ten times as long "
        "for a whole reply, which sends nothing before its end.",
    )
    dead_after_s: Positive = Field(
        default=15.0,
        description="A worker without a load report for this long loses its requests to others; "
        "well above what a report takes on an overloaded machine.",
    )
    max_kept_bytes: int = Field(
        default=256 * 1024,
        ge=1024,
        description="Forwarded bytes kept per stream; beyond it they are condensed to token ids.",
    )
