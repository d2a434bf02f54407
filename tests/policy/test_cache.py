"""The response cache: capacity, tenants, tier demand, worth."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tandem_router.cache import (
    ENTRY_OVERHEAD_BYTES,
    CachedAnswer,
    Demand,
    Eviction,
    FrequencySketch,
    ResponseCache,
    cache_key,
    worth_upgrading,
)

SALT = b"0123456789abcdef"
BODY = {"model": "chat", "messages": [{"role": "user", "content": "2+2?"}], "temperature": 0}


def key(number: int) -> bytes:
    found = cache_key(SALT, "", {"prompt": number, "temperature": 0})
    assert found is not None
    return found


def answer(tier: str = "small", cost: float = 1.0, size: int = 100, at: float = 0.0):
    return CachedAnswer(b"x" * size, tier, int(tier == "large"), cost, at)


def room_for(count: int, size: int = 100) -> int:
    return count * (size + ENTRY_OVERHEAD_BYTES)


# Keys.


def test_the_same_question_has_one_key_however_it_is_written_and_delivered():
    spelled = dict(reversed(BODY.items())) | {"stream": True, "user": "someone"}
    assert cache_key(SALT, "a", BODY) == cache_key(SALT, "a", spelled)


@settings(max_examples=100, deadline=None)
@given(
    tenants=st.tuples(st.text(max_size=20), st.text(max_size=20)),
    contents=st.tuples(st.text(max_size=40), st.text(max_size=40)),
)
def test_keys_agree_only_for_the_same_tenant_and_content(tenants, contents):
    first, second = (
        cache_key(SALT, tenant, {"prompt": content, "temperature": 0})
        for tenant, content in zip(tenants, contents, strict=True)
    )
    same = tenants[0] == tenants[1] and contents[0] == contents[1]
    surrogate = any("\ud800" <= c <= "\udfff" for c in "".join((*tenants, *contents)))
    assert (first == second) == same or surrogate


def test_another_salt_gives_another_key():
    assert cache_key(SALT, "a", BODY) != cache_key(b"fedcba9876543210", "a", BODY)


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.7}, {"temperature": None}, {"n": 2}, {"prompt": math.nan}],
)
def test_answers_that_would_differ_the_next_time_have_no_key(change):
    assert cache_key(SALT, "a", BODY | change) is None


def test_a_seeded_sample_is_repeatable_and_may_be_kept():
    assert cache_key(SALT, "a", BODY | {"temperature": 0.7, "seed": 1}) is not None


def test_a_short_salt_is_refused():
    with pytest.raises(ValueError, match="4 bytes"):
        cache_key(b"abcd", "a", BODY)


# Demand.


def test_a_small_answer_never_serves_a_request_that_demands_large():
    cache = ResponseCache(10_000)
    cache.put(key(1), answer("small"))

    assert cache.get(key(1), 0.0, Demand(min_rank=1)) is None
    assert cache.get(key(1), 0.0, Demand(exact_tier="large")) is None
    assert cache.get(key(1), 0.0, Demand()) is not None


def test_a_large_answer_serves_both_and_is_not_replaced_by_a_small_one():
    cache = ResponseCache(10_000)
    cache.put(key(1), answer("large"))

    assert not cache.put(key(1), answer("small"))
    assert cache.get(key(1), 0.0, Demand()).tier == "large"
    assert cache.get(key(1), 0.0, Demand(exact_tier="small")) is None


def test_a_large_answer_replaces_a_small_one():
    cache = ResponseCache(10_000)
    cache.put(key(1), answer("small"))
    assert cache.put(key(1), answer("large"))
    assert cache.get(key(1), 0.0, Demand(min_rank=1)).tier == "large"
    assert len(cache) == 1


# Worth.


@pytest.mark.parametrize("eviction", [Eviction.LEC, Eviction.GDSF])
def test_what_was_dear_and_is_asked_for_often_stays(eviction):
    cache = ResponseCache(room_for(2), eviction=eviction)
    for number, (asked, cost) in enumerate([(1, 1.0), (5, 1.0), (1, 9.0)]):
        for _ in range(asked):
            cache.get(key(number), 0.0)
        cache.put(key(number), answer(cost=cost))

    kept = {number for number in range(3) if cache.get(key(number), 0.0)}
    assert kept == {1, 2}


def test_a_bulky_answer_does_not_push_out_many_useful_ones():
    cache = ResponseCache(room_for(10), eviction=Eviction.LEC)
    for number in range(10):
        cache.get(key(number), 0.0)
        cache.put(key(number), answer(cost=1.0))
    cache.get(key(99), 0.0)

    assert not cache.put(key(99), answer(cost=2.0, size=2000))
    assert len(cache) == 10


def test_gdsf_lets_go_of_fame_that_is_over_and_lec_does_not():
    def survivors(eviction: Eviction) -> bool:
        cache = ResponseCache(room_for(4), eviction=eviction, admission=False)
        for _ in range(20):
            cache.get(key(0), 0.0)
        cache.put(key(0), answer(cost=1.0))
        for number in range(1, 200):
            for _ in range(3):
                cache.get(key(number), 0.0)
            cache.put(key(number), answer(cost=1.0))
        return cache.get(key(0), 0.0) is not None

    assert survivors(Eviction.LEC)
    assert not survivors(Eviction.GDSF)


def test_expired_answers_are_not_served_and_free_their_bytes():
    cache = ResponseCache(10_000, ttl_s=60.0)
    cache.put(key(1), answer(at=0.0))
    assert cache.get(key(1), 59.0) is not None
    assert cache.get(key(1), 61.0) is None
    assert cache.used_bytes == 0


def test_an_answer_without_a_price_or_above_the_capacity_is_refused():
    cache = ResponseCache(1000)
    assert not cache.put(key(1), answer(cost=math.nan))
    assert not cache.put(key(1), answer(size=2000))


def test_expected_uses_follow_past_requests():
    cache = ResponseCache(1000)
    assert cache.expected_uses(key(1)) == 1.0
    for _ in range(7):
        cache.get(key(1), 0.0)
    assert cache.expected_uses(key(1)) == 7.0


def test_a_small_answer_is_replaced_once_it_is_served_often_enough():
    small, large = answer("small"), answer("large")
    assert not worth_upgrading(small, 1, gain=0.2, priced_cost=0.5, uses=2.0)
    assert worth_upgrading(small, 1, gain=0.2, priced_cost=0.5, uses=3.0)
    assert not worth_upgrading(large, 1, gain=0.2, priced_cost=0.5, uses=3.0)
    assert not worth_upgrading(small, 1, gain=None, priced_cost=0.5, uses=3.0)


def test_old_frequencies_fade():
    sketch = FrequencySketch(window=100)
    for _ in range(60):
        sketch.count(key(1))
    for number in range(300):
        sketch.count(key(10 + number))
    assert sketch.estimate(key(1)) < 30


class CacheMachine(RuleBasedStateMachine):
    """Any order of calls, against a model that remembers what was stored."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = ResponseCache(2000, ttl_s=50.0)
        self.stored: dict[tuple[str, int], list[CachedAnswer]] = {}
        self.now = 0.0

    def _key(self, tenant: str, number: int) -> bytes:
        found = cache_key(SALT, tenant, {"prompt": number, "temperature": 0})
        assert found is not None
        return found

    @rule(
        tenant=st.sampled_from("ab"),
        number=st.integers(0, 5),
        tier=st.sampled_from(["small", "large"]),
        cost=st.floats(0, 10),
        size=st.integers(0, 2500),
    )
    def put(self, tenant, number, tier, cost, size):
        given_ = CachedAnswer(
            f"{tenant}{number}".encode().ljust(size, b"."),
            tier,
            int(tier == "large"),
            cost,
            self.now,
        )
        self.cache.put(self._key(tenant, number), given_)
        self.stored.setdefault((tenant, number), []).append(given_)

    @rule(tenant=st.sampled_from("ab"), number=st.integers(0, 5), rank=st.integers(0, 1))
    def get(self, tenant, number, rank):
        got = self.cache.get(self._key(tenant, number), self.now, Demand(min_rank=rank))
        if got is not None:
            assert got in self.stored[tenant, number]
            assert got.tier_rank >= rank
            assert self.now - got.stored_at_s <= 50.0

    @rule(seconds=st.floats(0, 30))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def clear(self):
        self.cache.clear()

    @invariant()
    def never_above_capacity(self):
        sizes = [answer.size_bytes for answer in self.cache]
        assert self.cache.used_bytes == sum(sizes) <= self.cache.capacity_bytes


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("eviction", list(Eviction))
def test_capacity_holds_under_a_long_random_workload(eviction):
    import random

    rng = random.Random(0)
    cache = ResponseCache(5000, eviction=eviction)
    for step in range(3000):
        number = int(rng.paretovariate(0.8))
        if cache.get(key(number), step) is None:
            cache.put(key(number), answer(cost=rng.random(), size=rng.randint(0, 800), at=step))
        assert cache.used_bytes <= 5000
    assert cache.stats.hits > 300


def test_an_answer_too_bulky_to_replace_the_present_one_leaves_it_in_place():
    cache = ResponseCache(room_for(3))
    for number in (1, 2, 3):
        cache.get(key(number), 0.0)
        cache.put(key(number), answer("small", cost=1.0))
    for number in (1, 2):
        cache.get(key(number), 0.0)

    stored = cache.put(key(3), answer("large", cost=1.1, size=400))

    assert not stored
    assert cache.get(key(3), 0.0) == answer("small", cost=1.0)
    assert len(cache) == 3
    assert cache.used_bytes == room_for(3)
