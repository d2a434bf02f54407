"""Picking spreads load, follows prefixes, and leaves the dead and the draining alone."""

from __future__ import annotations

import random
from collections import Counter
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clock import Clock
from tandem_router.balancing.endpoint_picker import Picker
from tandem_router.balancing.prefix_index import PrefixIndex, block_hashes
from tandem_router.balancing.retry_budget import RetryBudget
from tandem_router.balancing.worker import Load
from tandem_router.config import PickingConfig

CONFIG = PickingConfig(prefix_block_bytes=16)


def picker(**roles: int) -> tuple[Picker, Clock]:
    clock = Clock(100.0)
    result = Picker(CONFIG, random.Random(3), clock)
    result.set_table(
        {
            "t": {
                role: tuple(f"http://{role}{i}:80" for i in range(number))
                for role, number in roles.items()
            }
        }
    )
    return result, clock


def pick(p: Picker, prompt: bytes = b"", tokens: float = 100.0, exclude: Any = ()) -> Any:
    return p.pick("t", p.chain(prompt), tokens, frozenset(exclude))


@given(st.binary(max_size=200), st.binary(max_size=200), st.binary(max_size=40))
def test_equal_hashes_mean_equal_prefixes(left: bytes, right: bytes, shared: bytes) -> None:
    one = block_hashes(shared + left, 16, 99)
    two = block_hashes(shared + right, 16, 99)

    same = 0
    for a, b in zip(one, two, strict=False):
        if a != b:
            break
        same += 1

    assert same >= len(shared) // 16
    assert (shared + left)[: same * 16] == (shared + right)[: same * 16]


@given(st.lists(st.binary(max_size=120), max_size=30))
def test_prefix_index_keeps_its_bound_and_a_chain_without_holes(prompts: list[bytes]) -> None:
    index = PrefixIndex(max_entries=8)

    for prompt in prompts:
        chain = block_hashes(prompt, 16, 99)
        index.add(chain)

        assert len(index) <= 8
        assert index.num_covered(chain) == min(8, len(chain))
        for other in prompts:
            blocks = block_hashes(other, 16, 99)
            assert index.num_covered(blocks) == len(list(takewhile(index.__contains__, blocks)))


def test_the_worker_whose_answers_are_nearer_to_their_end_is_picked() -> None:
    p, _ = picker(unified=2)
    one, other = p.workers
    p.observed(one, Load(num_requests=4, expected_tokens=4000.0))
    p.observed(other, Load(num_requests=8, expected_tokens=400.0))

    assert pick(p).decode is other


def test_answers_asked_for_since_the_last_report_count_by_their_predicted_length() -> None:
    p, _ = picker(unified=2)
    for worker in p.workers:
        p.observed(worker, Load(expected_tokens=0.0))
    long = p.pick("t", [], 100.0, frozenset(), expected_tokens=2000.0).decode

    short = [p.pick("t", [], 100.0, frozenset(), expected_tokens=50.0).decode for _ in range(4)]
    p.observed(long, Load(expected_tokens=0.0))

    assert long not in short
    assert long.sent_tokens == 0.0


def test_requests_with_the_same_prefix_go_to_the_same_worker_while_it_is_free() -> None:
    p, _ = picker(decode=8)
    prompt = bytes(range(256)) * 16

    first = pick(p, prompt, 1000.0)
    p.finished(first)
    others = []
    for _ in range(20):
        again = pick(p, prompt, 1000.0)
        others.append(again.decode.url)
        p.finished(again)

    assert Counter(others).most_common(1)[0] == (first.decode.url, 20)


def test_a_hot_prefix_spills_over_when_its_worker_is_busy() -> None:
    p, _ = picker(decode=4)
    prompt = bytes(range(256)) * 16

    picks = [pick(p, prompt, 1000.0) for _ in range(64)]

    assert len({one.decode.url for one in picks}) == 4


def test_load_is_spread_evenly_without_prefixes() -> None:
    p, _ = picker(decode=5)

    counts = Counter(pick(p).decode.url for _ in range(500))

    assert max(counts.values()) - min(counts.values()) <= 10


def test_reported_load_of_other_routers_counts() -> None:
    p, _ = picker(decode=2)
    busy = p.worker("t", "http://decode0:80")
    assert busy is not None
    p.observed(busy, Load(num_requests=50))

    for _ in range(10):
        assert pick(p).decode.url == "http://decode1:80"


def test_prefill_and_decode_are_paired_and_pending_work_is_on_prefill() -> None:
    p, _ = picker(decode=2, prefill=2)

    picks = [pick(p, tokens=1000.0) for _ in range(4)]

    assert Counter(one.prefill.url for one in picks) == {
        "http://prefill0:80": 2,
        "http://prefill1:80": 2,
    }
    for one in picks:
        p.finished(one)
    assert all(w.num_inflight == 0 and w.pending_tokens == 0 for w in p.workers)


def test_workers_of_different_revisions_are_never_paired() -> None:
    p, _ = picker(decode=1, prefill=2)
    for url, revision in (("decode0", "b"), ("prefill0", "a"), ("prefill1", "b")):
        worker = p.worker("t", f"http://{url}:80")
        assert worker is not None
        p.observed(worker, Load(revision=revision))

    for _ in range(10):
        assert pick(p).prefill.url == "http://prefill1:80"


