"""A prefix that many requests share spreads over as many workers as they need, computed once each.

The picker is the router's own; workers are modelled in virtual time: one prefill after the other,
answers whose tokens come slower the more of them are written at once, load reports every second.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_router.balancing.endpoint_picker import Pick, Picker
from tandem_router.balancing.shared_prefixes import STRIDE, SharedPrefixes
from tandem_router.balancing.worker import Load
from tandem_router.config import PickingConfig

PREFILL_TOKENS_PER_S = 20_000.0
TOKEN_S, TOKEN_S_PER_ANSWER = 0.015, 0.0002
BYTES_PER_TOKEN = 4
BEGIN_S = 5.0  # what was asked for before is long answered then


@dataclass
class ModelledWorker:
    free_at: float = 0.0  # when the prefills asked for are done
    pending: float = 0.0
    cached: set[bytes] = field(default_factory=set)
    num_running: int = 0
    most_running: int = 0
    num_prefix_prefills: int = 0


@dataclass
class Outcome:
    workers: dict[str, ModelledWorker]
    ttfts: list[float]
    most_in_flight: int

    @property
    def used(self) -> list[ModelledWorker]:
        return [worker for worker in self.workers.values() if worker.most_running]


class Fleet:
    """Some workers behind the router's picker, on a clock of its own."""

    def __init__(self, num_workers: int, seed: int, role: str = "unified") -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._urls = [f"http://{role}{number}:80" for number in range(num_workers)]
        self.workers = {url: ModelledWorker() for url in self._urls}
        self.picker = Picker(PickingConfig(), random.Random(seed), lambda: self.now)
        self.picker.set_table({"t": {role: tuple(self._urls)}})
        self.ttfts: list[float] = []
        self.in_flight = self.most_in_flight = 0

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def ask(self, prefix: bytes, own: bytes, num_output: int) -> None:
        prompt = prefix + own
        num_tokens = len(prompt) / BYTES_PER_TOKEN
        pick = self.picker.pick("t", self.picker.chain(prompt), num_tokens, frozenset())
        assert pick is not None
        asked_at, worker = self.now, self.workers[pick.decode.url]
        worker.num_running += 1
        worker.most_running = max(worker.most_running, worker.num_running)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        uncached = len(own) / BYTES_PER_TOKEN
        if prefix not in worker.cached:
            # Whoever asks while it is computed waits in line and finds it.
            worker.cached.add(prefix)
            worker.num_prefix_prefills += 1
            uncached = num_tokens
        worker.pending += uncached
        worker.free_at = max(worker.free_at, self.now) + uncached / PREFILL_TOKENS_PER_S
        self.at(worker.free_at, lambda: self._began(pick, worker, uncached, asked_at, num_output))

    def _began(
        self, pick: Pick, worker: ModelledWorker, uncached: float, asked_at: float, num_output: int
    ) -> None:
        worker.pending -= uncached
        self.ttfts.append(self.now - asked_at)
        self.picker.first_token(pick)
        token_s = TOKEN_S + TOKEN_S_PER_ANSWER * worker.num_running
        self.at(self.now + num_output * token_s, lambda: self._ended(pick, worker))

    def _ended(self, pick: Pick, worker: ModelledWorker) -> None:
        worker.num_running -= 1
        self.in_flight -= 1
        self.picker.finished(pick)

    def _report(self, until: float) -> None:
        for known in self.picker.workers:
            worker = self.workers[known.url]
            self.picker.observed(
                known,
                Load(
                    num_requests=worker.num_running,
                    pending_prefill_tokens=int(worker.pending),
                    expected_tokens=128.0 * worker.num_running,
                ),
            )
        if self.now < until:
            self.at(self.now + 1.0, lambda: self._report(until))

    def run(self, seconds: float) -> Outcome:
        self.at(0.5, lambda: self._report(seconds))
        while self._events:
            self.now, _, what = heapq.heappop(self._events)
            what()
        return Outcome(self.workers, self.ttfts, self.most_in_flight)


def arrivals(rate: float, seconds: float, rng: random.Random) -> Iterator[float]:
    now = 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        yield now


def ask_all(
    fleet: Fleet, rate: float, seconds: float, seed: int, prefix: bytes, own: int, output: int
) -> None:
    rng = random.Random(seed)
    for when in arrivals(rate, seconds, rng):
        tail = rng.randbytes(own)
        fleet.at(BEGIN_S + when, lambda tail=tail: fleet.ask(prefix, tail, output))  # type: ignore[misc]


