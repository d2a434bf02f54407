"""Which requests are drawn, how likely that was, and what may be spent on them; pure."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.quality.budget_share import BURST_S, SHARE, BudgetShare
from tandem_router.quality.daily_cap import DailyCap
from tandem_router.quality.shadow_gate import LEAST_OPEN_SHARE, LOOK_S, ShadowGate


def drawn(gate: ShadowGate, rng: random.Random, now: float, full: bool = False):  # type: ignore[no-untyped-def]
    return gate.draw(now, rng.random(), "small", "small", "large", full)


def test_a_request_is_drawn_with_the_share_and_says_so() -> None:
    rng, gate = random.Random(1), ShadowGate(0.1, lambda tier, exploring: None)

    draws = [draw for number in range(5000) if (draw := drawn(gate, rng, float(number)))]

    assert len(draws) == pytest.approx(500, rel=0.15)
    assert {(draw.tier, draw.share, draw.probability) for draw in draws} == {("large", 0.1, 0.1)}


def test_weights_by_the_stated_probability_make_up_for_the_times_without_shadows() -> None:
    """Closed half of the time, a label stands for twice as many requests."""
    rng, num = random.Random(2), 40_000
    now = 0.0
    gate = ShadowGate(0.2, lambda tier, exploring: "it is slow" if now % 20.0 < 10.0 else None)
    weights = []
    for number in range(num):
        now = number * 0.05
        draw = drawn(gate, rng, now)
        if draw is not None:
            weights.append(1.0 / draw.probability)

    assert sum(weights) == pytest.approx(num, rel=0.1)
    assert gate.skipped["it is slow"] == pytest.approx(num / 2, rel=0.1)


def test_why_a_tier_is_closed_is_looked_at_once_a_second() -> None:
    looks = 0

    def closed(tier: str, exploring: bool) -> str | None:
        nonlocal looks
        looks += 1
        return None

    rng, gate = random.Random(3), ShadowGate(0.5, closed)
    for number in range(1000):
        drawn(gate, rng, number * LOOK_S / 100)

    assert looks == 10


def test_where_shadows_are_hardly_ever_possible_none_is_drawn() -> None:
    """A handful of labels, each for a thousand requests, would decide everything."""
    rng, gate = random.Random(4), ShadowGate(1.0, lambda tier, exploring: None)
    for number in range(2000):
        drawn(gate, rng, float(number), full=number % 50 != 0)

    assert gate.open_share("large") < LEAST_OPEN_SHARE
    assert drawn(gate, rng, 1e6) is None


def test_one_tier_has_no_other() -> None:
    gate = ShadowGate(1.0, lambda tier, exploring: None)

    assert gate.draw(0.0, 0.0, "only", "only", "only", full=False) is None


@given(
    st.floats(0.0, 10.0),
    st.lists(st.tuples(st.floats(0.0, 5.0), st.floats(0.0, 1.0)), max_size=40),
    st.randoms(use_true_random=False),
)
def test_whatever_is_under_way_a_days_money_is_never_passed(
    cap_usd: float, jobs: list[tuple[float, float]], rng: random.Random
) -> None:
    cap, under_way = DailyCap(cap_usd), []
    for most, part in jobs:
        if cap.hold("d", most):
            under_way.append((most, part * most))
        if under_way and rng.random() < 0.5:
            cap.settle("d", *under_way.pop(rng.randrange(len(under_way))))
        assert cap.spent("d") <= cap_usd + 1e-9
    for held, used in under_way:
        cap.settle("d", held, used)

    assert cap.spent("d") <= cap_usd + 1e-9
    assert cap.left("e") == cap_usd


@given(st.lists(st.tuples(st.floats(0.0, 60.0), st.floats(0.0, 90.0), st.booleans()), max_size=60))
def test_learning_takes_its_part_of_a_budget_and_at_most_what_had_piled_up(
    requests: list[tuple[float, float, bool]],
) -> None:
    """One that looks at a tier nobody knows may borrow as much as may pile up."""
    per_s, share = 2.0, BudgetShare()
    piled, now, paid, dearest = SHARE * per_s * BURST_S, 0.0, 0.0, 0.0
    for elapsed, usd, exploring in requests:
        now += elapsed
        if not share.is_used_up(now, per_s, exploring):
            share.pay(now, per_s, usd)
            paid, dearest = paid + usd, max(dearest, usd)

    assert paid <= SHARE * per_s * now + 2.0 * piled + dearest + 1e-9


def test_no_label_is_missing_because_it_is_dear() -> None:
    rng, share = random.Random(5), BudgetShare()
    asked: dict[bool, list[bool]] = {True: [], False: []}
    for number in range(40_000):
        dear = rng.random() < 0.2
        is_open = not share.is_used_up(float(number), 1.0)
        asked[dear].append(is_open)
        if is_open and rng.random() < 0.1:
            share.pay(float(number), 1.0, 10.0 if dear else 1.0)

    dear_share, cheap_share = (sum(found) / len(found) for found in asked.values())
    assert dear_share < 0.5
    assert dear_share == pytest.approx(cheap_share, rel=0.05)


def test_where_there_is_no_budget_learning_has_no_part_of_it() -> None:
    share = BudgetShare()
    share.pay(0.0, None, 1e9)

    assert not share.is_used_up(0.0, None)
    assert not share.is_used_up(1.0, 0.001)


def test_a_senseless_bill_counts_as_what_was_held() -> None:
    cap = DailyCap(1.0)
    assert cap.hold("d", 0.4)
    cap.settle("d", 0.4, float("nan"))

    assert cap.spent("d") == 0.4
    assert not cap.hold("d", 0.7)
