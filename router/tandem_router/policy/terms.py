"""The words of a routing decision: what a request asks, what a tier offers, what was decided.

Everything here is a plain value. Services build these from their own state (picker, predictor,
ledger) and hand them to `decide`; the simulator and the tests build them by hand.

Values are msgspec structs: a frozen dataclass takes twenty times as long to make (4.4 against
0.2 us with nine fields), and a dozen are made for each request. Those that hold no more than
numbers, names and each other are none of the garbage collector's business (`gc=False`).

Units: costs in USD, prices in USD per million tokens, times in seconds, qualities in 0..1.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

from msgspec import Struct

#: Gains lie within -1..1: a threshold of this much means "never", its negative "always".
BEYOND_ANY_GAIN = 1.001


class Reason(StrEnum):
    """Why a tier was chosen, short enough for the `x-tandem-reason` header."""

    GAIN = "gain"  # a dearer tier is worth its price for this prompt
    SUFFICIENT = "sufficient"  # the cheapest tier is good enough
    FORCED = "forced"  # the request named the tier
    ONLY_TIER = "only-tier"  # nothing to choose: one tier is left
    QUALITY_FLOOR = "quality-floor"  # the utility's choice was below the request's floor
    SLO = "slo"  # the utility's choice would have missed the latency SLO
    MAX_SHARE = "max-share"  # the wanted tier has had its share of recent requests
    MAX_COST = "max-cost"  # the wanted tier costs more than the request allows
    TENANT = "tenant"  # the tenant may not use, or cannot pay, the wanted tier
    BUDGET = "budget"  # the budget cannot pay the wanted tier now
    VERIFIED = "verified"  # the cheaper tier's answer was read, and is good enough
    ESCALATED = "escalated"  # it was read, and a dearer tier was asked for another
    UNVERIFIED = "unverified"  # it was to be read or replaced, and could not: it is sent as it is
    ADVISE = "advise"  # routing only advises: everything goes to the fallback tier
    UNAVAILABLE = "unavailable"  # the wanted tier has no ready endpoint, or failed the request
    PREFIX = "prefix"  # the tier holds the conversation so far: moving it is not worth the price
    CAPABILITY = "capability"  # the wanted tier cannot do what the request asks
    OUT_OF_DISTRIBUTION = "out-of-distribution"  # the prompt is unlike the training data
    NO_PREDICTOR = "no-predictor"  # none configured: fallback tier
    PREDICTOR_LATE = "predictor-late"  # missed its deadline: fallback tier
    PREDICTOR_FAILED = "predictor-failed"  # broken, or its numbers are unusable: fallback tier


class ScoreStatus(StrEnum):
    """What became of the predictor for this request."""

    OK = "ok"
    ABSENT = "absent"
    LATE = "late"
    FAILED = "failed"


class Score(Protocol):
    """What a predictor says about one prompt; any object with these attributes will do."""

    @property
    def quality(self) -> Mapping[str, float]:
        """Per tier name, the probability that its answer is good."""
        ...

    @property
    def output_tokens(self) -> Mapping[str, tuple[float, float, float]] | None:
        """Per tier name, the 10, 50 and 90 % quantiles of the answer's length in tokens."""
        ...

    @property
    def out_of_distribution(self) -> bool:
        """Whether the prompt is too unlike the training data for `quality` to be believed."""
        ...


class PlainScore(Struct, frozen=True, gc=False):
    """A `Score` as a value, for callers without a predictor object."""

    quality: Mapping[str, float]
    output_tokens: Mapping[str, tuple[float, float, float]] | None = None
    out_of_distribution: bool = False
    mean_tokens: Mapping[str, float] | None = None  # expected length, whose sums are right


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a tier can do: answer with text, unless it only embeds, and what beside."""

    generation: bool = True
    tools: bool = True
    structured_output: bool = True
    images: bool = True
    logprobs: bool = True
    embeddings: bool = True
    context_length: int | None = None  # prompt plus answer, tokens; None: not known


class Needs(Struct, frozen=True, gc=False):
    """What a request asks of the tier that answers it."""

    features: frozenset[str] = frozenset()  # names of the flags of `Capabilities`
    context_tokens: int = 0  # prompt and answer, estimated: prefers a tier, refuses none
    certain_tokens: int = 0  # those that were counted: more than a tier holds cannot be served

    def unmet(self, tier: Capabilities) -> tuple[str, ...]:
        """What the tier certainly lacks, in words."""
        most = tier.context_length
        lacking = [name for name in self.features if not getattr(tier, name)]
        if not lacking and (most is None or self.certain_tokens <= most):
            return ()
        missing = [name.replace("_", " ") for name in sorted(lacking)]
        if most is not None and self.certain_tokens > most:
            missing.append(
                f"room for {self.certain_tokens} tokens (this model's maximum context length is "
                f"{most} tokens)"
            )
        return tuple(missing)

    def fits(self, tier: Capabilities) -> bool:
        """Whether prompt and answer probably fit into the tier's context."""
        return tier.context_length is None or self.context_tokens <= tier.context_length


