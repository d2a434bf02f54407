"""Reading a small answer: features, verifier, zones."""

from __future__ import annotations

import math
import random
import time
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_router.predictor.cascade import (
    FEATURE_NAMES,
    AnswerVerifier,
    CascadeTerms,
    TokenStatistics,
    Verdict,
    VerifierPower,
    Zone,
    answer_features,
    choose_zone,
    escalate,
    zone_bounds,
)
from tandem_router.predictor.training.answer_verifier import fit_verifier


def feature(name: str, prompt: str, answer: str, logprobs=()) -> float:
    tokens = TokenStatistics.of(logprobs)
    return answer_features(prompt, answer, tokens)[FEATURE_NAMES.index(name)]


@pytest.mark.parametrize(
    ("answer", "equations", "wrong"),
    [
        ("3 x 60 = <<3*60=180>>180 meters", 1, 0),
        ("so 2 + 3 * 4 = 14 and 14 - 5 = 8", 2, 1),
        ("5000 * 2.5% = 125", 1, 0),
        ("1/3 = 0.33", 1, 0),
        ("4 / 0 = 7", 0, 0),
        ("x = 3", 0, 0),
    ],
)
def test_equations_in_an_answer_are_recomputed(answer, equations, wrong):
    assert feature("equations", "q", answer) == equations
    assert feature("equations_wrong", "q", answer) == wrong


def test_an_answer_cut_off_in_the_middle_of_a_sum_ends_open():
    assert feature("ends_open", "q", "they had 15 + ") == 1.0
    assert feature("ends_open", "q", "they had 40. #### 40") == 0.0


def test_token_certainty_is_read_where_given_and_absent_otherwise():
    assert feature("has_certainty", "q", "a") == 0.0
    assert feature("doubtful_tokens", "q", "a", [-0.1, -2.0]) == 0.5
    assert feature("lowest_logprob", "q", "a", [-0.1, -2.0, math.nan]) == -2.0


@settings(max_examples=80, deadline=None)
@given(logprobs=st.lists(st.floats(max_value=0.0), min_size=1, max_size=30))
def test_what_a_worker_tells_of_its_tokens_is_what_is_computed_here(logprobs):
    told = TokenStatistics.of(logprobs)

    if told is None:
        assert not any(map(math.isfinite, logprobs))
    else:
        assert TokenStatistics.parse(asdict(told)) == told


@pytest.mark.parametrize(
    "told",
    [
        None,
        "certain",
        {"num_tokens": 3},
        {**asdict(TokenStatistics(3, -0.1, -1.0, 0.0, -0.1)), "mean_logprob": "low"},
        {**asdict(TokenStatistics(3, -0.1, -1.0, 0.0, -0.1)), "lowest_logprob": math.nan},
        {**asdict(TokenStatistics(3, -0.1, -1.0, 0.0, -0.1)), "final_logprob": 3.0},
        {**asdict(TokenStatistics(3, -0.1, -1.0, 0.0, -0.1)), "doubtful_share": 7},
        {**asdict(TokenStatistics(3, -0.1, -1.0, 0.0, -0.1)), "num_tokens": 0},
    ],
)
def test_statistics_that_cannot_be_are_none(told):
    assert TokenStatistics.parse(told) is None


@settings(max_examples=80, deadline=None)
@given(
    prompt=st.text(max_size=300),
    answer=st.one_of(
        st.text(max_size=400), st.text(alphabet="0123456789+-*/=<>.,#$% \n", max_size=400)
    ),
    logprobs=st.lists(st.floats(max_value=0.0), max_size=5),
)
def test_features_are_finite_for_any_text(prompt, answer, logprobs):
    x = answer_features(prompt, answer, TokenStatistics.of(logprobs))
    assert x.shape == (len(FEATURE_NAMES),)
    assert np.isfinite(x).all()


def test_ten_megabytes_of_digits_are_read_in_bounded_time():
    assert np.isfinite(answer_features("1 " * 5_000_000, "1+1" * 3_000_000)).all()


def cpu_s(answer: str) -> float:
    """The least CPU time of five readings: what the work costs without what disturbs it."""
    times = []
    for _ in range(5):
        start = time.thread_time()
        answer_features("How many are left?", answer)
        times.append(time.thread_time() - start)
    return min(times)


