"""The gain rule alone, made once for tiers and set-points as they stand, for many requests.

What most requests are, at a tenth of the cost of weighing everything: scored, nothing demanded, no
ceiling, no SLO, every tier ready and able. It says what `decide.decide_fully` says, to the bit, or
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter

from msgspec import Struct

from tandem_router.policy.held_prefix import in_proportion
from tandem_router.policy.terms import (
    BEYOND_ANY_GAIN,
    NO_OVERRIDES,
    Capabilities,
    Decision,
    PolicySetPoints,
    Reason,
    RouteRequest,
    ScoreStatus,
    TierOption,
    TierVerdict,
    finite,
)

list_price = attrgetter("list_price")
_TEXT = frozenset({"generation"})
_GAIN, _SUFFICIENT = Reason.GAIN, Reason.SUFFICIENT


class _Tier(Struct, frozen=True):
    """What of one tier is the same for every request."""

    name: str
    at: int  # its place among the tiers as they were given
    capabilities: Capabilities
    usd_in: float  # per token
    usd_out: float
    mean_tokens: float  # of an answer
    least_gain: float  # what of the threshold counts against it
    is_unbilled: bool


class GainRule:
    """See the module; `gain_rule` makes one."""

    __slots__ = ("_generate", "_most_stake", "_price_of_money", "_threshold", "_tiers", "_usual")

    def __init__(
        self,
        tiers: Sequence[_Tier],
        price_of_money: float,
        threshold: float,
        usual_saving_usd: float,
        most_stake: float,
    ) -> None:
        self._tiers = tuple(
            [
                (
                    *(t.name, t.at, t.usd_in, t.usd_out, t.mean_tokens, 2.0 * t.mean_tokens),
                    *(t.least_gain, t.is_unbilled, t),
                )
                for t in tiers
            ]
        )
        self._price_of_money = price_of_money
        self._threshold = threshold
        # Where nothing is asked for, or money has its price, the rank decides (`held_prefix`).
        self._usual = usual_saving_usd if threshold > 0.0 and not price_of_money > 0.0 else 0.0
        self._most_stake = most_stake
        self._generate = all(tier.capabilities.generation for tier in tiers)

    def decide(
        self,
        quality: Mapping[str, float],
        prompt_tokens: int,
        max_tokens: int | None,
        num_choices: int,
        features: frozenset[str],
        num_expected_uses: float,
        waits_s: Sequence[float | None],
    ) -> Decision | None:
        """None where something may be in the way.

        quality: as the predictor states it. waits_s: to the first token, by tier as given to
        `gain_rule`; None where it is not known.
        """
        if prompt_tokens < 0 or (max_tokens is not None and max_tokens < 0):
            return None
        tiers = self._tiers
        if not (self._generate and features == _TEXT):
            for *_, tier in tiers:
                for feature in features:
                    if not getattr(tier.capabilities, feature):
                        return None
        price_of_money, usual, stake = self._price_of_money, self._usual, 1.0
        if num_expected_uses > 1.0:
            price_of_money /= num_expected_uses
        verdicts = []
        best: TierVerdict | None = None
        best_utility = best_cost = cheapest_against = cheapest_cost = against = 0.0
        stated: float | None = None
        for name, at, usd_in, usd_out, mean, high, least_gain, is_unbilled, _ in tiers:
            stated = quality.get(name)
            if stated is None or not 0.0 <= stated <= 1.0:
                return None
            if max_tokens is not None:
                if max_tokens < mean:
                    mean = max_tokens
                if max_tokens < high:
                    high = max_tokens
            if num_choices > 1:
                usd_out *= num_choices
            expected = prompt_tokens * usd_in
            cost = expected + mean * usd_out
            money = 0.0 if is_unbilled or not price_of_money else price_of_money * cost
            if usual > 0.0:
                if best is None:
                    cheapest_cost = cost
                stake = in_proportion(cost - cheapest_cost, usual, self._most_stake)
                least_gain = self._threshold * stake
            against = money + least_gain
            utility = stated - against
            verdict = TierVerdict(
                name,
                stated,
                cost,
                expected + high * usd_out,
                0.0,
                waits_s[at],
                utility + money,
                utility,
                None,
            )
            if best is None:
                best, best_utility, best_cost, cheapest_against = verdict, utility, cost, against
            elif utility > best_utility or (utility == best_utility and cost < best_cost):
                best, best_utility, best_cost = verdict, utility, cost
            verdicts.append(verdict)
        cheapest = verdicts[0]
        least = cheapest.quality
        assert best is not None
        assert least is not None
        assert stated is not None
        return Decision(
            best.tier,
            _SUFFICIENT if best is cheapest else _GAIN,
            stated - least,
            against - cheapest_against,
            1.0 - least,
            best_cost,
            best.reserve_cost_usd,
            0.0,
            tuple(verdicts),
            stake=stake,
        )


def gain_rule(tiers: Sequence[TierOption], set_points: PolicySetPoints) -> GainRule | None:
    """The rule for tiers that are ready; None where more than it is to be weighed."""
    slo = set_points.slo
    if (
        len(tiers) < 2
        or set_points.budget_remaining_usd is not None
        or slo.ttft_s is not None
        or slo.tpot_s is not None
        or len({tier.name for tier in tiers}) < len(tiers)
    ):
        return None
    threshold = min(BEYOND_ANY_GAIN, max(-BEYOND_ANY_GAIN, finite(set_points.gain_threshold)))
    ordered = sorted(enumerate(tiers), key=lambda each: each[1].list_price)
    top = len(ordered) - 1
    found = []
    for rank, (at, tier) in enumerate(ordered):
        usd_in, usd_out = tier.usd_per_1m_input_tokens, tier.usd_per_1m_output_tokens
        mean = tier.default_output_tokens
        if (
            not tier.available
            or tier.max_share is not None
            or tier.capabilities.context_length is not None
            or not (0.0 <= usd_in <= 1e9 and 0.0 <= usd_out <= 1e9 and 0.0 < mean <= 1e9)
        ):
            return None
        found.append(
            _Tier(
                tier.name,
                at,
                tier.capabilities,
                usd_in / 1e6,
                usd_out / 1e6,
                mean,
                threshold * (rank / top),
                tier.name in set_points.unbilled,
            )
        )
    return GainRule(
        found,
        finite(set_points.lambda_per_usd),
        threshold,
        finite(set_points.usual_saving_usd),
        max(0.0, finite(set_points.most_stake)),
    )


def wait_s(tier: TierOption) -> float | None:
    """Predicted time to a tier's first token; None: unknown."""
    return None if tier.ttft_s is None else max(0.0, tier.queue_wait_s) + tier.ttft_s


def is_plain(request: RouteRequest) -> bool:
    """Whether the request itself asks for no more than the rule."""
    score, overrides, tenant = request.score, request.overrides, request.tenant
    return not (
        score is None
        or request.score_status is not ScoreStatus.OK
        or score.out_of_distribution
        or score.output_tokens
        or getattr(score, "mean_tokens", None)
        or request.held_tokens
        or (overrides is not NO_OVERRIDES and overrides != NO_OVERRIDES)
        or tenant.allowed_tiers is not None
        or tenant.max_cost_usd is not None
        or tenant.remaining_usd is not None
    )


def decide_plainly(
    request: RouteRequest, tiers: Sequence[TierOption], set_points: PolicySetPoints
) -> Decision | None:
    """The decision where nothing is in the way of the rule; None where something may be."""
    rule = gain_rule(tiers, set_points) if is_plain(request) else None
    if rule is None:
        return None
    assert request.score is not None
    return rule.decide(
        request.score.quality,
        request.prompt_tokens,
        request.max_tokens,
        request.num_choices,
        request.needs.features,
        request.num_expected_uses,
        [wait_s(tier) for tier in tiers],
    )
