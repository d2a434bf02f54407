"""What scores a prompt, and what reads an answer before it is sent."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tandem_router.config.section import Positive, Section


class RetrainingConfig(Section):
    """When the predictor is trained anew from this router's own labels."""

    every_s: Positive = Field(
        default=86_400.0, description="Least time between two trainings, seconds."
    )
    min_labels: int = Field(
        default=500, ge=50, le=100_000, description="New labels that a training needs."
    )
    by: Literal["Process", "Job"] = Field(
        default="Process",
        description="Process: a child of this router trains. Job: somebody else does, where "
        "`retraining.run` of /admin/state asks for it, and leaves the predictor in the postgres "
        "store.",
    )


class PredictorConfig(Section):
    """Which predictor scores a prompt, and what happens when it is late."""

    type: Literal["Learned", "Fixed", "Length"] = Field(
        default="Length",
        description="Learned: the artifact. Length: longer prompts are harder. Fixed: no prompt is "
        "scored, the fallback tier answers.",
    )
    artifact: str | None = Field(
        default=None,
        max_length=4096,
        description="Learned only: the file or directory that `tandem train` wrote; --predictor "
        "goes before it.",
    )
    deadline_ms: Positive = Field(
        default=20.0, description="A score later than this counts as late: fallback tier."
    )
    max_prompt_chars: int = Field(
        default=32_768, ge=256, le=1_000_000, description="Only so much of a prompt is scored."
    )
    embedding: str | None = Field(
        default=None,
        max_length=4096,
        description="Learned only: the local model directory named at `tandem train --embedding`; "
        "without it an artifact's embedding view is off.",
    )
    retraining: RetrainingConfig | None = Field(
        default=None,
        description="Learned only: train again from labels that hold prompts or features "
        "(`learning.capture`), into --retraining-dir; absent: never.",
    )
    length_midpoint_chars: Positive = Field(
        default=240.0, description="Length only: prompt length where gain reaches one half."
    )


class CascadeConfig(Section):
    """Reading the cheaper tier's answer before it is sent, where prompts alone do not decide."""

    streams: bool = Field(
        default=False,
        description="Also for requests with `stream: true`, whose first token then waits for the "
        "cheaper tier's whole answer.",
    )
    deadline_ms: Positive = Field(
        default=250.0,
        description="A verdict on an answer that is later than this does not count: the answer is "
        "sent.",
    )
    judge_timeout_s: Positive | None = Field(
        default=None,
        description="Also ask `learning.judge` (External) of an answer whose verdict its word can "
        "change, and wait so long for it at most, seconds; absent: it is not asked.",
    )
