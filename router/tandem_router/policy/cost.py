"""What an answer is expected to cost, and how likely it is to be late."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tandem_router.policy.terms import LatencySlo, RouteRequest, TierOption

_MILLION = 1e6
_MOST_USD = 1e9  # per million tokens
_MOST_TOKENS = 1e9  # beyond any context window: a length head that says so is broken


def expected_output_tokens(request: RouteRequest, tier: TierOption) -> tuple[float, float]:
    """Mean and 90 % quantile of the answer's length in tokens, for one choice.

    A predictor that knows the mean says it (`mean_tokens`: a thousand requests then cost what was
    expected); else the mean of a skewed quantity from three quantiles is Swanson's 0.3/0.4/0.3
    rule. Unusable quantiles (absent, NaN, negative) read as `tier.default_output_tokens`, with
    twice as much set aside; both are bounded by the request's `max_tokens`. Never negative, never
    NaN.
    """
    mean = _usable(tier.default_output_tokens, _MOST_TOKENS)
    high = 2.0 * mean
    score = request.score
    lengths = score.output_tokens if score is not None else None
    quantiles = lengths.get(tier.name) if lengths else None
    if quantiles is not None and len(quantiles) == 3:
        low, mid, top = sorted(float(value) for value in quantiles)
        if low >= 0.0 and top <= _MOST_TOKENS and not math.isnan(low + mid + top):
            mean, high = 0.3 * low + 0.4 * mid + 0.3 * top, top
    means: Mapping[str, float] | None = getattr(score, "mean_tokens", None)
    told = means.get(tier.name) if means else None
    if told is not None and 0.0 <= told <= _MOST_TOKENS:
        mean, high = float(told), max(high, float(told))
    if request.max_tokens is not None:
        most = request.max_tokens if request.max_tokens > 0 else 0
        if mean > most:
            mean = most
        if high > most:
            high = most
    return mean, high if high > mean else mean


def cost_usd(tier: TierOption, prompt_tokens: int, output_tokens: int) -> float:
    """Realised cost of an answer, from its usage."""
    return (
        prompt_tokens * _usable(tier.usd_per_1m_input_tokens, _MOST_USD)
        + output_tokens * _usable(tier.usd_per_1m_output_tokens, _MOST_USD)
    ) / _MILLION


def slo_miss_probability(request: RouteRequest, tier: TierOption, slo: LatencySlo) -> float:
    """Probability that TTFT or TPOT misses its target, 0..1.

    Actual latency is taken as lognormal around the prediction; a prediction or target that is
    absent counts as met. The request's own TTFT target, when stricter or looser, replaces the
    router's.
    """
    ttft_target = request.overrides.ttft_slo_s
    if ttft_target is None:
        ttft_target = slo.ttft_s
        if ttft_target is None and slo.tpot_s is None:
            return 0.0
    ttft = None if tier.ttft_s is None else max(0.0, tier.queue_wait_s) + tier.ttft_s
    met = 1.0 - _late(ttft, ttft_target, slo.log_spread)
    met *= 1.0 - _late(tier.tpot_s, slo.tpot_s, slo.log_spread)
    return 1.0 - met


def _late(predicted_s: float | None, target_s: float | None, log_spread: float) -> float:
    if predicted_s is None or target_s is None:
        return 0.0
    if math.isnan(predicted_s) or math.isnan(target_s):
        return 0.0
    if predicted_s <= 0.0:
        return 0.0
    if target_s <= 0.0 or math.isinf(predicted_s):
        return 1.0
    if math.isinf(target_s):
        return 0.0
    if not log_spread > 0.0:
        return float(predicted_s > target_s)
    # A difference of logarithms: the quotient of two extreme numbers may be 0 or infinite.
    ahead = math.log(target_s) - math.log(predicted_s)
    return 0.5 * math.erfc(ahead / (log_spread * math.sqrt(2.0)))


def usable_price(usd_per_1m: float) -> float:
    """Dollars of one token, finite and not negative: an unusable price reads as free."""
    return _usable(usd_per_1m, _MOST_USD) / _MILLION


def _usable(value: float, most: float) -> float:
    """A finite number from 0 to `most`; one that is NaN, infinite or negative counts as 0."""
    if 0.0 < value <= most:
        return value
    return min(value, most) if math.isfinite(value) and value > 0.0 else 0.0
