"""How long one worker takes, and how many workers meet an SLO with their queues.

Performance profile, as the worker reports it in `GET /v1/load`:

    prefill of a batch of prompts    a + b*sum(L) + c*sum(L^2)        seconds
    one decode step                  a + b*sum(context) + c*batch     seconds

Prefill is a queue of prompts before n servers (Allen and Cunneen's approximation of M/G/n, with
an exponential tail for the waiting time). Decode is a processor shared by its batch: by Little's
law the batch is arrivals times answer length times step time, and the step time depends on the
batch, which is a linear equation with one solution below saturation. A unified worker does both
in the same steps, so each phase slows the other (`shared_*`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

# Length, of the mean, of the answers that other requests' prompts slow down most.
SHORT_ANSWER = 0.3


@dataclass(frozen=True, slots=True)
class PerformanceProfile:
    """Fitted coefficients of one worker of a tier, seconds and tokens."""

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    kv_tokens: int  # tokens that fit into one worker's KV cache
    max_num_seqs: int = 256

    def prefill_s(self, tokens: float, tokens_squared: float | None = None) -> float:
        """Prefill time of one prompt; for a mean, give the mean of the squared lengths too."""
        a, b, c = self.prefill
        return a + b * tokens + c * (tokens * tokens if tokens_squared is None else tokens_squared)

    def step_s(self, batch: float, context: float) -> float:
        """Time of a decode step over `batch` sequences of mean length `context`."""
        a, b, c = self.decode
        return a + b * batch * context + c * batch


@dataclass(frozen=True, slots=True)
class Load:
    """Traffic of one tier."""

    requests_per_s: float
    prompt_tokens: float  # mean, uncached
    prompt_tokens_squared: float  # mean of the squares
    output_tokens: float  # mean

    def scaled(self, share: float) -> Load:
        """The same traffic at another rate."""
        return Load(
            self.requests_per_s * share,
            self.prompt_tokens,
            self.prompt_tokens_squared,
            self.output_tokens,
        )

    @property
    def usable(self) -> bool:
        """Whether every number is finite and not negative."""
        numbers = (
            self.requests_per_s,
            self.prompt_tokens,
            self.prompt_tokens_squared,
            self.output_tokens,
        )
        return all(math.isfinite(value) and value >= 0.0 for value in numbers)


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency promised; None means not promised."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    ttft_percentile: float = 95.0
    tpot_percentile: float = 95.0


def erlang_c(num_servers: int, offered: float) -> float:
    """Probability that an arrival has to wait in M/M/n; 1 at or above saturation."""
    if offered >= num_servers:
        return 1.0
    blocking = 1.0
    for servers in range(1, num_servers + 1):
        blocking = offered * blocking / (servers + offered * blocking)
    utilisation = offered / num_servers
    return blocking / (1.0 - utilisation * (1.0 - blocking))


def ttft_s(load: Load, profile: PerformanceProfile, num_workers: int, percentile: float) -> float:
    """Percentile of queue wait plus prefill, seconds; infinite at saturation.

    The wait's percentile is added to the mean service time of a prompt and to the spread of
    service, a bound rather than a convolution: long prompts that also waited are rare.
    """
    if load.requests_per_s <= 0.0:
        return profile.prefill_s(load.prompt_tokens, load.prompt_tokens_squared)
    if num_workers < 1:
        return math.inf
    mean = profile.prefill_s(load.prompt_tokens, load.prompt_tokens_squared)
    offered = load.requests_per_s * mean
    if offered >= num_workers:
        return math.inf
    spread = math.sqrt(max(0.0, load.prompt_tokens_squared - load.prompt_tokens**2))
    variation = (profile.prefill[1] * spread / mean) ** 2 if mean > 0.0 else 0.0
    tail = 1.0 - percentile / 100.0
    waits = erlang_c(num_workers, offered)
    mean_if_waiting = 0.5 * (1.0 + variation) * mean / (num_workers - offered)
    wait = mean_if_waiting * math.log(waits / tail) if waits > tail else 0.0
    return wait + mean + _normal_quantile(percentile) * profile.prefill[1] * spread


def tpot_s(load: Load, profile: PerformanceProfile, num_workers: int, percentile: float) -> float:
    """Percentile of the decode step time, seconds; infinite where batch or KV cache overflow."""
    if num_workers < 1:
        return math.inf if load.requests_per_s > 0.0 else profile.step_s(1.0, load.prompt_tokens)
    batch = mean_batch(load, profile, num_workers)
    context = load.prompt_tokens + 0.5 * load.output_tokens
    # Concurrency is close to Poisson: its percentile is what the unlucky request sees.
    high = batch + _normal_quantile(percentile) * math.sqrt(batch) if batch < math.inf else batch
    if high > profile.max_num_seqs or high * context > profile.kv_tokens:
        return math.inf
    return profile.step_s(max(1.0, high), context)


def mean_batch(load: Load, profile: PerformanceProfile, num_workers: int) -> float:
    """Mean number of sequences decoding on one of `num_workers`; infinite at saturation."""
    a, b, c = profile.decode
    tokens_per_s = load.requests_per_s / num_workers * load.output_tokens
    context = load.prompt_tokens + 0.5 * load.output_tokens
    left = 1.0 - tokens_per_s * (b * context + c)
    return tokens_per_s * a / left if left > 0.0 else math.inf


def shared_tpot_s(
    load: Load, profile: PerformanceProfile, num_workers: int, percentile: float
) -> float:
    """The same where one worker does both phases: prompts are computed in the steps that decode.

    Each step takes its constant once. A request adds its prompt's work and its answer's, so steps
    come at (1 - rate * work) / constant a second, and each gives every sequence one token. What an
    answer sees differs by the batch that it meets and by the prompts that others bring meanwhile:
    a short answer has few tokens to spread them over.
    """
    if num_workers < 1 or load.requests_per_s <= 0.0:
        return tpot_s(load, profile, num_workers, percentile)
    batch, step, _ = _shared(load, profile, num_workers)
    if math.isinf(batch):
        return math.inf
    context = load.prompt_tokens + 0.5 * load.output_tokens
    quantile = _normal_quantile(percentile)
    high = max(1.0, batch + quantile * math.sqrt(batch))
    if high > profile.max_num_seqs or high * context > profile.kv_tokens:
        return math.inf
    _, b, c = profile.decode
    rate = load.requests_per_s / num_workers
    prompts = rate * _prompt_work_s(load, profile)
    by_batch = math.sqrt(batch) * (b * context + c) / (1.0 - prompts)
    squares = profile.prefill[1] ** 2 * load.prompt_tokens_squared
    short = max(1.0, SHORT_ANSWER * load.output_tokens)
    by_prompts = math.sqrt(rate * step * squares / short)
    return step + quantile * math.hypot(by_batch, by_prompts)


def shared_ttft_s(
    load: Load, profile: PerformanceProfile, num_workers: int, percentile: float
) -> float:
    """Percentile of the TTFT where one worker does both phases: decoding slows prompts down."""
    if num_workers < 1 or load.requests_per_s <= 0.0:
        return ttft_s(load, profile, num_workers, percentile)
    batch, step, decoding = _shared(load, profile, num_workers)
    if math.isinf(batch):
        return math.inf
    a, b, c = profile.prefill
    slower = 1.0 / (1.0 - decoding)
    dilated = PerformanceProfile(
        (a, b * slower, c * slower), profile.decode, profile.kv_tokens, profile.max_num_seqs
    )
    # A prompt that arrives waits for half of the step that is under way.
    return 0.5 * step + ttft_s(load, dilated, num_workers, percentile)


def _prompt_work_s(load: Load, profile: PerformanceProfile) -> float:
    _, b, c = profile.prefill
    return b * load.prompt_tokens + c * load.prompt_tokens_squared


def _shared(
    load: Load, profile: PerformanceProfile, num_workers: int
) -> tuple[float, float, float]:
    """Mean batch, mean step (s) and share of time that decoding adds, of a unified worker."""
    _, b, c = profile.decode
    rate = load.requests_per_s / num_workers
    context = load.prompt_tokens + 0.5 * load.output_tokens
    decoding = rate * load.output_tokens * (b * context + c)
    left = 1.0 - decoding - rate * _prompt_work_s(load, profile)
    if left <= 0.0:
        return math.inf, math.inf, decoding
    step = max(profile.prefill[0], profile.decode[0]) / left
    return rate * load.output_tokens * step, step, decoding


def _normal_quantile(percentile: float) -> float:
    """Quantile of the standard normal, 0 below the median."""
    return NormalDist().inv_cdf(min(percentile / 100.0, 1.0 - 1e-12)) if percentile > 50.0 else 0.0