@pytest.mark.parametrize("known", [True, False])
def test_a_hot_system_prompt_of_64_kb_uses_all_eight_workers_and_is_computed_once_on_each(
    known: bool,
) -> None:
    fleet = Fleet(8, seed=1)
    if known:
        fleet.ask(bytes(64_000), b"", 50)
    ask_all(fleet, 40.0, 30.0, 1, bytes(64_000), own=400, output=250)

    seen = fleet.run(30.0)

    assert seen.most_in_flight > 120  # what one worker would have had
    assert len(seen.used) == 8
    assert max(worker.most_running for worker in seen.used) <= 60
    assert [worker.num_prefix_prefills for worker in seen.used] == [1] * 8
    late = sorted(seen.ttfts)[int(0.95 * len(seen.ttfts))]
    assert late < 1.0  # one prefill of the prefix takes 0.8 s


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.floats(20.0, 60.0),
    num_workers=st.integers(4, 12),
    prefix_bytes=st.integers(16_000, 200_000),
    own=st.integers(0, 4_000),
)
def test_no_worker_is_left_with_a_hot_prefix_while_others_are_idle(
    seed: int, rate: float, num_workers: int, prefix_bytes: int, own: int
) -> None:
    fleet = Fleet(num_workers, seed)
    ask_all(fleet, rate, 12.0, seed, bytes(prefix_bytes), own, output=250)

    seen = fleet.run(12.0)

    even = seen.most_in_flight / num_workers
    assert max(worker.most_running for worker in seen.used) <= max(40.0, 2.5 * even)
    assert all(worker.num_prefix_prefills == 1 for worker in seen.used)


@pytest.mark.parametrize("seed", range(4))
def test_a_prefix_that_one_worker_can_serve_is_computed_on_one_only(seed: int) -> None:
    fleet = Fleet(8, seed)
    ask_all(fleet, 0.5, 60.0, seed, bytes(64_000), own=400, output=250)

    seen = fleet.run(60.0)

    assert len(seen.used) == 1


@pytest.mark.parametrize("seed", range(4))
def test_who_comes_while_a_prefix_is_computed_waits_for_it_rather_than_computing_it_again(
    seed: int,
) -> None:
    fleet = Fleet(8, seed)
    for number in range(6):
        fleet.at(0.1 * number, lambda: fleet.ask(bytes(64_000), b"x" * 400, 100))

    seen = fleet.run(1.0)

    assert [worker.num_prefix_prefills for worker in seen.used] == [1]


def test_conversations_under_a_hot_system_prompt_stay_with_what_they_alone_have() -> None:
    """What is shared spreads; a conversation's own turns are not computed again for that."""
    fleet, rng = Fleet(8, seed=5), random.Random(5)
    system = bytes(32_000)
    asked: dict[int, list[str]] = {}

    def turn(who: int, said: bytes, left: int) -> None:
        before = {url: worker.num_running for url, worker in fleet.workers.items()}
        fleet.ask(system, said, 100)
        (url,) = (u for u, w in fleet.workers.items() if w.num_running > before[u])
        asked.setdefault(who, []).append(url)
        if left:
            more = said + rng.randbytes(6_000)
            fleet.at(fleet.now + 6.0, lambda: turn(who, more, left - 1))

    for who in range(150):
        said = rng.randbytes(6_000)
        fleet.at(rng.uniform(0.0, 6.0), lambda w=who, s=said: turn(w, s, 3))  # type: ignore[misc]

    seen = fleet.run(30.0)
    stayed = sum(a == b for urls in asked.values() for a, b in zip(urls, urls[1:], strict=False))

    assert len(seen.used) >= 4
    assert stayed >= 0.9 * 3 * len(asked)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=30))
def test_what_is_under_way_is_forgotten_when_it_ends(requests: list[tuple[int, int]]) -> None:
    shared = SharedPrefixes()
    chains = [[1000 * kind + block for block in range(length)] for kind, length in requests]

    for chain in chains:
        shared.began(chain)
    for chain in chains:
        worth = shared.worth(chain, len(chain), lambda _: 1)
        values = [worth(number) for number in range(len(chain) + 1)]
        assert values == sorted(values)  # a longer prefix is never worth less
        assert all(value <= number for number, value in enumerate(values))
    for chain in chains:
        shared.ended(chain)

    assert len(shared) == 0


def test_each_copy_of_a_prefix_makes_the_next_one_dearer() -> None:
    shared, chain = SharedPrefixes(), list(range(10 * STRIDE))
    for _ in range(30):
        shared.began(chain)

    prices = [
        shared.worth(chain, len(chain), lambda _, c=copies: c)(len(chain)) for copies in (1, 2, 8)
    ]

    assert prices == sorted(prices)
    assert prices[0] < len(chain) / 20
