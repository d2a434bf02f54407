"""Graders are functions of their texts: references of seven kinds, a judge in both orders."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.grading.graders import judge, reference
from tandem_router.grading.graders.agreement import Compared, agreement, wilson
from tandem_router.grading.graders.reference import BadReference, grade, kind_of


@pytest.mark.parametrize(
    ("answer", "wanted", "kind", "right"),
    [
        (" Paris\n", "Paris", "exact", True),
        ("paris", "Paris", "exact", False),
        ("The Eiffel Tower!", "eiffel tower", "normalised", True),
        ("I think so.\n\nAnswer: the Eiffel Tower.", "Eiffel tower", "normalised", True),
        ("**Final answer:** Paris", "Paris", "normalised", True),
        ("It is Paris, not Rome", "Rome", "normalised", False),
        ("3.5", "35", "normalised", False),
        ("The answer is (B) Paris", "B", "normalised", True),
        ("B. Paris", "b", "normalised", True),
        ("A dog is an animal", "A", "normalised", False),
        ("The capital of France is Paris.", "Paris", "ends", True),
        ("10+36=46 19+4=23>23:46", "23:46", "ends", True),
        ("They are called the Beatles!", "The Beatles", "ends", True),
        ("I choose A", "A", "ends", True),
        ("I choose **B**.", "B", "ends", True),
        ("Paris is the capital of France.", "Paris", "ends", False),
        ("It is comparison", "Paris", "ends", False),
        ("", "Paris", "ends", False),
        ("Paris is the capital of France.", "Paris", "includes", True),
        ("A comparison of cities", "Paris", "includes", False),
        ("The red and the blue one", "red one", "includes", False),
        ("The answer is 42.", "42", "numeric", True),
        ("6 * 7 = 42, so the answer is 6 * 7 = 42", 42, "numeric", True),
        ("First 12, then 30.\n#### 1,234", "... so 1234\n#### 1234", "numeric", True),
        (r"So \boxed{\frac{1}{2}} it is", "0.5", "numeric", True),
        ("The total is $1,234.50", "1234.5", "numeric", True),
        ("−7", "-7", "numeric", True),
        ("The answer is 42 because 6*7", "42", "numeric", True),
        ("<think>41? 43?</think>42", "42", "numeric", True),
        ("no idea", "42", "numeric", False),
        ("43", "42", "numeric", False),
        ('Here:\n```json\n{"b": 1, "a": [1.0, 2]}\n```', {"a": [1, 2], "b": 1}, "json", True),
        ('It is {"a": true} as you see', '{"a": true}', "json", True),
        ('{"a": 1}', {"a": True}, "json", False),
        ("{'a': 1}", {"a": 1}, "json", False),
        ("reply: PQR", r"\bP.R$", "regex", True),
        ("pqr", r"P.R", "regex", False),
        ("colour", ["color", "colour"], "normalised", True),
    ],
)
def test_an_answer_is_right_or_wrong(
    answer: str, wanted: Any, kind: reference.Kind, right: bool
) -> None:
    assert grade(answer, wanted, kind) == float(right)


@pytest.mark.parametrize(
    ("wanted", "kind"),
    [
        (42, "numeric"),
        ("-3.5", "numeric"),
        ("$1,200", "numeric"),
        ("so 5\n#### 5", "numeric"),
        ({"a": 1}, "json"),
        ('{"a": 1}', "json"),
        ("[1, 2]", "json"),
        ("Paris", "ends"),
        ("B", "ends"),
        (True, "ends"),
        (["1", "2"], "numeric"),
        ("in 1999 and 2001", "ends"),
        ("{not json", "ends"),
    ],
)
def test_what_a_reference_is_says_how_it_is_compared(wanted: Any, kind: str) -> None:
    assert kind_of(wanted) == kind


@pytest.mark.parametrize(
    ("wanted", "kind", "reason"),
    [
        ("(", "regex", "is no regular expression"),
        ("none", "numeric", "holds no number"),
        ("{", "json", "is not JSON"),
        ([], "normalised", "list of references is empty"),
        ({"a": 1}, "exact", "is a dict, not a text"),
    ],
)
def test_a_reference_that_cannot_be_used_says_why(
    wanted: Any, kind: reference.Kind, reason: str
) -> None:
    with pytest.raises(BadReference, match=reason):
        grade("x", wanted, kind)


@given(st.text(), st.text())
def test_any_two_texts_are_graded_zero_or_one(answer: str, wanted: str) -> None:
    assert grade(answer, wanted) in (0.0, 1.0)


@given(st.text())
def test_a_text_agrees_with_itself_and_normalising_twice_changes_nothing(text: str) -> None:
    assert reference.exact(text, text)
    assert reference.normalise(reference.normalise(text)) == reference.normalise(text)


@given(
    st.floats(-1e9, 1e9).map(lambda x: round(x, 3)),
    st.sampled_from(["{}", "So it is {}.", "#### {}"]),
)
def test_a_number_is_found_again_in_a_sentence(number: float, sentence: str) -> None:
    assert grade(sentence.format(number), number, "numeric") == 1.0
    other = number + max(1.0, abs(number) * 1e-3)
    assert grade(sentence.format(round(other, 3)), number, "numeric") == 0.0


WORDS = st.lists(st.text("bcdxyz79", min_size=1, max_size=3), min_size=1, max_size=4).map(" ".join)


@given(WORDS, WORDS)
def test_what_is_a_reference_ends_with_it_and_what_ends_with_it_includes_it(
    answer: str, wanted: str
) -> None:
    normalised, ends, includes = (
        grade(answer, wanted, "normalised"),
        grade(answer, wanted, "ends"),
        grade(answer, wanted, "includes"),
    )

    assert normalised <= ends <= includes
    assert grade(f"So {answer}: {wanted}.", wanted, "ends") == 1.0
    assert grade(f"{answer}: {wanted}. So.", wanted, "includes") == 1.0


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=3), VALUES), st.booleans())
def test_json_is_found_again_whatever_its_order_and_fence(value: Any, fenced: bool) -> None:
    text = json.dumps(dict(reversed(value.items())), indent=2)
    answer = f"Sure:\n```json\n{text}\n```\nDone." if fenced else text

    assert grade(answer, value, "json") == 1.0


def test_grading_a_huge_answer_takes_bounded_work() -> None:
    for answer in (
        "{" * 500_000,
        "[" * 500_000,
        "1," * 500_000,
        "\\boxed{" * 100_000,
        "- " * 400_000,
    ):
        for kind in ("normalised", "ends", "includes", "numeric"):
            assert grade(answer, "7", kind) == 0.0  # type: ignore[arg-type]
        assert grade(answer, {"a": 1}, "json") == 0.0


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Both fine, but [[A]] is better... no: [[B]]", "second"),
        ("[[a]]", "first"),
        ("[[C]]", "tie"),
        ("[[tie]]", "tie"),
        ("A", "first"),
        ("Assistant B.", "second"),
        ('{"winner": "A"}', "first"),
        ("Tie", "tie"),
        ("I cannot say", None),
        ("", None),
        ("[[D]]", None),
    ],
)
def test_a_judges_reply_is_a_verdict_or_garbled(reply: str, verdict: str | None) -> None:
    assert judge.parse(reply) == verdict


@given(st.lists(st.sampled_from(["first", "second", "tie"]), min_size=1, max_size=4))
def test_exchanging_the_answers_exchanges_their_grades(verdicts: list[judge.Verdict]) -> None:
    own, other = judge.scores(verdicts)

    assert judge.scores([judge.turned(verdict) for verdict in verdicts]) == (other, own)
    assert 0.0 <= own <= 1.0
    assert 0.0 <= other <= 1.0


def test_a_judge_that_always_prefers_the_first_place_prefers_nobody() -> None:
    in_both_orders: list[judge.Verdict] = ["first", judge.turned("first")]

    assert judge.scores(in_both_orders) == (0.5, 0.5)


@given(st.text(), st.text(), st.text())
def test_a_judge_sees_the_question_and_both_answers(question: str, one: str, other: str) -> None:
    shown = judge.messages(question, one, other)[-1]["content"]

    assert question in shown
    assert shown.index("A's Answer") < shown.index("B's Answer")


@pytest.mark.parametrize("error", [0.0, 0.1, 0.3])
def test_the_measured_agreement_of_a_judge_that_errs_at_a_known_rate_holds_it(error: float) -> None:
    """Independent errors: nineteen intervals in twenty hold the rate (here at least 93 %)."""
    rng = random.Random(7)
    held = 0
    for _ in range(300):
        pairs = []
        for _ in range(60):
            grades = rng.choice([(1.0, 0.0), (0.0, 1.0)])
            right: judge.Verdict = "first" if grades[0] else "second"
            verdicts = tuple(
                judge.turned(right) if rng.random() < error else right for _ in range(2)
            )
            pairs.append(Compared(*grades, verdicts))
        found = agreement(pairs).decided
        assert found is not None
        held += found.low <= 1 - error <= found.high
    assert held >= 279


def test_a_judge_that_errs_alike_in_both_orders_counts_pairs_not_verdicts() -> None:
    alike = [
        Compared(1.0, 0.0, ("first", "first") if i % 4 else ("second", "second"))
        for i in range(100)
    ]

    found = agreement(alike).overall

    assert found is not None
    assert (found.value, found.num_verdicts, found.num_pairs) == (0.75, 200, 100)
    assert (found.low, found.high) == pytest.approx(wilson(0.75, 100), abs=1e-9)


def test_agreement_counts_ties_overall_and_not_where_one_is_better() -> None:
    found = agreement(
        [Compared(1.0, 1.0, ("tie", "first")), Compared(1.0, 0.0, ("first", "first"))]
    )

    assert found.overall is not None
    assert found.overall.value == 0.75
    assert found.decided is not None
    assert found.decided.value == 1.0
    assert agreement([]).overall is None


def test_graders_are_imported_without_an_http_client() -> None:
    code = (
        "import sys\n"
        "from tandem_router.grading.graders import agreement, judge, reference\n"
        "assert not {'httpx', 'sklearn', 'numpy'} & set(sys.modules)"
    )

    subprocess.run([sys.executable, "-c", code], check=True)
