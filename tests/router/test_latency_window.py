"""Latencies at a stated percentile, and how many met a target."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from tandem_router.routing.latency_window import KEPT_S, LatencyReport, LatencyWindow

LATENCIES = st.lists(st.floats(0.001, 100.0), min_size=1, max_size=200)


@given(values=LATENCIES, percentile=st.floats(1.0, 99.0), target=st.floats(0.001, 100.0))
def test_the_percentile_meets_a_target_exactly_when_enough_requests_do(
    values: list[float], percentile: float, target: float
) -> None:
    window = LatencyWindow()
    for value in values:
        window.saw(value, now=0.0)

    report = window.report(percentile, target, now=0.0)

    assert report.num == len(values)
    assert report.num_met is not None
    assert report.value_s is not None
    enough = math.ceil(percentile / 100.0 * len(values))
    assert (report.value_s <= target) == (report.num_met >= max(1, enough))


def test_what_is_older_than_five_minutes_is_forgotten() -> None:
    window = LatencyWindow()
    window.saw(9.0, now=0.0)
    window.saw(1.0, now=KEPT_S)

    assert window.report(99.0, 2.0, now=KEPT_S + 1.0) == LatencyReport(1, 1, 1.0)
    assert window.report(99.0, None, now=3 * KEPT_S) == LatencyReport(0, None, None)
