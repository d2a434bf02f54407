"""What is found out about quality on live traffic: second answers, their judge, labels."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tandem_router.config.section import Fraction, Positive, Section, Usd


class JudgeConfig(Section):
    """Who says which of two answers is good."""

    type: Literal["Exact", "Normalised", "Numeric", "Json", "External"] = Field(
        default="External",
        description="External: a model at `url` is asked which answer is better, in both orders. "
        "The others take the dearest tier's answer for right and compare: the same characters, "
        "words, number or JSON value.",
    )
    url: str | None = Field(
        default=None,
        max_length=2048,
        pattern=r"^https?://[^\s?#]+$",
        description="External only: base URL up to and including /v1.",
    )
    model: str | None = Field(
        default=None, max_length=253, description="External only: model name that the URL knows."
    )
    api_key_file: str | None = Field(
        default=None, max_length=4096, description="External only: file with the bearer token."
    )
    usd_per_1m_input_tokens: Usd = Field(
        default=0.0, description="External only: price of one million prompt tokens, US dollars."
    )
    usd_per_1m_output_tokens: Usd = Field(
        default=0.0, description="External only: price of one million output tokens, US dollars."
    )
    timeout_s: Positive = Field(
        default=30.0, description="External only: a verdict that takes longer is given up."
    )

    @model_validator(mode="after")
    def _external_has_a_model(self) -> Self:
        if self.type == "External" and (self.url is None or self.model is None):
            raise ValueError("a judge of type External needs `url` and `model`")
        if self.type != "External":
            given = sorted(self.model_fields_set - {"type"})
            if given:
                raise ValueError(f"`{given[0]}` belongs to a judge of type External only")
        return self


class LearningConfig(Section):
    """What is found out about quality on live traffic, and what may be spent and kept for it."""

    shadow_share: Fraction = Field(
        default=0.0,
        description="Probability with which an answered request is answered by another tier too, "
        "unseen, and judged; 0: never.",
    )
    daily_usd: Usd = Field(
        default=1.0,
        description="Most that shadow answers and their judge may cost in a day (UTC), over all "
        "replicas, US dollars at list prices.",
    )
    judge: JudgeConfig | None = Field(
        default=None, description="Who judges; `shadow_share` needs one."
    )
    capture: Literal["None", "Features", "Prompts"] = Field(
        default="None",
        description="What a label keeps of its request. Features: hashed n-grams and hand features "
        "(hashes can be guessed); Prompts: the text.",
    )
    retention_days: Positive = Field(
        default=30.0, description="Captured prompts and features are deleted after it."
    )
    redact: tuple[Literal["Emails", "Numbers", "Urls"], ...] = Field(
        default=(), description="What is taken out of a prompt before it is captured."
    )

    @model_validator(mode="after")
    def _shadows_are_judged(self) -> Self:
        if self.shadow_share > 0.0 and self.judge is None:
            raise ValueError("shadow_share needs a `judge`: an unjudged second answer says nothing")
        return self
