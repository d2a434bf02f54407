"""What a step gives for one sequence: a token, a vector, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FailureCode = Literal["logits_not_finite", "grammar_dead_end"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's natural log-probability under the raw logits, and the likeliest alternatives."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """One drawn token."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """No token could be drawn for one sequence; the rest of the step is good.

    Attributes:
        message: A sentence for the client.
        code: Machine-readable reason, counted in the metrics.
        status: Of the reply: 400 where the request itself is at fault.
    """

    message: str
    code: FailureCode
    status: int = 500


@dataclass(frozen=True, slots=True)
class Pooled:
    """The vector of a sequence that generates nothing."""

    vector: tuple[float, ...]


Drawn = Sampled | Pooled | Failed | None
"""What a chunk gives; None until its sequence's end is reached."""
