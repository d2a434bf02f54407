"""Routers that share a store use, together, what the limit allows and no more."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clock import Clock
from tandem_router.config import RouterConfig
from tandem_router.errors import ApiError
from tandem_router.limits.leases import SharedLimits
from tandem_router.limits.ledger import Ledger, Used
from tandem_router.store.records import StoreError
from tandem_router.store.tables import leased

TIER = {"name": "big", "served_model": "m", "kind": "external", "url": "http://p/v1"}


class Originals:
    """The store's buckets, by the clock of the test."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        self.away = False
        self.num_calls = 0

    async def lease(
        self, bucket: str, want: float, per_s: float, capacity: float, owed: float = 0.0
    ) -> float:
        if self.away:
            raise StoreError("away")
        self.num_calls += 1
        now = self._clock()
        level, at = self._buckets.get(bucket, (capacity, now))
        level = min(capacity, level + (now - at) * per_s)
        moved = leased(level, want, owed)
        self._buckets[bucket] = (min(capacity, level - moved), now)
        return moved


class Fleet:
    """Several routers over one store."""

    def __init__(self, number: int, usd_per_hour: float = 3600.0, **tenant: Any) -> None:
        self.clock = Clock()
        self.store = Originals(self.clock)
        config = RouterConfig.model_validate(
            {
                "name": "chat",
                "tiers": [TIER],
                "fallback_tier": "big",
                "replicas": number,
                "budget": {"usd_per_hour": usd_per_hour},
                "tenants": [{"name": "team", **tenant}],
            }
        )
        self._config = config
        self._spent_by_killed = 0.0
        self.ledgers = [Ledger(config, self.clock) for _ in range(number)]
        self.shared = [SharedLimits(ledger, self.clock) for ledger in self.ledgers]

    def step(self) -> None:
        async def all_of_them() -> None:
            for shared in self.shared:
                try:
                    await shared.step(self.store)  # type: ignore[arg-type]
                except StoreError:
                    shared.check()

        asyncio.run(all_of_them())

    def ask(self, router: int, usd: float) -> bool:
        """One request that holds and uses so much; whether it was served."""
        ledger = self.ledgers[router]
        try:
            hold = ledger.hold("team", 10.0)
        except ApiError:
            return False
        served = ledger.move(hold, "big", usd)
        ledger.settle(hold, Used(10.0 if served else 0.0, usd if served else 0.0))
        return served

    def kill(self, router: int) -> None:
        """It hands nothing back and tells nobody what it used; another one begins in its place."""
        budget = self.ledgers[router].budget
        assert budget is not None
        self._spent_by_killed += budget.spent
        self.ledgers[router] = Ledger(self._config, self.clock)
        self.shared[router] = SharedLimits(self.ledgers[router], self.clock)

    @property
    def spent(self) -> float:
        own = sum(ledger.budget.spent for ledger in self.ledgers if ledger.budget is not None)
        return own + self._spent_by_killed


@settings(max_examples=30, deadline=None)
@given(
    number=st.integers(1, 4),
    seed=st.integers(0, 1000),
    busy=st.floats(0.5, 30.0),
)
def test_together_they_never_use_more_than_the_budget(number: int, seed: int, busy: float) -> None:
    """A dollar a second, 300 of them may pile up; each router asks in bursts of its own."""
    fleet, rng = Fleet(number), random.Random(seed)
    fleet.step()

    for _ in range(200):
        fleet.clock.now += rng.choice([0.1, 0.5, 2.0])
        for _ in range(rng.randrange(int(busy) + 1)):
            fleet.ask(rng.randrange(number), rng.uniform(0.0, 5.0))
        if rng.random() < 0.8:
            fleet.step()
        assert fleet.spent <= 300.0 + fleet.clock.now * 1.0 + 1e-6


@settings(max_examples=30, deadline=None)
@given(number=st.integers(1, 4), seed=st.integers(0, 1000), kills=st.floats(0.0, 0.1))
def test_together_they_stay_within_it_whoever_is_killed(
    number: int, seed: int, kills: float
) -> None:
    """Whatever it had used was leased before; what it had not used is lost to all of them.

    A new router asks the store before it serves, so it has nothing by its own clock.
    """
    fleet, rng = Fleet(number), random.Random(seed)
    fleet.step()

    for _ in range(200):
        fleet.clock.now += rng.choice([0.1, 0.5, 2.0])
        for _ in range(rng.randrange(8)):
            fleet.ask(rng.randrange(number), rng.uniform(0.0, 5.0))
        if rng.random() < kills:
            fleet.kill(rng.randrange(number))
            fleet.step()
        if rng.random() < 0.8:
            fleet.step()
        assert fleet.spent <= 300.0 + fleet.clock.now * 1.0 + 1e-6


