"""What routing is worth: the routed run beside all-small, all-large, random and prompt length.

Pure functions over measured answers. Random and prompt-length routing spend what the routed run
spent ("equal cost"), so that quality alone tells them apart. Random routing is given as its
expectation, not as one lucky draw.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Outcome:
    """One tier's measured answer to one question."""

    right: bool
    cost_usd: float
    ttft_s: float
    tpot_s: float | None


@dataclass(frozen=True)
class Measured:
    """One question answered by both tiers, and by the router."""

    prompt_characters: int
    small: Outcome
    large: Outcome
    routed: Outcome
    routed_large: bool


@dataclass(frozen=True)
class Summary:
    """One strategy over all questions: fractions, US dollars, milliseconds (medians)."""

    strategy: str
    num_questions: int
    quality: float
    large_share: float
    cost_usd: float
    cost_saved: float
    ttft_p50_ms: float
    tpot_p50_ms: float

    def as_dict(self) -> dict[str, float | int | str]:
        return asdict(self)


def summarize(measured: Sequence[Measured]) -> list[Summary]:
    """The five strategies in the order all-small, all-large, random, prompt length, routed.

    Raises:
        ValueError: there is nothing to summarize.
    """
    if not measured:
        raise ValueError("no question was measured; ask at least one")
    all_large_cost = sum(m.large.cost_usd for m in measured)
    budget = sum(m.routed.cost_usd for m in measured)
    random_share = _equal_cost_share(measured, budget)
    longest = _longest_first(measured, budget)
    return [
        _summary("all small", [_mix(m, 0.0) for m in measured], all_large_cost),
        _summary("all large", [_mix(m, 1.0) for m in measured], all_large_cost),
        _summary("random", [_mix(m, random_share) for m in measured], all_large_cost),
        _summary(
            "prompt length",
            [_mix(m, share) for m, share in zip(measured, longest, strict=True)],
            all_large_cost,
        ),
        _summary(
            "tandem",
            [[_Part(m.routed, 1.0, float(m.routed_large))] for m in measured],
            all_large_cost,
        ),
    ]


@dataclass(frozen=True)
class _Part:
    outcome: Outcome
    weight: float
    large: float


def _mix(question: Measured, large_share: float) -> list[_Part]:
    parts = [
        _Part(question.small, 1.0 - large_share, 0.0),
        _Part(question.large, large_share, 1.0),
    ]
    return [part for part in parts if part.weight > 0]


def _equal_cost_share(measured: Sequence[Measured], budget: float) -> float:
    small = sum(m.small.cost_usd for m in measured)
    large = sum(m.large.cost_usd for m in measured)
    if large <= small:
        return sum(m.routed_large for m in measured) / len(measured)
    return min(1.0, max(0.0, (budget - small) / (large - small)))


def _longest_first(measured: Sequence[Measured], budget: float) -> list[float]:
    """Share of the large tier per question: the longest prompts until the budget is spent."""
    shares = [0.0] * len(measured)
    spent = sum(m.small.cost_usd for m in measured)
    order = sorted(range(len(measured)), key=lambda i: -measured[i].prompt_characters)
    for i in order:
        extra = measured[i].large.cost_usd - measured[i].small.cost_usd
        if extra <= 0:
            shares[i] = 1.0
            continue
        shares[i] = min(1.0, max(0.0, (budget - spent) / extra))
        spent += shares[i] * extra
    return shares


def _summary(name: str, questions: list[list[_Part]], all_large_cost: float) -> Summary:
    parts = [part for question in questions for part in question]
    n = len(questions)
    cost = sum(p.weight * p.outcome.cost_usd for p in parts)
    return Summary(
        strategy=name,
        num_questions=n,
        quality=sum(p.weight * p.outcome.right for p in parts) / n,
        large_share=sum(p.weight * p.large for p in parts) / n,
        cost_usd=cost,
        cost_saved=1.0 - cost / all_large_cost if all_large_cost > 0 else 0.0,
        ttft_p50_ms=1e3 * _median([(p.outcome.ttft_s, p.weight) for p in parts]),
        tpot_p50_ms=1e3
        * _median([(p.outcome.tpot_s, p.weight) for p in parts if p.outcome.tpot_s is not None]),
    )


def _median(weighted: list[tuple[float, float]]) -> float:
    """Weighted median; 0 for nothing."""
    if not weighted:
        return 0.0
    if all(weight == 1.0 for _, weight in weighted):
        return statistics.median(value for value, _ in weighted)
    half = sum(weight for _, weight in weighted) / 2
    reached = 0.0
    for value, weight in sorted(weighted):
        reached += weight
        if reached >= half:
            return value
    return max(value for value, _ in weighted)