def report(p: Picker, **revisions: str) -> None:
    for name, revision in revisions.items():
        worker = p.worker("t", f"http://{name}:80")
        assert worker is not None
        p.observed(worker, Load(revision=revision))


def test_a_new_worker_is_not_paired_before_it_has_told_its_revision() -> None:
    p, _ = picker(decode=1, prefill=2)
    report(p, decode0="a", prefill0="a")

    assert {pick(p).prefill.url for _ in range(20)} == {"http://prefill0:80"}


def test_a_revision_gets_requests_once_each_of_its_roles_has_a_worker() -> None:
    p, _ = picker(decode=2, prefill=2)
    report(p, decode0="old", prefill0="old", decode1="new")

    first = [pick(p) for _ in range(20)]
    for one in first:
        p.finished(one)
    report(p, prefill1="new")
    after = {pick(p).decode.url for _ in range(20)}

    assert {one.decode.url for one in first} == {"http://decode0:80"}
    assert after == {"http://decode0:80", "http://decode1:80"}


def test_a_revision_without_prefill_workers_serves_where_there_is_no_other() -> None:
    p, _ = picker(decode=1, prefill=1)
    report(p, decode0="old", prefill0="new")

    found = pick(p)

    assert (found.decode.url, found.prefill) == ("http://decode0:80", None)


def test_unified_workers_get_no_prefill_worker() -> None:
    p, _ = picker(unified=1, prefill=1)

    assert pick(p).prefill is None


def test_a_failed_worker_is_left_alone_longer_each_time_and_then_tried_again() -> None:
    p, clock = picker(decode=1)
    worker = p.worker("t", "http://decode0:80")
    assert worker is not None

    waits = []
    for _ in range(8):
        p.failed(worker, "no")
        start = clock.now
        while pick(p) is None:
            clock.now += 0.05
        waits.append(clock.now - start)

    assert waits == sorted(waits)
    assert waits[-1] == pytest.approx(2.0, abs=0.06)


@pytest.mark.parametrize("load", [Load(draining=True), Load(ready=False)])
def test_draining_and_unready_workers_get_nothing(load: Load) -> None:
    p, _ = picker(decode=2)
    worker = p.worker("t", "http://decode0:80")
    assert worker is not None
    p.observed(worker, load)

    assert {pick(p).decode.url for _ in range(10)} == {"http://decode1:80"}


def test_nothing_usable_means_none() -> None:
    p, _ = picker(prefill=2)

    assert pick(p) is None
    assert p.num_usable("t") == 0


def test_excluded_workers_are_not_picked() -> None:
    p, _ = picker(decode=3)

    assert pick(p, exclude=["http://decode0:80", "http://decode1:80"]).decode.url == (
        "http://decode2:80"
    )


def test_a_new_table_keeps_what_is_known_of_workers_that_stay() -> None:
    p, _ = picker(decode=2)
    held = pick(p)

    p.set_table({"t": {"decode": (held.decode.url, "http://new:80")}})

    kept = p.worker("t", held.decode.url)
    assert kept is held.decode
    assert kept.num_inflight == 1
    p.finished(held)
    assert kept.num_inflight == 0


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["kv_blocks", "total", "free", "num_running", "profile", "prefill"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    )
)
def test_any_load_report_is_read_without_an_error(data: Any) -> None:
    load = Load.parse(data)

    assert 0.0 <= load.kv_free_share <= 1.0 or load.kv_free_share < 0


def test_failures_in_a_row_eject_a_worker_longer_each_time_and_an_answer_takes_it_back() -> None:
    p, clock = picker(unified=3)
    worker = p.worker("t", "http://unified0:80")
    others = [p.worker("t", f"http://unified{n}:80") for n in (1, 2)]

    ejected = [p.outcome(worker, good=False) for _ in range(5)]
    first_out = worker not in p.usable("t")
    p.observed(worker, Load())  # a load report says nothing of answers
    still_out = worker not in p.usable("t")
    # Half of the tier at most: the second failing worker stays.
    second = [p.outcome(others[0], good=False) for _ in range(5)]
    clock.now += 31.0
    back = worker in p.usable("t")
    again = p.outcome(worker, good=False)
    clock.now += 31.0
    longer = worker not in p.usable("t")
    p.outcome(worker, good=True)

    assert ejected == [False] * 4 + [True]
    assert first_out
    assert still_out
    assert not any(second)
    assert back
    assert again
    assert longer
    assert worker in p.usable("t")


def test_a_tier_of_failing_workers_is_tried_rather_than_given_up() -> None:
    p, _ = picker(unified=1)
    worker = p.worker("t", "http://unified0:80")
    for _ in range(5):
        p.outcome(worker, good=False)

    assert pick(p) is None
    assert p.pick("t", [], 1.0, frozenset(), ejected_too=True) is not None


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 30))
def test_retries_never_exceed_their_budget(steps: list[bool], num_inflight: int) -> None:
    budget = RetryBudget(0.2, 3)
    for take in steps:
        if take:
            budget.take(num_inflight)
        elif budget.num_retries:
            budget.give_back()
        assert 0 <= budget.num_retries <= max(3, num_inflight // 5)
