"""A token budget pays external answers only; workers of ours answer whatever is left in it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tandem_router.control import BudgetPacer, OnlineControl, ShareTracker, budget_bucket
from tandem_router.policy import (
    Decision,
    PlainScore,
    PolicySetPoints,
    PolicyState,
    RouteRequest,
    TierOption,
    decide,
)

OURS = TierOption("small", usd_per_1m_input_tokens=1.0, usd_per_1m_output_tokens=4.0)
THEIRS = TierOption("large", usd_per_1m_input_tokens=5.0, usd_per_1m_output_tokens=15.0)
LENGTHS = {"small": (300, 500, 700), "large": (300, 500, 700)}
HARD = RouteRequest(prompt_tokens=1000, score=PlainScore({"small": 0.2, "large": 0.9}, LENGTHS))
UNBILLED = frozenset({"small"})


def control(usd_per_hour: float) -> OnlineControl:
    pacer = BudgetPacer(budget_bucket(usd_per_hour, 0.0), 0.0, unbilled=UNBILLED)
    return OnlineControl(PolicySetPoints(), pacer=pacer)


def ask(subject: OnlineControl, now: float, request: RouteRequest = HARD) -> Decision:
    decision = decide(request, [OURS, THEIRS], subject.set_points(now))
    assert decision.tier is not None
    assert subject.pacer is not None
    billed = decision.tier not in UNBILLED
    held = decision.reserve_cost_usd if billed else 0.0
    assert subject.pacer.bucket.hold(now, held)
    subject.decided(now, decision, request.prompt_tokens)
    subject.pacer.bucket.settle(now, held, decision.expected_cost_usd if billed else 0.0)
    subject.answered(decision.tier, decision.expected_cost_usd, decision.expected_cost_usd)
    return decision


def test_an_empty_budget_leaves_our_own_workers() -> None:
    """What they answer is paid by the hour: the ledger neither excludes nor charges it."""
    subject = control(usd_per_hour=0.01)

    decisions = [ask(subject, 0.001 * i) for i in range(200)]

    assert {d.tier for d in decisions} == {"small"}
    pacer = subject.pacer
    assert pacer is not None
    assert pacer.remaining_usd(0.2) >= 0.0


def test_a_budget_that_pays_for_all_binds_nothing() -> None:
    subject = control(usd_per_hour=1000.0)

    assert {ask(subject, 10.0 * i).tier for i in range(50)} == {"large"}


def test_answers_of_our_workers_do_not_use_up_the_budget() -> None:
    subject = control(usd_per_hour=3.0)
    pacer = subject.pacer
    assert pacer is not None
    easy = replace(HARD, score=PlainScore({"small": 0.9, "large": 0.9}))
    before = pacer.remaining_usd(1.0)

    for i in range(500):
        assert ask(subject, 1.0 + i / 1e6, easy).tier == "small"

    assert pacer.remaining_usd(1.1) >= before


def test_external_spend_keeps_to_the_budget_while_workers_take_the_rest() -> None:
    subject = control(usd_per_hour=3.6)
    rng = random.Random(1)
    spent, tiers = 0.0, []
    for second in range(3600):
        quality = {"small": rng.uniform(0.2, 0.9), "large": 0.9}
        request = replace(HARD, score=PlainScore(quality, LENGTHS))
        decision = ask(subject, float(second), request)
        tiers.append(decision.tier)
        spent += decision.expected_cost_usd if decision.tier == "large" else 0.0

    assert set(tiers) == {"small", "large"}
    assert 0.7 * 3.6 <= spent <= 1.1 * 3.6


@given(st.lists(st.booleans(), max_size=30), st.lists(st.booleans(), max_size=30))
def test_a_moved_request_weighs_in_the_share_like_one_that_was_served_there(
    before: list[bool], after: list[bool]
) -> None:
    moved, direct = (ShareTracker(0.5, slack=100.0) for _ in range(2))
    for took_dearest, served_dearest in zip(before, after, strict=False):
        moved.observe(0.3, took_dearest)
        if took_dearest != served_dearest:
            moved.move(served_dearest)
        direct.observe(0.3, served_dearest)

    assert moved.threshold == pytest.approx(direct.threshold)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("ab")), max_size=20))
def test_recent_shares_are_those_of_the_tiers_that_served(pairs: list[tuple[str, str]]) -> None:
    moved, direct = (PolicyState(window=7) for _ in range(2))
    places = [moved.record(decided) for decided, _ in pairs]
    for place, (_, served) in zip(places, pairs, strict=True):
        moved.move(place, served)
        direct.record(served)

    for tier in "ab":
        assert moved.share(tier) == direct.share(tier)
