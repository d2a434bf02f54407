"""What a Router tells of itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tandem_operator.resources.base import (
    Condition,
    Decimal,
    Duration,
    LabelValue,
    Name,
    Resource,
    ShortText,
    Text,
)

#: As many steps as a router keeps (`control/promotion.py`).
CHANGES_KEPT = 20


class TierStatus(Resource):
    """What one tier does."""

    name: Name = Field(description="Name of the tier.")
    ready: bool = Field(default=False, description="Whether it can answer.")
    share: Decimal | None = Field(default=None, description="Share of requests, 0 to 1.")
    ttft: Duration | None = Field(
        default=None,
        description="Time to first token of the last five minutes, at the percentile of slo.ttft "
        "or 95.",
    )
    tpot: Duration | None = Field(
        default=None,
        description="Time per output token of the last five minutes, at the percentile of "
        "slo.tpot or 95.",
    )
    usd_per_hour: Decimal | None = Field(
        default=None, description="US dollars per hour of its Model's wanted workers."
    )
    token_prices: Literal["Listed", "Measured", "Nominal", "None"] | None = Field(
        default=None,
        description="Where its prices per token are from: Listed in spec; Measured: its Model's "
        "price per hour at the speed that its workers report; Nominal: the same at 1,000 tokens a "
        "second, which nothing measured; None: it counts as free, and so do savings.",
    )
    usd_per_1m_input_tokens: Decimal | None = Field(
        default=None, description="Measured price of one million prompt tokens, US dollars."
    )
    usd_per_1m_output_tokens: Decimal | None = Field(
        default=None, description="Measured price of one million output tokens, US dollars."
    )


class PredictorStatus(Resource):
    """The predictor in use."""

    version: ShortText | None = Field(default=None, description="Version of the artifact.")
    threshold: ShortText | None = Field(
        default=None, description="Predicted gain above which the larger tier is taken now."
    )
    quality_ratio: ShortText | None = Field(
        default=None,
        description="Quality that it expects of the last 500 answers, as a fraction of what it "
        "expects had the last tier given them all.",
    )
    baseline_quality_ratio: ShortText | None = Field(
        default=None,
        description="The same for content-blind routing at equal cost: as many requests for each "
        "tier, whatever is in them.",
    )
    candidate: ShortText | None = Field(
        default=None, description="Version of the one trained from labels that is compared now."
    )
    comparison: Text | None = Field(
        default=None,
        description="What new labels say so far of it, or of the one it replaced; why none is "
        "trained from them now.",
    )
    changes: list[Text] = Field(
        default_factory=list,
        max_length=CHANGES_KEPT,
        description="The last trainings, promotions, rejections and returns, oldest first: when, "
        "of which version, and why.",
    )


class QualityStatus(Resource):
    """What labels say of the quality that was delivered."""

    measured: ShortText | None = Field(
        default=None,
        description="Quality delivered, as a fraction of the last tier's; absent with too few "
        "labels.",
    )
    interval: ShortText | None = Field(
        default=None,
        description="Where it lies with 95 % certainty, at any time, such as 0.93-0.97.",
    )
    labels: int = Field(
        default=0, ge=0, description="Requests of which two answers were judged, a count."
    )
    since: ShortText | None = Field(
        default=None, description="Time of the first of these labels, RFC 3339, UTC."
    )
    cost_usd: Decimal | None = Field(
        default=None, description="US dollars spent on second answers and their judge so far."
    )


class ScalingDecision(Resource):
    """One step of the control loop."""

    time: ShortText = Field(description="When, RFC 3339, UTC.")
    pool: ShortText = Field(description="WorkerPool, or threshold.")
    before: ShortText = Field(description="Value before.")
    after: ShortText = Field(description="Value after.")
    reason: Text = Field(description="Why.")


class RouterStatus(Resource):
    """What a Router is, as last observed."""

    observed_generation: int | None = Field(
        default=None, ge=0, description="metadata.generation this status was computed from."
    )
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="Accepted, ModelsResolved, PredictorReady, SLOMet, WithinBudget, Durable and "
        "Ready; with a cascade CascadeReady; with a gateway GatewayReady; where the chart makes "
        "HTTPRoutes RouteReady; with a floor FloorHeld; with learning Learning and QualityProven; "
        "where they hold, also FloorNotHeld and QualityDrifted.",
    )
    endpoint: LabelValue | None = Field(default=None, description="Base URL for clients.")
    ready: ShortText | None = Field(
        default=None, description="Ready and wanted router pods, such as 1/1."
    )
    tiers: list[TierStatus] = Field(
        default_factory=list, max_length=8, description="What each tier does, in spec's order."
    )
    predictor: PredictorStatus | None = Field(default=None, description="The predictor in use.")
    quality: QualityStatus | None = Field(
        default=None, description="What labels say of the quality that was delivered."
    )
    decisions: list[ScalingDecision] = Field(
        default_factory=list, max_length=10, description="The last scaling decisions."
    )
    gpus: int | None = Field(
        default=None, ge=0, description="GPUs that the pods of all tiers hold or wait for, a count."
    )
    usd_per_hour: Decimal | None = Field(
        default=None, description="US dollars per hour of all tiers."
    )
    message: Text | None = Field(default=None, description="Ready's message, for one-line views.")
