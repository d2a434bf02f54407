"""What a Router finds out about quality on live traffic, and who judges it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tandem_operator.resources.base import (
    Decimal,
    Duration,
    Fraction,
    ModelName,
    ProviderUrl,
    Resource,
    SecretKeyRef,
)


class Judge(Resource):
    """Who says which of two answers is good."""

    type: Literal["Exact", "Normalised", "Numeric", "Json", "External", "ExternalInCascade"] = (
        Field(
            default="External",
            description="External: a model is asked which answer is better, in both orders; "
            "ExternalInCascade: and of answers that spec.cascade reads, where its word changes "
            "what is done. The others take the last tier's answer for right and compare: the same "
            "characters, words, number or JSON value.",
        )
    )
    url: ProviderUrl | None = Field(
        default=None, description="External: base URL up to and including /v1."
    )
    model: ModelName | None = Field(
        default=None, description="External: model name that the service knows."
    )
    api_key_secret_ref: SecretKeyRef | None = Field(
        default=None, description="External: Secret with the API key, sent as a bearer token."
    )
    usd_per_1m_input_tokens: Decimal = Field(
        default="0", description="External: price of a million prompt tokens in US dollars."
    )
    usd_per_1m_output_tokens: Decimal = Field(
        default="0", description="External: price of a million output tokens in US dollars."
    )

    @property
    def is_external(self) -> bool:
        """Whether a model is asked."""
        return self.type in ("External", "ExternalInCascade")


class Learning(Resource):
    """What is found out about quality on live traffic, and what may be spent and kept for it."""

    shadow_share: Fraction = Field(
        default="0",
        description="Probability with which an answered request is answered by another tier too, "
        "unseen, and judged, a decimal string.",
    )
    daily_usd: Decimal = Field(
        default="1",
        description="Most US dollars that this may cost in a day (UTC), at list prices.",
    )
    judge: Judge | None = Field(
        default=None, description="Who judges; shadowShare above 0 needs one."
    )
    capture: Literal["None", "Features", "Prompts"] = Field(
        default="None",
        description="What a label keeps of its request. Features: hashed n-grams and numbers, "
        "which can be guessed; Prompts: the text. Predictors are trained from both.",
    )
    retention: Duration = Field(
        default="720h", description="Age at which captured features and prompts are deleted."
    )
    redact: list[Literal["Emails", "Numbers", "Urls"]] = Field(
        default_factory=list,
        max_length=3,
        description="What is taken out of a prompt before it is captured.",
    )