def test_after_a_kill_the_rest_have_all_that_refills() -> None:
    fleet = Fleet(3)
    fleet.step()
    for _ in range(1000):
        fleet.clock.now += 0.5
        for router in range(3):
            fleet.ask(router, 1.0)
        fleet.step()
    fleet.kill(0)
    before, began = fleet.spent, fleet.clock.now

    for _ in range(2000):
        fleet.clock.now += 0.5
        fleet.ask(1, 1.0)
        fleet.ask(2, 1.0)
        fleet.step()

    assert fleet.spent - before >= 0.9 * (fleet.clock.now - began)


def test_a_router_that_has_all_the_traffic_gets_all_of_the_budget() -> None:
    fleet = Fleet(4)
    fleet.step()

    for _ in range(2000):
        fleet.clock.now += 0.5
        fleet.ask(0, 1.0)
        fleet.ask(0, 1.0)
        fleet.step()

    # 2 dollars a second are asked for; the idle routers keep an eighth of the bucket each.
    assert fleet.spent >= 0.95 * 1000.0
    assert fleet.spent <= 300.0 + 1000.0


def test_requests_a_minute_are_shared_too() -> None:
    fleet = Fleet(3, requests_per_minute=60)
    fleet.step()
    served = 0

    for tick in range(1200):
        fleet.clock.now += 0.5
        served += fleet.ask(tick % 3, 0.0) + fleet.ask((tick + 1) % 3, 0.0)
        fleet.step()

    assert 0.9 * 600 <= served <= 60 + 600


def test_while_the_store_is_away_each_has_its_part_and_pays_afterwards() -> None:
    fleet = Fleet(2)
    fleet.step()
    for _ in range(600):
        fleet.clock.now += 0.5
        fleet.ask(0, 1.0)
        fleet.ask(1, 1.0)
        fleet.step()
    before = fleet.spent
    fleet.store.away = True

    for _ in range(240):
        fleet.clock.now += 0.5
        for router in (0, 1):
            fleet.ask(router, 1.0)
        fleet.step()
    during = fleet.spent - before
    fleet.store.away = False
    for _ in range(600):
        fleet.clock.now += 0.5
        fleet.ask(0, 1.0)
        fleet.step()

    assert during >= 0.8 * 120.0
    assert fleet.spent <= 300.0 + fleet.clock.now + 1e-6


def test_an_idle_fleet_does_not_ask_the_store() -> None:
    fleet = Fleet(2, requests_per_minute=60, tokens_per_minute=6000)
    fleet.step()
    calls = fleet.store.num_calls

    for _ in range(100):
        fleet.clock.now += 0.5
        fleet.step()

    assert fleet.store.num_calls == calls


def test_without_a_shared_store_each_router_has_its_equal_part() -> None:
    fleet = Fleet(4, requests_per_minute=40, max_concurrency=10)
    account = fleet.ledgers[0].account("team")

    assert account.requests is not None
    assert account.requests.capacity == pytest.approx(10.0)
    assert fleet.ledgers[0].budget is not None
    assert fleet.ledgers[0].budget.per_s == pytest.approx(0.25)
    holds = [fleet.ledgers[0].hold("team", 1.0) for _ in range(2)]
    with pytest.raises(ApiError, match="in flight"):
        fleet.ledgers[0].hold("team", 1.0)
    assert len(holds) == 2


def test_a_leased_budget_says_when_and_not_never() -> None:
    fleet = Fleet(2, usd_per_hour=36.0)
    fleet.step()
    ledger = fleet.ledgers[0]
    assert ledger.budget is not None
    hold = ledger.hold("team", 1.0)

    assert not ledger.move(hold, "big", ledger.budget.left(0.0) + 0.5)
    assert ledger.wait_until(hold, True, ledger.budget.left(0.0) + 0.5) == pytest.approx(50.0)


def test_a_router_that_ends_hands_back_what_it_did_not_use() -> None:
    fleet = Fleet(2)
    fleet.step()
    assert fleet.ask(0, 10.0)

    asyncio.run(fleet.shared[0].release(fleet.store))  # type: ignore[arg-type]
    asyncio.run(fleet.shared[1].release(fleet.store))  # type: ignore[arg-type]

    assert asyncio.run(fleet.store.lease("budget", 999.0, 1.0, 300.0)) == pytest.approx(290.0)
    assert not fleet.ask(0, 1.0)
