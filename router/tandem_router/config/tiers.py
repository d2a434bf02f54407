"""What can answer: pools of our workers and external endpoints, with their prices."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tandem_router.config.section import Fraction, Name, Section, Usd


class CapabilitiesConfig(Section):
    """What an external tier can do; a request that needs what it cannot goes elsewhere."""

    tools: bool = Field(default=True, description="Function calling: `tools`, `functions`.")
    structured_output: bool = Field(
        default=True, description="`response_format` other than text, guided decoding."
    )
    images: bool = Field(default=True, description="Image parts in chat messages.")
    logprobs: bool = Field(default=True, description="Log-probabilities of tokens.")
    embeddings: bool = Field(default=False, description="/v1/embeddings.")
    generation: bool = Field(
        default=True, description="Answers with text; false for a model that only embeds."
    )
    context_length: int | None = Field(
        default=None, ge=1, description="Prompt plus answer, tokens; absent: not known."
    )


class TierConfig(Section):
    """One model that can answer: a pool of our workers or an external endpoint."""

    name: Name = Field(description="Name of the tier; `model: <name>` in a request forces it.")
    served_model: Name = Field(
        description="Model name that the workers serve; `model: <served_model>` forces the tier "
        "too, and replies carry it."
    )
    kind: Literal["pool", "external"] = Field(
        default="pool",
        description="pool: our workers, found through the endpoints; external: an "
        "OpenAI-compatible server at `url`.",
    )
    engine: Literal["Tandem", "VLLM", "OpenAI"] = Field(
        default="Tandem",
        description="Pool only: what its workers are, so how they are asked and what they tell.",
    )
    engine_order: Literal["None", "Arrival", "Length", "Deadline"] = Field(
        default="None",
        description="What an engine that orders its queue by a number is given: None: nothing; "
        "Arrival: whose turn it is among tenants, the first to arrive first in each turn; Length: "
        "expected tokens of the answer, few first; Deadline: the first token's, early first. A "
        "client's x-tandem-priority goes before any.",
    )
    url: str | None = Field(
        default=None,
        max_length=2048,
        pattern=r"^https?://[^\s?#]+$",
        description="External tier only: base URL up to and including /v1.",
    )
    api_key_file: str | None = Field(
        default=None,
        max_length=4096,
        description="External tier only: file with the bearer token to send; read once.",
    )
    capabilities: CapabilitiesConfig | None = Field(
        default=None,
        description="External tier only: what it can do; absent: everything. Workers report it.",
    )
    usd_per_1m_input_tokens: Usd = Field(
        default=0.0, description="Price of one million prompt tokens, US dollars."
    )
    usd_per_1m_output_tokens: Usd = Field(
        default=0.0, description="Price of one million generated tokens, US dollars."
    )
    token_prices: Literal["Listed", "Measured", "Nominal", "None"] = Field(
        default="Listed",
        description="Where the prices are from; the page says of Nominal ones that nothing "
        "measured them, and of None that the tier counts as free.",
    )
    usd_per_1m_cached_input_tokens: Usd | None = Field(
        default=None,
        description="Price of one million prompt tokens that the provider had cached, as its "
        "usage says; absent: as other prompt tokens.",
    )
    usd_per_1m_reasoning_tokens: Usd | None = Field(
        default=None,
        description="Price of one million reasoning tokens, as usage says; absent: as output.",
    )
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens",
        description="External tier only: the name under which a chat's bound on the answer is "
        "forwarded where the client named none. A provider that does not know the name must "
        "refuse it: one that ignores it would be paid without bound.",
    )
    max_share: Fraction | None = Field(
        default=None,
        description="Largest share of routed requests this tier may take; absent: no limit.",
    )

    @model_validator(mode="after")
    def _external_has_url(self) -> Self:
        if (self.kind == "external") != (self.url is not None):
            raise ValueError(
                f"tier {self.name!r}: `url` belongs to kind external and only there; "
                f"kind is {self.kind!r}"
            )
        if self.kind == "external" and (self.engine, self.engine_order) != ("Tandem", "None"):
            raise ValueError(
                f"tier {self.name!r}: `engine` and `engine_order` belong to kind pool; a provider "
                "has neither"
            )
        if self.kind == "pool" and self.capabilities is not None:
            raise ValueError(
                f"tier {self.name!r}: `capabilities` belongs to kind external; workers report "
                "theirs with their load"
            )
        return self
