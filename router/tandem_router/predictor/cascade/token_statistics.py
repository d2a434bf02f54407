"""How sure a model was of an answer's tokens, in five numbers that travel with the answer.

A worker that is asked for them (`x-tandem-token-statistics`, docs/contract.md) adds them to a
whole reply; where a server tells log-probabilities instead, they are computed from those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

NUM_LAST = 8
_DOUBTFUL = math.log(0.5)
# Below the logarithm of any probability that a 32-bit softmax tells from zero.
LEAST_LOGPROB = -50.0


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Of the natural log-probabilities that the tokens of one answer were drawn with."""

    num_tokens: int
    mean_logprob: float
    lowest_logprob: float
    doubtful_share: float  # of tokens that had less than one chance in two
    final_logprob: float  # mean of the last eight: answers end with what was asked

    @classmethod
    def of(cls, logprobs: Iterable[float]) -> TokenStatistics | None:
        """None where no token has a finite one."""
        usable = [max(LEAST_LOGPROB, value) for value in logprobs if math.isfinite(value)]
        if not usable:
            return None
        last = usable[-NUM_LAST:]
        return cls(
            len(usable),
            sum(usable) / len(usable),
            min(usable),
            sum(value < _DOUBTFUL for value in usable) / len(usable),
            sum(last) / len(last),
        )

    @classmethod
    def of_logprobs(cls, said: Any) -> TokenStatistics | None:
        """From `logprobs` of a choice, as OpenAI's two APIs give them; None for anything else."""
        if not isinstance(said, Mapping):
            return None
        values = said.get("token_logprobs")
        if values is None and isinstance(content := said.get("content"), list):
            values = [part.get("logprob") for part in content if isinstance(part, Mapping)]
        if not isinstance(values, list):
            return None
        return cls.of(
            float(value)
            for value in values
            if isinstance(value, int | float) and not isinstance(value, bool)
        )

    @classmethod
    def parse(cls, value: Any) -> TokenStatistics | None:
        """As a worker or a row of graded answers says them; None for anything else."""
        if not isinstance(value, Mapping):
            return None
        numbers = [value.get(each.name) for each in fields(cls)]
        if not all(
            isinstance(number, int | float)
            and not isinstance(number, bool)
            and math.isfinite(number)
            for number in numbers
        ):
            return None
        count, mean, lowest, doubtful, final = (float(number or 0.0) for number in numbers)
        if count < 1 or not 0.0 <= doubtful <= 1.0 or max(mean, lowest, final) > 1e-6:
            return None
        return cls(
            int(min(count, 1e9)),
            max(LEAST_LOGPROB, mean),
            max(LEAST_LOGPROB, lowest),
            doubtful,
            max(LEAST_LOGPROB, final),
        )
