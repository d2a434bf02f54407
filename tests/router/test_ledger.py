"""Money and tokens are held before, moved between tiers and settled once; nothing is lost."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from clock import Clock
from tandem_router.config import RouterConfig
from tandem_router.control import Bucket
from tandem_router.errors import ApiError
from tandem_router.limits.ledger import Hold, Ledger, Used

TIERS = [
    {"name": "ours", "served_model": "a"},
    {
        "name": "theirs",
        "served_model": "b",
        "kind": "external",
        "url": "http://provider/v1",
        "usd_per_1m_output_tokens": 10.0,
    },
]


def ledger(
    clock: Clock, budget: float | None = None, team_usd: float | None = None, **tenant: Any
) -> Ledger:
    config = RouterConfig.model_validate(
        {
            "name": "chat",
            "tiers": TIERS,
            "fallback_tier": "theirs",
            "budget": {"usd_per_hour": budget},
            "tenants": [{"name": "team", "usd_per_hour": team_usd, **tenant}],
        }
    )
    return Ledger(config, clock)


@given(
    st.floats(0.1, 100),
    st.lists(st.tuples(st.floats(0, 5), st.floats(0, 50)), min_size=1, max_size=60),
)
def test_a_bucket_admits_at_most_its_capacity_plus_its_rate(
    rate: float, steps: list[tuple[float, float]]
) -> None:
    now = 0.0
    bucket = Bucket(rate, rate * 3.0, now)

    admitted = 0.0
    largest = 0.0
    for wait, amount in steps:
        now += wait
        if bucket.hold(now, amount, overdraw=True):
            bucket.settle(now, amount, amount)
            admitted += amount
            largest = max(largest, amount)

    assert admitted <= rate * 3.0 + rate * now + largest + 1e-6


def test_a_bucket_says_how_long_to_wait_and_means_it() -> None:
    bucket = Bucket(2.0, 10.0, 0.0)
    assert bucket.hold(0.0, 10.0)
    bucket.settle(0.0, 10.0, 10.0)

    wait = bucket.wait_s(0.0, 4.0)

    assert wait == pytest.approx(2.0)
    assert not bucket.hold(1.9, 4.0)
    assert bucket.hold(2.0, 4.0)
    assert bucket.wait_s(2.0, 11.0) is None


def test_another_rate_keeps_what_is_spent_and_held() -> None:
    bucket = Bucket(1.0, 10.0, 0.0)
    assert bucket.hold(0.0, 3.0)
    bucket.settle(0.0, 0.0, 4.0)

    bucket.set_rate(0.0, 2.0, 5.0)

    assert (bucket.spent, bucket.held) == (4.0, 3.0)
    assert bucket.left(0.0) == pytest.approx(2.0)
    assert bucket.left(100.0) == pytest.approx(2.0)


class Bookkeeping(RuleBasedStateMachine):
    """Any sequence of holds, moves, failed attempts and settlements, at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.ledger = ledger(self.clock, 36.0, team_usd=20.0, tokens_per_minute=6000)
        self.open: list[Hold] = []
        self.used_usd = 0.0
        self.used_tokens = 0.0
        self.billed_usd = 0.0

    @rule(seconds=st.floats(0.0, 600.0))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(tokens=st.floats(0.0, 9000.0))
    def hold(self, tokens: float) -> None:
        with contextlib.suppress(ApiError):
            self.open.append(self.ledger.hold("team", tokens))

    @precondition(lambda self: self.open)
    @rule(
        data=st.data(),
        tier=st.sampled_from(["ours", "theirs"]),
        usd=st.floats(0.0, 2.0),
        tried=st.none() | st.tuples(st.floats(0.0, 100.0), st.floats(0.0, 1.0)),
    )
    def move(self, data: Any, tier: str, usd: float, tried: tuple[float, float] | None) -> None:
        hold = data.draw(st.sampled_from(self.open))
        if tried is None or hold.tier is None:
            self.ledger.move(hold, tier, usd)
            return
        self._count(hold.tier, *tried)
        self.ledger.move(hold, tier, usd, Used(*tried))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), tokens=st.floats(0.0, 100.0), usd=st.floats(0.0, 3.0))
    def settle(self, data: Any, tokens: float, usd: float) -> None:
        hold = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self._count(hold.tier, tokens, usd)
        before = hold.used
        total = self.ledger.settle(hold, Used(tokens, usd))
        assert total.usd == pytest.approx(before.usd + usd)

    def _count(self, tier: str | None, tokens: float, usd: float) -> None:
        self.used_tokens += tokens
        self.used_usd += usd
        self.billed_usd += usd if tier == "theirs" else 0.0

    @invariant()
    def held_spent_and_left_are_the_total(self) -> None:
        account, now = self.ledger.account("team"), self.clock.now
        for bucket in (account.tokens, account.usd, self.ledger.budget):
            assert bucket is not None
            total = bucket.held + bucket.spent + bucket.left(now)
            assert total == pytest.approx(bucket.granted, abs=1e-6)
            assert bucket.balance(now) <= bucket.capacity + 1e-6

    @invariant()
    def nothing_is_booked_twice_or_lost(self) -> None:
        account = self.ledger.account("team")
        assert account.usd is not None
        assert account.tokens is not None
        assert self.ledger.budget is not None
        assert account.usd.spent == pytest.approx(self.used_usd, abs=1e-6)
        assert account.tokens.spent == pytest.approx(self.used_tokens, abs=1e-6)
        assert self.ledger.budget.spent == pytest.approx(self.billed_usd, abs=1e-6)
        assert account.usd.held == pytest.approx(sum(h.usd for h in self.open), abs=1e-6)
        assert self.ledger.budget.held == pytest.approx(
            sum(h.budget_usd for h in self.open), abs=1e-6
        )
        assert account.tokens.held == pytest.approx(sum(h.tokens for h in self.open), abs=1e-6)
        assert self.ledger.num_inflight == account.num_inflight == len(self.open)


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_request_that_changes_tier_holds_the_cost_of_its_last_tier_only() -> None:
    book = ledger(Clock(), 360.0, team_usd=10.0)
    team = book.account("team")
    assert team.usd is not None
    assert book.budget is not None
    full = book.budget.left(0.0)
    hold = book.hold("team", 10.0)

    assert book.move(hold, "theirs", 4.0)
    assert book.budget.left(0.0) == pytest.approx(full - 4.0)
    assert book.move(hold, "ours", 1.0)
    assert team.usd.left(0.0) == pytest.approx(9.0)
    assert book.budget.left(0.0) == pytest.approx(full)
    book.settle(hold, Used(10.0, 0.5))

    assert team.usd.left(0.0) == pytest.approx(9.5)
    assert book.budget.spent == 0.0


def test_a_request_stays_where_it_is_when_the_budget_cannot_pay_the_other_tier() -> None:
    book = ledger(Clock(), 0.012, team_usd=10.0)
    hold = book.hold("team", 10.0)
    assert book.move(hold, "ours", 1.0)

    assert not book.move(hold, "theirs", 2.0)

    assert (hold.tier, hold.usd, hold.budget_usd) == ("ours", 1.0, 0.0)
    assert book.means(hold).tenant_usd == pytest.approx(10.0)


def test_what_a_failed_attempt_used_is_booked_even_where_the_next_cannot_be_paid() -> None:
    book = ledger(Clock(), team_usd=1.0)
    team = book.account("team")
    assert team.usd is not None
    hold = book.hold("team", 100.0)
    assert book.move(hold, "theirs", 0.6)

    assert not book.move(hold, "ours", 2.0, Used(50.0, 0.4))

    assert team.usd.spent == pytest.approx(0.4)
    assert hold.usd == pytest.approx(0.2)
    assert book.settle(hold, Used(10.0, 0.1)) == Used(60.0, 0.5)