@pytest.mark.parametrize("unit", ["1", "1,", "1.", "1 ", "1+", "+1", "1x1=", "<<1=", "$", " ", "#"])
def test_no_repetition_makes_reading_an_answer_slow(unit):
    """A model that loops on one character must not hold up the router."""
    ordinary = "She has 12 + 3 = 15 apples and gives 4 away, so 15 - 4 = 11. " * 200

    assert cpu_s(unit * 8192) < 10.0 * cpu_s(ordinary) + 0.005


def sums(rng: random.Random, count: int):
    """Word problems whose small answers are wrong about half of the time, visibly."""
    prompts, answers, quality = [], [], []
    for _ in range(count):
        a, b, right = rng.randint(2, 99), rng.randint(2, 99), rng.random() < 0.5
        total = a + b if right else a + b + rng.randint(1, 9)
        prompts.append(f"Ann has {a} pears and buys {b} more. How many pears has she?")
        answers.append(f"She has {a} + {b} = {total} pears.\n#### {total}")
        quality.append((float(right), float(rng.random() < 0.9)))
    return prompts, answers, np.array(quality)


@pytest.fixture(scope="module")
def verifier() -> AnswerVerifier:
    return fit_verifier(*sums(random.Random(1), 200))


def test_the_verifier_tells_right_sums_from_wrong_ones(verifier):
    prompts, answers, quality = sums(random.Random(2), 100)

    scores = verifier.predict(prompts, answers)[:, 0]

    right = quality[:, 0] == 1.0
    assert scores[right].min() > scores[~right].max()
    assert abs(scores.mean() - quality[:, 0].mean()) < 0.1


def test_certainty_that_no_training_row_had_changes_no_verdict(verifier):
    prompts, answers, _ = sums(random.Random(2), 5)
    sure = [TokenStatistics.of([-0.01] * 9)] * 5

    np.testing.assert_array_equal(
        verifier.predict(prompts, answers, sure), verifier.predict(prompts, answers)
    )


def test_a_verifier_learns_from_certainty_what_the_text_does_not_say():
    rng = random.Random(4)
    prompts = [f"Name city {i}." for i in range(160)]
    right = [rng.random() < 0.5 for _ in prompts]
    tokens = [TokenStatistics.of([-0.05 if good else -1.2 - rng.random()] * 4) for good in right]
    quality = np.array([(float(good), 0.9) for good in right])
    learned = fit_verifier(prompts, ["Rome."] * 160, quality, tokens)

    sure = learned.verify("Name city 200.", "Rome.", TokenStatistics.of([-0.05] * 4))
    unsure = learned.verify("Name city 200.", "Rome.", TokenStatistics.of([-1.5] * 4))

    assert sure.quality_small > 0.8 > 0.3 > unsure.quality_small


