"""A token budget pays external answers only; workers of ours answer whatever is left in it."""

from __future__ import annotations

import random
from dataclasses import replace

from tandem_router.control import BudgetPacer, OnlineControl
from tandem_router.policy import (
    Decision,
    PlainScore,
    PolicySetPoints,
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
    pacer = BudgetPacer(usd_per_hour, 0.0, unbilled=UNBILLED)
    return OnlineControl(PolicySetPoints(), pacer=pacer)


def ask(subject: OnlineControl, now: float, request: RouteRequest = HARD) -> Decision:
    decision = decide(request, [OURS, THEIRS], subject.set_points(now))
    reservation = subject.decided(now, decision, request.prompt_tokens)
    assert reservation is not None
    subject.settle(now, reservation, decision.expected_cost_usd)
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
