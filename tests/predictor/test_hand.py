"""Hand features read off a prompt what a person would count in it."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.predictor.reading import hand_features, ngrams


def found(prompt: str) -> dict[str, float]:
    return dict(
        zip(hand_features.NAMES, hand_features.features(ngrams.read(prompt)).tolist(), strict=True)
    )


QUESTION = """Tom paid $12.50 for 3/4 of a "crate", then 1,200 cents to Mary Ann. How much in all?
A) 12 dollars
B) 24 dollars and 50 cents
C) none"""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_numbers", 7),
        ("num_digits", 16),
        ("longest_number", 4),
        ("second_longest_number", 4),
        ("log_largest_number", math.log1p(1200)),
        ("log_smallest_number", math.log1p(3)),
        ("decimals", 1),
        ("fractions", 1),
        ("dollar", 1),
        ("question_marks", 1),
        ("num_options", 3),
        ("option_words", 8 / 3),
        ("option_spread", 4),
        ("numeric_options", 2 / 3),
        ("quoted_word_length", 5),
        ("quotes", 2),
        ("proper_nouns", 2),
        ("log_lines", math.log1p(3)),
        ("first_word_length", 3),
        ("spaced_letters", 4),
        ("last_char_is_question", 0),
    ],
)
def test_features_of_a_known_question(name: str, value: float) -> None:
    assert found(QUESTION)[name] == pytest.approx(value, rel=1e-6)


def test_formulas_code_and_lists_are_cues() -> None:
    assert found(r"Let $x_{1} = \\frac{1}{2}^2$")["latex_cues"] == 5
    assert found("while (a == b) { a; }")["code_cues"] == 4
    assert found("Do:\n- one\n * two\n3. three\nend")["list_lines"] == 3
    assert found("Is it so? ")["last_char_is_question"] == 1


@given(prompt=st.text("ab1., 7/", max_size=80))
def test_numbers_are_those_of_the_regular_expression(prompt: str) -> None:
    numbers = re.findall(r"\d+(?:[.,]\d+)*", prompt)
    digits = [sum(char.isdigit() for char in number) for number in numbers]

    features = found(prompt)

    assert features["num_numbers"] == len(numbers)
    assert features["num_digits"] == sum(digits)
    assert features["longest_number"] == max(digits, default=0)


@given(prompt=st.text("aB e.?!\n", max_size=80))
def test_words_vowels_and_sentences_are_those_of_regular_expressions(prompt: str) -> None:
    words = re.findall(r"[a-z]+", prompt.lower())
    sentences = max(len(re.findall(r"[.!?](?:[ \n]|$(?!\n))", prompt)), 1)

    features = found(prompt)

    assert features["log_words"] == pytest.approx(math.log1p(len(words)))
    assert features["log_sentences"] == pytest.approx(math.log1p(sentences))
    vowels = len(re.findall(r"[aeiouy]+", prompt.lower())) / max(len(words), 1)
    assert features["syllables_per_word"] == pytest.approx(vowels, rel=1e-6)


def test_the_length_is_of_the_whole_prompt_the_rest_of_its_ends() -> None:
    middle = "13 " * 50_000
    prompt = f"{'a ' * 1000}{middle}{'b ' * 400}"

    features = found(prompt)

    assert features["log_chars"] == pytest.approx(math.log1p(len(prompt)))
    assert features["num_numbers"] == 0
