"""The choice between local and remote prefill follows what was measured."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tandem_worker.disaggregation.decode_side import RemoteCosts
from tandem_worker.engine.profile import StepProfile


def test_a_cold_first_remote_prefill_does_not_decide_for_ever() -> None:
    """Nothing corrects a judgement against remote, as no remote prefill follows it."""
    costs = RemoteCosts()
    costs.observe(elapsed_s=30.0, prefill_s=29.0, num_tokens=1000)

    assert costs.remote_is_cheaper(1000, 0.1, num_running=8)

    costs.observe(elapsed_s=0.11, prefill_s=0.1, num_tokens=1000)
    assert costs.remote_is_cheaper(1000, 0.1, num_running=8)
    assert not costs.remote_is_cheaper(1000, 0.1, num_running=0)


def test_the_first_prompt_goes_remote_so_that_something_is_measured() -> None:
    assert RemoteCosts().remote_is_cheaper(10, None, 0)


def test_an_idle_decode_worker_keeps_short_prompts_and_a_busy_one_sends_long_ones() -> None:
    costs = RemoteCosts()
    for _ in range(20):
        costs.observe(elapsed_s=0.110, prefill_s=0.100, num_tokens=1000)

    assert not costs.remote_is_cheaper(50, None, num_running=0)
    assert costs.remote_is_cheaper(1000, None, num_running=8)


def test_a_slow_link_makes_local_cheaper() -> None:
    slow = RemoteCosts()
    for _ in range(20):
        slow.observe(elapsed_s=5.0, prefill_s=0.1, num_tokens=1000)

    assert not slow.remote_is_cheaper(1000, 0.1, num_running=8)


@given(
    a=st.floats(1e-4, 1e-2),
    b=st.floats(1e-6, 1e-4),
    c=st.floats(0, 1e-7),
)
def test_a_profile_recovers_the_costs_of_steps(a: float, b: float, c: float) -> None:
    profile = StepProfile()
    for tokens in (16, 50, 100, 200, 400, 800, 300, 150, 60, 700):
        profile.observe(a + b * tokens + c * tokens**2, decode_contexts=[], prefills=[(0, tokens)])

    predicted = profile.prefill_time_s(0, 500)

    assert predicted == pytest.approx(a + b * 500 + c * 500**2, rel=0.05)


def test_a_profile_reports_each_kind_of_step_once_enough_were_seen() -> None:
    """A prefill worker never decodes: its half has to be known all the same."""
    profile = StepProfile()
    assert profile.as_dict() is None
    for tokens in range(1, 10):
        profile.observe(0.01 * tokens, decode_contexts=[], prefills=[(0, tokens)])
    half = profile.as_dict()
    assert half is not None
    assert half["prefill"] is not None
    assert half["decode"] is None

    for contexts in ([10], [10, 20], [30, 5], [7], [8], [9, 9, 9], [1], [2]):
        profile.observe(0.001 * len(contexts), decode_contexts=contexts, prefills=[])

    fitted = profile.as_dict()
    assert fitted is not None
    assert [len(fit or ()) for fit in fitted.values()] == [3, 3]
