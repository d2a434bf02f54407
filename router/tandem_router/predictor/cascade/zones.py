"""Three zones: sure-small, sure-large, and a middle where the small answer is read first.

For a request with predicted qualities p_s, p_l and priced costs, each way has an expected utility:

    small:    p_s - c_s
    large:    p_l - c_l
    cascade:  E over the verifier's verdict of max(p_s|verdict, p_l|verdict - c_l) - c_s - delay

The expectation needs how well the verifier separates right from wrong answers, which is stored as
the likelihoods of a few score bins. Bayes' rule then turns any prior into a posterior per bin, so
the zones move by themselves with prices, priors and the verifier's worth: a useless verifier has
an empty middle zone. Before anything is streamed, `escalate` applies the same rule to the real
verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from tandem_router.predictor.cascade.verifier import Verdict

# Rounding must not open a middle zone: verifying has to gain this much.
_MARGIN = 1e-9


class Zone(StrEnum):
    """What to do with a request before any answer exists."""

    SMALL = "small"
    LARGE = "large"
    VERIFY = "verify"  # let the small tier answer, read the answer, then decide


@dataclass(frozen=True, slots=True)
class VerifierPower:
    """How the verifier's score falls for right and for wrong small answers, by bin."""

    given_right: tuple[float, ...]
    given_wrong: tuple[float, ...]

    @classmethod
    def measure(
        cls, scores: NDArray[np.float64], quality: NDArray[np.float64], num_bins: int = 8
    ) -> VerifierPower:
        """From held-out verifier scores (P(small right)) and measured small-tier quality.

        Bins hold equal numbers of answers; one pseudo-answer per bin and kind keeps an unseen
        combination possible.

        Raises:
            ValueError: no rows, or numbers that are not finite.
        """
        if not len(scores) or len(scores) != len(quality):
            raise ValueError(f"{len(scores)} scores and {len(quality)} qualities; give one each")
        if not (np.isfinite(scores).all() and np.isfinite(quality).all()):
            raise ValueError("a verifier score or quality is not finite")
        edges = np.quantile(scores, np.linspace(0, 1, num_bins + 1)[1:-1])
        bins = np.searchsorted(edges, scores, side="right")
        right = np.bincount(bins, quality, minlength=num_bins) + 1.0
        wrong = np.bincount(bins, 1.0 - quality, minlength=num_bins) + 1.0
        return cls(tuple(right / right.sum()), tuple(wrong / wrong.sum()))


@dataclass(frozen=True, slots=True)
class CascadeTerms:
    """Prices of one request in quality points, and whether there is time to try."""

    cost_small: float  # lambda times expected cost
    cost_large: float
    delay_penalty: float = 0.0  # what the wait for a small answer is worth, if it is escalated
    slo_slack_s: float = math.inf  # TTFT target less the large tier's predicted TTFT
    small_p95_s: float = 0.0  # 95 % quantile of the small tier's whole answer


def choose_zone(
    quality_small: float, quality_large: float, power: VerifierPower, terms: CascadeTerms
) -> Zone:
    """Best zone by expected utility; ties go to small, then large, then verify.

    Numbers that are not finite, or too little time for two answers, leave only the direct zones;
    unusable qualities mean large.
    """
    numbers = (quality_small, quality_large, terms.cost_small, terms.cost_large)
    if not all(map(math.isfinite, numbers)):
        return Zone.LARGE
    p_small = min(1.0, max(0.0, quality_small))
    direct_small = p_small - terms.cost_small
    direct_large = quality_large - terms.cost_large
    best, utility = Zone.SMALL, direct_small
    if direct_large > utility:
        best, utility = Zone.LARGE, direct_large
    if not terms.slo_slack_s > terms.small_p95_s:
        return best
    if _cascade_utility(p_small, quality_large, power, terms) > utility + _MARGIN:
        return Zone.VERIFY
    return best


def _cascade_utility(
    p_small: float, p_large: float, power: VerifierPower, terms: CascadeTerms
) -> float:
    """Expected utility of answering small, reading, and escalating where that pays.

    The large tier's quality is taken as unmoved by the verdict: given the prompt's own
    prediction, what the small answer says about the large tier is second order.
    """
    total = -terms.cost_small
    escalated = p_large - terms.cost_large - terms.delay_penalty
    for right, wrong in zip(power.given_right, power.given_wrong, strict=True):
        seen_right, seen_wrong = p_small * right, (1.0 - p_small) * wrong
        seen = seen_right + seen_wrong
        if seen > 0.0:
            total += max(seen_right, seen * escalated)
    return total


def escalate(verdict: Verdict, terms: CascadeTerms) -> bool:
    """Whether the read answer should be thrown away for a large one; ties keep it."""
    if not math.isfinite(verdict.gain):
        return True
    return verdict.gain > terms.cost_large + terms.delay_penalty


def zone_bounds(
    quality_large: float, power: VerifierPower, terms: CascadeTerms, steps: int = 200
) -> tuple[float, float]:
    """The p_small between which requests are verified, for people and plots; equal if nowhere."""
    grid: Sequence[float] = [i / steps for i in range(steps + 1)]
    inside = [p for p in grid if choose_zone(p, quality_large, power, terms) is Zone.VERIFY]
    if inside:
        return inside[0], inside[-1]
    edge = quality_large - terms.cost_large + terms.cost_small
    return edge, edge