class TierOption(Struct, frozen=True):
    """One tier as it stands at the moment of the decision."""

    name: str
    available: bool = True  # has a ready endpoint
    usd_per_1m_input_tokens: float = 0.0
    usd_per_1m_output_tokens: float = 0.0
    usd_per_1m_cached_input_tokens: float | None = None  # None: as much as others
    is_pool: bool = False  # of workers, which compute nothing of what they hold
    queue_wait_s: float = 0.0  # predicted wait before prefill starts
    ttft_s: float | None = None  # predicted TTFT without the queue wait; None: unknown, no penalty
    tpot_s: float | None = None  # predicted TPOT at the present load; None: unknown, no penalty
    max_share: float | None = None  # of recent requests, 0..1
    default_output_tokens: float = 256.0  # expected answer length where no head predicts one
    capabilities: Capabilities = Capabilities()

    @property
    def list_price(self) -> float:
        """Orders tiers from cheap to dear: input price plus output price."""
        price = self.usd_per_1m_input_tokens + self.usd_per_1m_output_tokens
        return price if price > 0.0 else 0.0


class Overrides(Struct, frozen=True):
    """What one request asks for itself (`x-tandem-*` headers, `model: <tier>`)."""

    tier: str | None = None  # force this tier
    quality: float | None = None  # floor, as a share of the dearest tier's predicted quality
    max_cost_usd: float | None = None
    ttft_slo_s: float | None = None


class TenantCeilings(Struct, frozen=True):
    """What the tenant's contract allows for this request; None means no ceiling."""

    name: str = ""
    allowed_tiers: frozenset[str] | None = None
    max_cost_usd: float | None = None  # per request
    remaining_usd: float | None = None  # left in the tenant's own budget, reservations deducted


NO_OVERRIDES = Overrides()
NO_CEILINGS = TenantCeilings()


class RouteRequest(Struct, frozen=True):
    """One request as the policy sees it: no text, only numbers."""

    prompt_tokens: int  # expected
    score: Score | None = None
    score_status: ScoreStatus = ScoreStatus.OK  # with `score=None`, OK reads as ABSENT
    max_tokens: int | None = None  # the client's bound on the answer
    num_choices: int = 1  # OpenAI `n`
    overrides: Overrides = NO_OVERRIDES
    tenant: TenantCeilings = NO_CEILINGS
    most_prompt_tokens: int = 0  # what a ceiling has to reckon with, where above the expected
    needs: Needs = Needs()
    num_expected_uses: float = 1.0  # times the answer will be served, this one included (cache)
    held_tokens: Mapping[str, float] | None = None  # of the prompt, by the tiers that have them