@pytest.mark.parametrize(
    ("said", "num"),
    [
        ({"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -0.1}]}, 2),
        ({"token_logprobs": [None, -0.5], "tokens": ["a", "b"]}, 1),
        ({"content": [{"token": "a"}]}, None),
        ({"content": None}, None),
        ({"token_logprobs": ["x", True]}, None),
        ([1], None),
        (None, None),
    ],
)
def test_certainty_is_read_from_both_forms_of_logprobs(said, num):
    found = TokenStatistics.of_logprobs(said)

    assert (found and found.num_tokens) == num


def test_a_verifier_of_an_earlier_version_judges_as_it_did(verifier):
    """Fewer features, fixed weights of the views, one slope and bias per tier."""
    arrays = verifier.to_arrays()
    for name in ("mean", "scale"):
        arrays[name] = arrays[name][:33]
    arrays["references"] = arrays["references"][:, :33]
    arrays["linear"] = np.column_stack([arrays["linear"][:, :33], arrays["linear"][:, -1]])
    mixture = arrays.pop("mixture")
    weights = np.array([1.0, 1.2, 1.2, 0.5])
    earlier = {**arrays, "weights": weights, "calibration": np.array([[2.0, 0.5], [1.0, 0.0]])}
    today = np.column_stack([np.outer([2.0, 1.0], weights / weights.sum()), np.array([0.5, 0.0])])
    prompts, answers, _ = sums(random.Random(3), 20)

    read = AnswerVerifier.from_arrays(earlier)

    assert mixture.shape == today.shape
    np.testing.assert_allclose(
        read.predict(prompts, answers),
        AnswerVerifier.from_arrays({**arrays, "mixture": today}).predict(prompts, answers),
    )


def test_a_verifier_survives_the_way_through_arrays(verifier):
    again = AnswerVerifier.from_arrays(verifier.to_arrays())
    prompts, answers, _ = sums(random.Random(3), 20)

    np.testing.assert_allclose(
        again.predict(prompts, answers), verifier.predict(prompts, answers), atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("linear", lambda a: a[:, :-1], "another version"),
        ("mean", lambda a: a * np.nan, "NaN"),
        ("linear", lambda a: a.astype(object), "not numbers"),
        ("references", lambda a: a[:-1], "differ in number"),
    ],
)
def test_damaged_arrays_are_refused_with_a_sentence(verifier, name, damage, says):
    arrays = verifier.to_arrays()
    arrays[name] = damage(arrays[name])
    with pytest.raises(ValueError, match=says):
        AnswerVerifier.from_arrays(arrays)
    del arrays[name]
    with pytest.raises(ValueError, match=f"lack '{name}'"):
        AnswerVerifier.from_arrays(arrays)


def test_training_data_that_cannot_work_is_refused():
    prompts, answers, quality = sums(random.Random(1), 50)
    with pytest.raises(ValueError, match="too few"):
        fit_verifier(prompts[:3], answers[:3], quality[:3])
    with pytest.raises(ValueError, match="do not belong together"):
        fit_verifier(prompts, answers[:-1], quality)
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        fit_verifier(prompts, answers, quality * 2)


def test_one_class_of_labels_still_gives_finite_beliefs():
    prompts, answers, quality = sums(random.Random(1), 60)
    fitted = fit_verifier(prompts, answers, np.ones_like(quality))
    beliefs = fitted.predict(prompts, answers)
    assert ((beliefs > 0.9) & (beliefs <= 1.0)).all()


# Zones.

SHARP = VerifierPower((0.02, 0.08, 0.9), (0.9, 0.08, 0.02))
BLIND = VerifierPower((0.5, 0.5), (0.5, 0.5))
TERMS = CascadeTerms(cost_small=0.005, cost_large=0.2)


def test_a_sharp_verifier_opens_a_middle_zone_and_a_blind_one_none():
    low, high = zone_bounds(0.95, SHARP, TERMS)
    assert 0.0 < low < high < 1.0
    zones = [choose_zone(p, 0.95, SHARP, TERMS) for p in (low - 0.01, 0.5, high + 0.01)]
    assert zones == [Zone.LARGE, Zone.VERIFY, Zone.SMALL]
    assert all(choose_zone(i / 50, 0.95, BLIND, TERMS) is not Zone.VERIFY for i in range(51))


def test_no_time_for_two_answers_means_no_middle_zone():
    hurried = CascadeTerms(0.005, 0.2, slo_slack_s=0.5, small_p95_s=0.8)
    assert choose_zone(0.5, 0.95, SHARP, hurried) is Zone.LARGE


def test_an_answer_is_escalated_iff_the_gain_pays():
    assert escalate(Verdict(0.3, 0.9), TERMS)
    assert not escalate(Verdict(0.75, 0.9), TERMS)
    assert escalate(Verdict(math.nan, 0.9), TERMS)


@settings(max_examples=80, deadline=None)
@given(
    p=st.floats(0, 1),
    q=st.floats(0, 1),
    costs=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    raw=st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=1, max_size=6),
)
def test_verifying_is_chosen_only_when_it_can_change_the_outcome(p, q, costs, raw):
    right, wrong = (np.array(side) / sum(side) for side in zip(*raw, strict=True))
    power = VerifierPower(tuple(right), tuple(wrong))
    zone = choose_zone(p, q, power, CascadeTerms(*costs))
    if zone is Zone.VERIFY and p > 0:
        posteriors = p * right / (p * right + (1 - p) * wrong)
        assert posteriors.min() < q - costs[1] + 1e-9
        assert posteriors.max() > q - costs[1] - 1e-9


def test_measured_power_sees_what_the_scores_separate():
    rng = np.random.default_rng(0)
    quality = (rng.random(2000) < 0.6).astype(float)
    power = VerifierPower.measure(quality * 0.5 + rng.random(2000) * 0.6, quality, 4)
    assert power.given_right[-1] > 3 * power.given_wrong[-1]
    assert sum(power.given_right) == pytest.approx(1.0)
