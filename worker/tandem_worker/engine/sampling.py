"""How a request wants its tokens drawn, as plain values that also travel to a prefill worker."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Per-sequence sampling settings; the defaults are OpenAI's.

    Attributes:
        seed: Unsigned 64 bits; with the position it decides all noise.
        num_logprobs: None for no log-probabilities, else how many alternatives to report.
        max_tokens: Generated tokens at most, resumed ones included.
        min_tokens: No end-of-answer token before this many.
        grammar: What the answer has to match, as llguidance writes it; empty for anything.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    num_logprobs: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str = ""

    @property
    def is_plain_greedy(self) -> bool:
        """Greedy, with raw logits and nothing to report: an argmax."""
        return (
            self.temperature == 0.0
            and self.num_logprobs is None
            and self.min_tokens == 0
            and not self.has_penalties
            and not self.logit_bias
            and not self.grammar
        )

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    def finish_reason(
        self, token_id: int, num_generated: int, eos_token_ids: frozenset[int]
    ) -> Literal["stop", "length"] | None:
        """Why the answer ends with this token, its ``num_generated``-th; None if it goes on.

        The engine and the replay of a resumed stream must agree on it.
        """
        if num_generated >= self.min_tokens and (
            (token_id in eos_token_ids and not self.ignore_eos) or token_id in self.stop_token_ids
        ):
            return "stop"
        return "length" if num_generated >= self.max_tokens else None

    def to_wire(self) -> dict[str, Any]:
        """JSON-ready; the ``sampling`` object of POST /internal/prefill."""
        fields = asdict(self)
        if not self.grammar:  # absent unless asked for, as older peers expect
            del fields["grammar"]
        return fields


def choice_seed(seed: int, choice: int) -> int:
    """The seed of the n-th choice of a request; choice 0 keeps the request's own.

    splitmix64 (Steele et al. 2014), so that neighbouring seeds give unrelated choices.
    """
    if choice == 0:
        return seed & _MASK64
    z = (seed + 0x9E3779B97F4A7C15 * choice) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def as_int64(value: int) -> int:
    """An unsigned 64-bit seed as the signed number a tensor can hold."""
    value &= _MASK64
    return value - (1 << 64) if value >= 1 << 63 else value
