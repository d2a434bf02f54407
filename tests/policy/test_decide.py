"""One routing decision: the gain rule, its ceilings, and what can never happen."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tandem_router.policy import (
    Capabilities,
    LatencySlo,
    Needs,
    Overrides,
    PlainScore,
    PolicySetPoints,
    PolicyState,
    Reason,
    RouteRequest,
    ScoreStatus,
    TenantCeilings,
    TierOption,
    decide,
)
from tandem_router.policy.ceilings import granted
from tandem_router.policy.cost import expected_output_tokens
from tandem_router.policy.decide import decide_fully
from tandem_router.policy.gain_rule import decide_plainly

SMALL = TierOption("small", usd_per_1m_input_tokens=0.2, usd_per_1m_output_tokens=0.6)
LARGE = TierOption("large", usd_per_1m_input_tokens=5.0, usd_per_1m_output_tokens=15.0)
PAIR = (SMALL, LARGE)


def ask(small: float = 0.6, large: float = 0.8, **kwargs: object) -> RouteRequest:
    kwargs.setdefault("score", PlainScore({"small": small, "large": large}))
    return RouteRequest(prompt_tokens=400, **kwargs)  # type: ignore[arg-type]


def replace_tier(tier: TierOption, **changes: object) -> TierOption:
    return replace(tier, **changes)  # type: ignore[arg-type]


# The gain rule.


def test_large_is_taken_iff_the_gain_exceeds_threshold_plus_priced_cost():
    points = PolicySetPoints(lambda_per_usd=20.0, gain_threshold=0.05)

    taken = decide(ask(0.6, 0.8), PAIR, points)
    kept = decide(ask(0.6, 0.7), PAIR, points)

    assert (taken.tier, taken.reason) == ("large", Reason.GAIN)
    assert (kept.tier, kept.reason) == ("small", Reason.SUFFICIENT)
    assert taken.gain == pytest.approx(0.2)
    assert taken.threshold == pytest.approx(0.05 + 20 * (400 * 4.8 + 256 * 14.4) / 1e6)
    assert taken.difficulty == pytest.approx(0.4)


def test_an_exact_tie_goes_to_the_cheaper_tier():
    assert decide(ask(0.5, 0.5), PAIR, PolicySetPoints()).tier == "small"
    assert decide(ask(0.5, 0.75), PAIR, PolicySetPoints(gain_threshold=0.25)).tier == "small"


def test_free_tiers_tie_by_declared_order_and_still_obey_the_threshold():
    free = (TierOption("a"), TierOption("b"))
    score = PlainScore({"a": 0.5, "b": 0.7})

    assert decide(ask(score=score), free, PolicySetPoints(gain_threshold=0.3)).tier == "a"
    assert decide(ask(score=score), free, PolicySetPoints(gain_threshold=0.1)).tier == "b"


def test_an_answer_that_will_be_reused_may_cost_more():
    points = PolicySetPoints(lambda_per_usd=50.0)

    assert decide(ask(), PAIR, points).tier == "small"
    assert decide(ask(num_expected_uses=5.0), PAIR, points).tier == "large"


def test_predicted_lengths_decide_between_a_terse_and_a_verbose_tier():
    lengths = {"small": (1000.0, 2000.0, 4000.0), "large": (1.0, 2.0, 4.0)}
    score = PlainScore({"small": 0.7, "large": 0.72}, lengths)
    tiers = (SMALL, replace_tier(LARGE, usd_per_1m_input_tokens=0.3))

    assert decide(ask(score=score), tiers, PolicySetPoints(lambda_per_usd=1000.0)).tier == "large"


def test_a_queue_on_the_large_tier_moves_the_request_to_the_small_one():
    slo = LatencySlo(ttft_s=0.5, miss_penalty=0.5)
    busy = replace_tier(LARGE, queue_wait_s=5.0, ttft_s=0.1)
    idle = replace_tier(LARGE, queue_wait_s=0.0, ttft_s=0.1)
    small = replace_tier(SMALL, ttft_s=0.05)

    moved = decide(ask(), (small, busy), PolicySetPoints(slo=slo))
    stays = decide(ask(), (small, idle), PolicySetPoints(slo=slo))
    patient = decide(
        ask(overrides=Overrides(ttft_slo_s=60.0)), (small, busy), PolicySetPoints(slo=slo)
    )

    assert (moved.tier, moved.reason) == ("small", Reason.SLO)
    assert stays.tier == patient.tier == "large"


# Ceilings.


def test_a_forced_tier_is_taken_whatever_the_gain():
    decision = decide(ask(0.1, 0.9, overrides=Overrides(tier="small")), PAIR, PolicySetPoints())
    assert (decision.tier, decision.reason) == ("small", Reason.FORCED)


def test_forcing_a_tier_that_does_not_exist_names_the_ones_that_do():
    with pytest.raises(ValueError, match="'huge' does not exist; this router has small, large"):
        decide(ask(overrides=Overrides(tier="huge")), PAIR, PolicySetPoints())


def test_an_unavailable_tier_hands_over_and_a_forced_one_is_refused():
    tiers = (SMALL, replace_tier(LARGE, available=False))

    handed = decide(ask(), tiers, PolicySetPoints())
    refused = decide(ask(overrides=Overrides(tier="large")), tiers, PolicySetPoints())

    assert (handed.tier, handed.reason) == ("small", Reason.UNAVAILABLE)
    assert refused.tier is None
    assert "no ready endpoint" in refused.message


def test_nothing_available_is_a_refusal_that_lists_every_tier():
    tiers = tuple(replace_tier(tier, available=False) for tier in PAIR)

    decision = decide(ask(), tiers, PolicySetPoints())

    assert decision.tier is None
    assert decision.reason is Reason.UNAVAILABLE
    assert "small: unavailable, large: unavailable" in decision.message


def test_max_cost_takes_the_cheaper_tier_and_refuses_when_nothing_fits():
    fits = decide(ask(overrides=Overrides(max_cost_usd=0.001)), PAIR, PolicySetPoints())
    none = decide(ask(overrides=Overrides(max_cost_usd=1e-9)), PAIR, PolicySetPoints())

    assert (fits.tier, fits.reason) == ("small", Reason.MAX_COST)
    assert none.tier is None
    assert "x-tandem-max-cost-usd" in none.message


def test_a_tenant_without_money_or_right_for_large_gets_small():
    poor = decide(ask(tenant=TenantCeilings(remaining_usd=0.001)), PAIR, PolicySetPoints())
    barred = decide(
        ask(tenant=TenantCeilings(allowed_tiers=frozenset({"small"}))), PAIR, PolicySetPoints()
    )

    assert (poor.tier, poor.reason) == (barred.tier, barred.reason) == ("small", Reason.TENANT)


@pytest.mark.parametrize(
    ("on_exhausted", "tier", "queue"),
    [("downgrade", "small", False), ("queue", None, True), ("reject", None, False)],
)
def test_an_empty_budget_downgrades_queues_or_rejects(on_exhausted, tier, queue):
    points = PolicySetPoints(
        budget_remaining_usd=0.001, budget_refill_usd_per_s=0.001, on_exhausted=on_exhausted
    )

    decision = decide(ask(), PAIR, points)

    assert (decision.tier, decision.reason, decision.queue) == (tier, Reason.BUDGET, queue)
    if tier is None:
        wait = decision.retry_after_s
        assert wait == pytest.approx((400 * 5 + 512 * 15) / 1e6 / 0.001 - 1.0)


def test_max_share_holds_in_every_window_of_recent_requests():
    tiers = (SMALL, replace_tier(LARGE, max_share=0.3))
    state = PolicyState(window=50)
    chosen = []
    for _ in range(400):
        decision = decide(ask(0.1, 0.9), tiers, PolicySetPoints(), state)
        state.record(decision.tier)
        chosen.append(decision.tier == "large")

    worst = max(sum(chosen[i : i + 50]) for i in range(350))
    assert worst == 15
    assert sum(chosen) >= 100


# Without a usable score.


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (ScoreStatus.ABSENT, Reason.NO_PREDICTOR),
        (ScoreStatus.LATE, Reason.PREDICTOR_LATE),
        (ScoreStatus.FAILED, Reason.PREDICTOR_FAILED),
    ],
)
def test_no_score_means_the_fallback_tier(status, reason):
    request = ask(score=None, score_status=status)

    dearest = decide(request, PAIR, PolicySetPoints())
    named = decide(request, PAIR, PolicySetPoints(fallback_tier="small"))

    assert (dearest.tier, dearest.reason) == ("large", reason)
    assert (named.tier, named.reason) == ("small", reason)


def test_nan_qualities_mean_the_fallback_tier():
    request = ask(math.nan, 0.9)
    decision = decide(request, PAIR, PolicySetPoints())
    assert (decision.tier, decision.reason) == ("large", Reason.PREDICTOR_FAILED)
    assert decision.gain is None


def test_out_of_distribution_falls_back_to_the_large_tier():
    score = PlainScore({"small": 0.9, "large": 0.9}, out_of_distribution=True)

    fallback = decide(ask(score=score), PAIR, PolicySetPoints())

    assert (fallback.tier, fallback.reason) == ("large", Reason.OUT_OF_DISTRIBUTION)


TEXT_ONLY = Capabilities(tools=False, images=False, context_length=100)


def test_a_tier_that_cannot_is_left_out_before_the_choice():
    able = (replace_tier(SMALL, capabilities=TEXT_ONLY), LARGE)
    tools = Needs(frozenset({"tools"}))

    decision = decide(
        RouteRequest(400, PlainScore({"small": 0.9, "large": 0.9}), needs=tools),
        able,
        PolicySetPoints(),
    )

    assert (decision.tier, decision.reason) == ("large", Reason.CAPABILITY)


def test_where_no_tier_can_the_refusal_says_which_lacks_what():
    able = (
        replace_tier(SMALL, capabilities=TEXT_ONLY),
        replace_tier(LARGE, capabilities=TEXT_ONLY),
    )
    needs = Needs(frozenset({"tools"}), certain_tokens=101)

    decision = decide(RouteRequest(101, needs=needs), able, PolicySetPoints())

    assert (decision.tier, decision.reason) == (None, Reason.CAPABILITY)
    assert "tier 'small' lacks tools, room for 101 tokens" in decision.message
    assert "tier 'large' lacks tools" in decision.message


def test_an_estimated_length_chooses_a_roomier_tier_and_refuses_nobody():
    cramped = replace_tier(SMALL, capabilities=TEXT_ONLY)
    score = PlainScore({"small": 0.9, "large": 0.9})
    long = RouteRequest(400, score, needs=Needs(context_tokens=400))

    roomier = decide(long, (cramped, LARGE), PolicySetPoints())
    alone = decide(long, (cramped,), PolicySetPoints())

    assert roomier.tier == "large"
    assert alone.tier == "small"


def test_a_named_tier_that_cannot_is_refused_and_not_replaced():
    able = (replace_tier(SMALL, capabilities=TEXT_ONLY), LARGE)
    needs = Needs(frozenset({"images"}))
    request = RouteRequest(4, needs=needs, overrides=Overrides(tier="small"))

    decision = decide(request, able, PolicySetPoints())

    assert decision.tier is None
    assert decision.message.endswith("tier 'small' lacks images")


@pytest.mark.parametrize("floor", [0.7, 0.8, 0.9, 0.99])
def test_a_floor_is_of_the_dearest_tier_also_while_that_tier_is_away(floor):
    tiers = (
        TierOption("small", usd_per_1m_output_tokens=1.0),
        TierOption("middle", usd_per_1m_output_tokens=5.0),
        TierOption("large", usd_per_1m_output_tokens=20.0, available=False),
    )
    score = PlainScore({"small": 0.60, "middle": 0.65, "large": 0.90})
    request = RouteRequest(400, score, overrides=Overrides(quality=floor))

    decision = decide(request, tiers, PolicySetPoints(lambda_per_usd=1000.0))

    assert decision.tier == "middle"


# Properties.

anything = st.floats(allow_nan=True, allow_infinity=True)
quality = st.floats(0.0, 1.0)
price = st.floats(0.0, 100.0)


@st.composite
def tier_lists(draw: st.DrawFn, min_size: int = 1) -> tuple[TierOption, ...]:
    prices = draw(st.lists(st.tuples(price, price), min_size=min_size, max_size=4))
    return tuple(
        TierOption(f"t{i}", usd_per_1m_input_tokens=a, usd_per_1m_output_tokens=b)
        for i, (a, b) in enumerate(prices)
    )


@settings(max_examples=120, deadline=None)
@given(
    tiers=tier_lists(),
    qualities=st.lists(anything, min_size=4, max_size=4),
    lengths=st.lists(st.tuples(anything, anything, anything), min_size=4, max_size=4),
    numbers=st.lists(anything, min_size=10, max_size=10),
    tokens=st.integers(-5, 10**7),
)
def test_any_numbers_give_one_of_the_tiers_or_a_refusal_with_a_sentence(
    tiers, qualities, lengths, numbers, tokens
):
    score = PlainScore(
        {tier.name: q for tier, q in zip(tiers, qualities, strict=False)},
        {tier.name: triple for tier, triple in zip(tiers, lengths, strict=False)},
    )
    request = RouteRequest(
        tokens,
        score,
        overrides=Overrides(quality=numbers[0], max_cost_usd=numbers[1], ttft_slo_s=numbers[2]),
        num_expected_uses=numbers[3],
    )
    points = PolicySetPoints(
        lambda_per_usd=numbers[4],
        gain_threshold=numbers[5],
        slo=LatencySlo(ttft_s=numbers[6], tpot_s=numbers[7], miss_penalty=numbers[8]),
        budget_remaining_usd=numbers[9],
    )
    tiers = tuple(replace_tier(t, ttft_s=0.1, tpot_s=0.01, queue_wait_s=0.2) for t in tiers)

    decision = decide(request, tiers, points, PolicyState())

    assert decision.tier in {tier.name for tier in tiers} or decision.message
    assert math.isfinite(decision.expected_cost_usd)
    assert decision.expected_cost_usd >= 0
    assert decision == decide(request, tiers, points, PolicyState())


@settings(max_examples=200, deadline=None)
@given(
    tiers=tier_lists(2),
    qualities=st.lists(quality, min_size=4, max_size=4),
    points=st.builds(
        PolicySetPoints,
        lambda_per_usd=anything,
        gain_threshold=anything,
        unbilled=st.sampled_from([frozenset(), frozenset({"t0"})]),
    ),
    request=st.builds(
        RouteRequest,
        prompt_tokens=st.integers(0, 10**6),
        max_tokens=st.none() | st.integers(0, 10**6),
        num_choices=st.integers(1, 8),
        num_expected_uses=anything,
    ),
    odd=st.booleans(),
)
def test_the_short_way_to_a_decision_leads_where_the_long_one_does(
    tiers, qualities, points, request, odd
):
    score = PlainScore({t.name: q for t, q in zip(tiers, qualities, strict=False)})
    request = replace(request, score=score)
    if odd:  # what the short way leaves to the long one
        tiers = (*tiers[:-1], replace_tier(tiers[-1], available=False))

    plainly = decide_plainly(request, tiers, points)

    assert (plainly is None) == odd
    assert decide(request, tiers, points) == decide_fully(request, tiers, points)


@settings(max_examples=100, deadline=None)
@given(tiers=tier_lists(2), qualities=st.lists(quality, min_size=4, max_size=4), seed=st.randoms())
def test_the_order_of_differently_priced_tiers_does_not_matter(tiers, qualities, seed):
    if len({tier.list_price for tier in tiers}) < len(tiers):
        return
    score = PlainScore({t.name: q for t, q in zip(tiers, qualities, strict=False)})
    shuffled = list(tiers)
    seed.shuffle(shuffled)
    request, points = RouteRequest(300, score), PolicySetPoints(10.0, 0.01)

    assert decide(request, tiers, points).tier == decide(request, shuffled, points).tier


@settings(max_examples=120, deadline=None)
@given(
    tiers=tier_lists(2),
    rows=st.lists(st.lists(quality, min_size=4, max_size=4), min_size=1, max_size=8),
    lambdas=st.tuples(st.floats(0, 500), st.floats(0, 500)),
)
def test_more_budget_never_lowers_expected_quality(tiers, rows, lambdas):
    """A bigger budget is a smaller lambda; tier by tier and in sum, quality cannot fall."""

    def expected(lambda_per_usd: float) -> float:
        total = 0.0
        for row in rows:
            qualities = {t.name: q for t, q in zip(tiers, row, strict=False)}
            request = RouteRequest(500, PlainScore(qualities))
            tier = decide(request, tiers, PolicySetPoints(lambda_per_usd)).tier
            assert tier is not None
            total += qualities[tier]
        return total

    poor, rich = max(lambdas), min(lambdas)
    assert expected(rich) >= expected(poor) - 1e-9


@settings(max_examples=120, deadline=None)
@given(
    tiers=tier_lists(2),
    rows=st.lists(st.lists(quality, min_size=4, max_size=4), min_size=1, max_size=8),
    floors=st.tuples(quality, quality),
    lambda_per_usd=st.floats(0, 500),
)
def test_a_higher_floor_never_lowers_the_large_share(tiers, rows, floors, lambda_per_usd):
    dearest = max(range(len(tiers)), key=lambda i: (tiers[i].list_price, i))

    def large(floor: float) -> int:
        points = PolicySetPoints(lambda_per_usd)
        count = 0
        for row in rows:
            score = PlainScore({t.name: q for t, q in zip(tiers, row, strict=False)})
            request = RouteRequest(500, score, overrides=Overrides(quality=floor))
            count += decide(request, tiers, points).tier == tiers[dearest].name
        return count

    assert large(max(floors)) >= large(min(floors))


@settings(max_examples=100, deadline=None)
@given(
    qualities=st.tuples(quality, quality),
    thresholds=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
)
def test_a_lower_threshold_never_lowers_the_large_share(qualities, thresholds):
    def large(theta: float) -> bool:
        return decide(ask(*qualities), PAIR, PolicySetPoints(1.0, theta)).tier == "large"

    assert large(min(thresholds)) >= large(max(thresholds))


integers = st.sampled_from([-(10**12), -5, 0, 1, 7, 10**12])


@st.composite
def odd_tiers(draw: st.DrawFn) -> TierOption:
    numbers = [draw(anything) for _ in range(7)]
    return TierOption("t", draw(st.booleans()), *numbers)


@settings(max_examples=400, deadline=None)
@given(
    options=st.lists(odd_tiers(), min_size=1, max_size=3),
    counts=st.tuples(integers, st.none() | integers, integers),
    refill=anything,
    remaining=st.none() | anything,
)
def test_costs_are_finite_and_not_negative_whatever_a_tier_and_a_request_say(
    options, counts, refill, remaining
):
    tiers = [replace_tier(tier, name=f"t{i}") for i, tier in enumerate(options)]
    prompt_tokens, max_tokens, num_choices = counts
    request = RouteRequest(prompt_tokens, None, max_tokens=max_tokens, num_choices=num_choices)
    points = PolicySetPoints(
        slo=LatencySlo(ttft_s=1.0, tpot_s=0.1),
        budget_remaining_usd=remaining,
        budget_refill_usd_per_s=refill,
        on_exhausted="queue",
    )

    decision = decide(request, tiers, points, PolicyState())

    assert decision.tier is not None or decision.message
    for verdict in decision.verdicts:
        assert 0.0 <= verdict.expected_cost_usd <= verdict.reserve_cost_usd < math.inf
        assert 0.0 <= verdict.slo_miss_probability <= 1.0
    assert decision.retry_after_s is None or 0.0 <= decision.retry_after_s < math.inf


@pytest.mark.parametrize(("cap", "admitted"), [(math.nan, False), (math.inf, True), (-1.0, False)])
def test_a_senseless_share_is_a_ceiling_like_any_other(cap, admitted):
    assert PolicyState(10).admits("large", cap) is admitted


def test_a_predicted_mean_beats_the_mean_guessed_from_quantiles() -> None:
    lengths = {"large": (10.0, 20.0, 40.0)}
    guessed = RouteRequest(0, PlainScore({"large": 1.0}, lengths))
    known = RouteRequest(0, PlainScore({"large": 1.0}, lengths, mean_tokens={"large": 100.0}))

    assert expected_output_tokens(guessed, LARGE) == pytest.approx((23.0, 40.0))
    assert expected_output_tokens(known, LARGE) == pytest.approx((100.0, 100.0))


def test_a_change_of_price_moves_the_decision_without_another_predictor() -> None:
    score = PlainScore({"small": 0.6, "large": 0.8}, mean_tokens={"small": 100.0, "large": 100.0})
    worth = PolicySetPoints(lambda_per_usd=100.0)

    chosen = {
        usd: decide(
            RouteRequest(0, score),
            (SMALL, replace_tier(LARGE, usd_per_1m_output_tokens=usd)),
            worth,
        ).tier
        for usd in (1.0, 100.0)
    }

    assert chosen == {1.0: "large", 100.0: "small"}


def test_a_bound_that_money_sets_fits_into_the_tiers_context():
    """Without it a request of a team whose client sets no bound asked for more than a worker of a
    short context holds, and was refused."""
    rich = TenantCeilings(remaining_usd=1.0)
    short = replace_tier(SMALL, capabilities=Capabilities(context_length=512))

    free = granted(ask(tenant=rich), SMALL, PolicySetPoints())
    held = granted(ask(tenant=rich), short, PolicySetPoints())
    long = granted(ask(tenant=rich, most_prompt_tokens=600), short, PolicySetPoints())

    assert free.max_tokens == PolicySetPoints().max_paid_tokens
    assert held.max_tokens == 512 - 400
    assert long.max_tokens == 512 - 400  # by the likely count, where the highest leaves nothing
    assert held.reserve_usd < free.reserve_usd
