"""The choices of a Router: Models of the cluster and services outside it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tandem_operator.resources.base import (
    Decimal,
    Fraction,
    ModelName,
    Name,
    ObjectRef,
    ProviderUrl,
    Resource,
    SecretKeyRef,
)


class ExternalCapabilities(Resource):
    """What an outside service can do; a request that needs what it cannot goes elsewhere."""

    tools: bool = Field(default=True, description="Function calling.")
    structured_output: bool = Field(
        default=True, description="response_format other than text, guided decoding."
    )
    images: bool = Field(default=True, description="Images in chat messages.")
    logprobs: bool = Field(default=True, description="Log-probabilities of tokens.")
    embeddings: bool = Field(default=False, description="/v1/embeddings.")
    generation: bool = Field(
        default=True, description="Answers with text; false for a model that only embeds."
    )
    context_length: int | None = Field(
        default=None, ge=1, description="Prompt plus answer, in tokens; not known when absent."
    )


class ExternalEndpoint(Resource):
    """An OpenAI-compatible service outside the cluster."""

    url: ProviderUrl = Field(description="Base URL up to and including /v1, http or https.")
    model: ModelName = Field(description="Model name that the service knows.")
    api_key_secret_ref: SecretKeyRef | None = Field(
        default=None, description="Secret with the API key, sent as a bearer token."
    )
    usd_per_1m_input_tokens: Decimal = Field(
        default="0", description="Price of a million prompt tokens in US dollars."
    )
    usd_per_1m_output_tokens: Decimal = Field(
        default="0", description="Price of a million output tokens in US dollars."
    )
    usd_per_1m_cached_input_tokens: Decimal | None = Field(
        default=None,
        description="Price of a million prompt tokens that the service had cached, in US dollars; "
        "as other prompt tokens when absent.",
    )
    usd_per_1m_reasoning_tokens: Decimal | None = Field(
        default=None,
        description="Price of a million reasoning tokens in US dollars; as output when absent.",
    )
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens",
        description="Name under which the service takes the bound of a chat's answer.",
    )
    capabilities: ExternalCapabilities | None = Field(
        default=None, description="What the service can do; everything when absent."
    )


class TierSpec(Resource):
    """One choice of the router, cheapest first."""

    name: Name = Field(description="Name of the tier in replies, metrics and overrides.")
    model_ref: ObjectRef | None = Field(
        default=None, description="A Model in this namespace; excludes external."
    )
    external: ExternalEndpoint | None = Field(
        default=None, description="A service outside the cluster; excludes modelRef."
    )
    max_share: Fraction | None = Field(
        default=None,
        description='Largest share of requests that may go here, a decimal string, 0 to "1".',
    )
    usd_per_1m_input_tokens: Decimal | None = Field(
        default=None,
        description="Price of a million prompt tokens in US dollars, for a tier with modelRef; "
        "derived from its price per hour when absent.",
    )
    usd_per_1m_output_tokens: Decimal | None = Field(
        default=None,
        description="Price of a million output tokens in US dollars, for a tier with modelRef.",
    )
