"""What a judge's word on one answer counts beside the verifier's verdict."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.predictor.cascade import Verdict
from tandem_router.predictor.cascade.opinions import Opinions

OPEN = Verdict(0.5, 0.9)


def of_a_judge(num: int, right: float, wrong: float, probability: float = 0.1) -> Opinions:
    """Half of `num` answers were right; `right` and `wrong` of each kind were called good."""
    opinions = Opinions()
    each = num // 2
    for kind, share in ((1.0, right), (0.0, wrong)):
        for number in range(each):
            request_id = f"{kind}/{number}"
            opinions.said(request_id, "small", number < round(share * each))
            opinions.found(request_id, {"small": kind, "large": 1.0}, probability, False)
    return opinions


def test_unchecked_praise_counts_for_nothing_and_blame_as_of_seven_in_ten() -> None:
    opinions = Opinions()

    assert not opinions.checked
    assert opinions.weigh(OPEN, True) == OPEN
    assert opinions.weigh(OPEN, False).quality_small == pytest.approx(0.3)
    assert opinions.weigh(OPEN, False).quality_large == OPEN.quality_large


@pytest.mark.parametrize("probability", [1.0, 0.02])
def test_a_checked_judge_counts_as_it_was_right_before(probability: float) -> None:
    """By Bayes' rule, whatever the probability with which labels were drawn."""
    opinions = of_a_judge(2000, 0.9, 0.2, probability)

    assert opinions.checked
    assert opinions.weigh(OPEN, True).quality_small == pytest.approx(0.9 / 1.1, abs=0.01)
    assert opinions.weigh(OPEN, False).quality_small == pytest.approx(0.1 / 0.9, abs=0.01)


def test_labels_that_were_seldom_drawn_count_for_those_that_were_not() -> None:
    opinions = Opinions()
    for kind, num_good, probability in ((1.0, 20, 0.1), (1.0, -20, 1.0), (0.0, -40, 1.0)):
        for number in range(abs(num_good)):
            request_id = f"{kind}/{num_good}/{number}"
            opinions.said(request_id, "small", num_good > 0)
            opinions.found(request_id, {"small": kind}, probability, False)

    # 200 right answers were called good and 20 were not, though as many of each are known.
    assert opinions.right.share(True) == pytest.approx(10 / 11, abs=0.05)


@pytest.mark.parametrize("called_good", [0.0, 0.5, 1.0])
def test_a_judge_that_says_the_same_of_right_and_wrong_answers_moves_nothing(
    called_good: float,
) -> None:
    opinions = of_a_judge(400, called_good, called_good)

    for good in (True, False):
        assert opinions.weigh(OPEN, good).quality_small == pytest.approx(0.5)


def test_a_judge_that_lies_moves_nothing() -> None:
    opinions = of_a_judge(400, 0.1, 0.9)

    assert [opinions.weigh(OPEN, good) for good in (True, False)] == [OPEN, OPEN]


def test_it_is_unchecked_until_ten_right_and_ten_wrong_answers_are_known() -> None:
    assert not of_a_judge(18, 0.9, 0.2).checked
    assert of_a_judge(20, 0.9, 0.2).checked


def test_what_people_know_takes_the_place_of_a_judged_label() -> None:
    opinions = Opinions()
    opinions.said("r", "small", True)
    opinions.found("r", {"small": 0.0}, 0.5, is_gold=False)
    opinions.found("r", {"small": 1.0}, 0.25, is_gold=True)
    opinions.found("r", {"small": 0.0}, 0.5, is_gold=False)

    assert (opinions.num_known, opinions.right.weight, opinions.wrong.weight) == (1, 4.0, 0.0)


def test_labels_of_requests_or_tiers_that_it_did_not_see_are_nothing_to_it() -> None:
    opinions = Opinions()
    opinions.found("unknown", {"small": 1.0}, 0.5, False)
    opinions.said("r", "small", True)
    opinions.found("r", {"large": 1.0}, 0.5, False)
    opinions.found("r", {"small": 1.0}, 0.0, False)

    assert opinions.num_known == 0


@given(
    st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(0, 60), st.floats(0.0, 1.0), st.booleans()
)
def test_praise_never_lowers_and_blame_never_raises_a_probability(
    right: float, wrong: float, num: int, p: float, good: bool
) -> None:
    found = of_a_judge(num, right, wrong).weigh(Verdict(p, 0.9), good).quality_small

    assert 0.0 <= found <= 1.0
    assert math.isfinite(found)
    assert found >= p - 1e-12 if good else found <= p + 1e-12