class LatencySlo(Struct, frozen=True):
    """Targets and what missing one is worth, in quality points (mu of the design)."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    miss_penalty: float = 0.2  # a sure miss weighs like 20 points of quality
    # Spread of actual over predicted latency, as the standard deviation of its logarithm.
    log_spread: float = 0.5


class PolicySetPoints(Struct, frozen=True):
    """The levers that online controllers (or a person) move.

    A dearer tier is taken iff gain > gain_threshold + lambda_per_usd x extra expected cost.
    """

    lambda_per_usd: float = 0.0  # quality points that one dollar is worth
    gain_threshold: float = 0.0  # quality points asked of the dearest tier over the cheapest
    fallback_tier: str | None = None  # None: the dearest
    slo: LatencySlo = LatencySlo()
    budget_remaining_usd: float | None = None  # token bucket level; None: no budget
    # What the dearest tier usually costs more than the cheapest. Where it is given, the threshold
    # is asked of each request in proportion to its own; at most `most_stake` times, there and
    # where a tier holds a prompt's beginning (`held_prefix`).
    usual_saving_usd: float = 0.0
    most_stake: float = 50.0
    budget_refill_usd_per_s: float = 0.0  # to say how long a refused request should wait
    # Tiers that are paid otherwise than by the answer: neither the budget nor its price of money
    # counts their cost.
    unbilled: frozenset[str] = frozenset()
    on_exhausted: Literal["downgrade", "queue", "reject"] = "downgrade"
    # Under a ceiling of money: answers are bounded by this where the client sets no bound, and
    # refused where not even this much can be paid.
    max_paid_tokens: int = 4096
    min_paid_tokens: int = 16


class TierVerdict(Struct, frozen=True, gc=False):
    """How one tier fared, for dashboards and logs."""

    tier: str
    quality: float | None
    expected_cost_usd: float
    reserve_cost_usd: float  # what a ledger sets aside: the longest answer that may come
    slo_miss_probability: float
    wait_s: float | None  # predicted time to its first token; None: unknown
    value: float | None  # quality net of threshold and latency, before money; None: no score
    utility: float | None  # `value` less the priced cost
    excluded: Reason | None  # the constraint that ruled it out
    held_tokens: int = 0  # of the prompt, that it need not compute again


class Decision(Struct, frozen=True, gc=False):
    """Where the request goes and why.

    `tier is None` means refuse (or, when `queue` is true, hold and ask again after
    `retry_after_s`); `reason` then names the rule and `message` says it in a sentence.
    """

    tier: str | None
    reason: Reason
    gain: float | None  # p(dearest) - p(cheapest); None without a usable score
    threshold: float | None  # what the gain was compared with
    difficulty: float | None  # 1 - p(cheapest)
    expected_cost_usd: float
    reserve_cost_usd: float
    slo_miss_probability: float
    verdicts: tuple[TierVerdict, ...]
    message: str = ""
    advised: str | None = None  # the tier that would have been taken, where routing only advises
    max_tokens: int | None = None  # to be forwarded; None: as the client said
    # How many times the threshold was asked: of what the dearest tier usually costs more.
    stake: float = 1.0
    # Refused for money: what there would have to be for a usual answer, and for a short one.
    wanted_usd: float = 0.0
    least_usd: float = 0.0
    queue: bool = False
    retry_after_s: float | None = None

    @property
    def weighed_gain(self) -> float | None:
        """The gain as if the stake were usual: what controllers set the threshold by."""
        return None if self.gain is None else weighed(self.gain, self.stake)


def weighed(gain: float, stake: float) -> float:
    """A gain as if the stake were usual; one that is had for nothing is above every threshold."""
    if stake == 1.0:
        return gain
    return min(1.0, max(-1.0, gain / stake)) if stake > 0.0 else 1.0


class PolicyState:
    """What the policy remembers between requests: recent tier shares.

    Bounded memory; `record` after each dispatched decision, `decide` only reads.

    Args:
        window: number of recent requests over which `max_share` is counted.
    """

    def __init__(self, window: int = 500) -> None:
        if window < 1:
            raise ValueError(f"window={window} must be at least 1 request")
        self.window = window
        self._recent: deque[str] = deque()
        self._num_recorded = 0
        self._counts: dict[str, int] = {}

    def record(self, tier: str) -> int:
        """Count one dispatched request; returns its place, for `move`."""
        self._num_recorded += 1
        self._recent.append(tier)
        self._counts[tier] = self._counts.get(tier, 0) + 1
        if len(self._recent) > self.window:
            self._counts[self._recent.popleft()] -= 1
        return self._num_recorded

    def move(self, place: int, tier: str) -> None:
        """Count a recorded request under another tier; nothing once it has left the window."""
        index = place - self._num_recorded + len(self._recent) - 1
        if index < 0:
            return
        self._counts[self._recent[index]] -= 1
        self._recent[index] = tier
        self._counts[tier] = self._counts.get(tier, 0) + 1

    def share(self, tier: str) -> float:
        """Share of `tier` among recent requests, 0..1; 0 before the first."""
        return self._counts.get(tier, 0) / len(self._recent) if self._recent else 0.0

    def admits(self, tier: str, max_share: float) -> bool:
        """Whether one more request keeps `tier` within `max_share` of a full window.

        Counted against the full window from the start, so that a young router does not refuse
        the tier outright, and lets at most floor(max_share x window) through in any window.
        NaN admits nothing.
        """
        if not 0.0 < max_share < 1.0:
            return max_share >= 1.0
        count = self._counts.get(tier, 0)
        if len(self._recent) == self.window and self._recent[0] == tier:
            count -= 1  # this one leaves the window when the new request enters
        return count + 1 <= math.floor(max_share * self.window + 1e-9)


def finite(value: float) -> float:
    """Within +-1e9, so that a price times a cost never overflows; NaN counts as nothing."""
    if -1e9 <= value <= 1e9:
        return value
    return min(1e9, max(-1e9, value)) if value == value else 0.0
