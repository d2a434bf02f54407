"""The question suite: splits never meet, answers are exact, every run asks the same."""

from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_operator.demo.suite import (
    FAMILIES,
    LEVELS,
    MARKER,
    SPLITS,
    Question,
    check,
    draw,
    generate,
    split_of,
)
from tandem_operator.demo.suite.atlas import ATLAS
from tandem_operator.demo.suite.numbers import add_columns, multiply_columns, subtract_columns

CELLS = [(family, level) for family in FAMILIES for level in LEVELS]
seeds = st.integers(0, 2**32)


@pytest.fixture(scope="module")
def train() -> list[Question]:
    return generate("train", 0, 12_000)


@pytest.fixture(scope="module")
def held_back() -> dict[str, list[Question]]:
    return {split: generate(split, 0, 2_400) for split in ("validation", "test")}


def test_at_least_ten_families_of_four_levels_are_all_present_in_every_split(
    train: list[Question], held_back: dict[str, list[Question]]
) -> None:
    assert len(FAMILIES) >= 10
    for questions in (train, *held_back.values()):
        assert {(q.family, q.level) for q in questions} == set(CELLS)


def test_no_prompt_occurs_in_two_splits(
    train: list[Question], held_back: dict[str, list[Question]]
) -> None:
    prompts = [{q.prompt for q in part} for part in (train, *held_back.values())]

    assert not prompts[0] & prompts[1]
    assert not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]


@pytest.mark.parametrize(("family", "level"), CELLS)
def test_a_content_belongs_to_the_one_split_its_hash_names(family: str, level: int) -> None:
    """Disjoint by construction: the same content can never be drawn for two splits."""
    rng = Random(5)

    keys = [FAMILIES[family](rng, level).key for _ in range(400)]

    assert {split_of(family, key) for key in keys} == set(SPLITS)
    assert all(split_of(family, key) == split_of(family, key) for key in keys)


@pytest.mark.parametrize(("family", "level"), CELLS)
def test_the_same_prompt_always_has_the_same_key_and_answer(family: str, level: int) -> None:
    rng, known = Random(6), {}

    for _ in range(600):
        draft = FAMILIES[family](rng, level)
        assert known.setdefault(draft.prompt, (draft.key, draft.answer)) == (
            draft.key,
            draft.answer,
        )


def test_the_same_arguments_give_the_same_questions() -> None:
    assert generate("test", 3, 200) == generate("test", 3, 200)
    assert generate("test", 3, 200) != generate("test", 4, 200)
    assert generate("test", 3, 50) == generate("test", 3, 200)[:50]


def test_questions_are_spread_evenly_and_prompts_do_not_repeat(
    held_back: dict[str, list[Question]],
) -> None:
    questions = held_back["test"]

    counts = [sum((q.family, q.level) == cell for q in questions) for cell in CELLS]

    assert set(counts) == {50}
    assert len({q.prompt for q in questions}) == len(questions)
    assert len({q.id for q in questions}) == len(questions)


def test_each_cell_is_asked_in_many_wordings(train: list[Question]) -> None:
    """Names, numbers and letters taken out, at least eight ways of asking remain."""
    for cell in CELLS:
        shapes = {
            re.sub(r"[A-Z]?[a-z]*[A-Z0-9()\[\]{}]+[a-z]*|`.*`", "#", q.prompt)
            for q in train
            if (q.family, q.level) == cell
        }
        assert len(shapes) >= 8, cell


@pytest.mark.parametrize(("family", "level"), CELLS)
@given(seed=seeds)
def test_the_reference_completion_is_right_and_other_answers_are_wrong(
    family: str, level: int, seed: int
) -> None:
    question = draw(Random(seed), "train", family, level)

    assert check(question, question.completion)
    assert check(question, f" {question.answer}\n")
    assert not check(question, question.completion + "0")
    assert not check(question, question.work + MARKER)
    assert not check(question, f"{question.completion}{MARKER}no")


@pytest.mark.parametrize(("family", "level"), CELLS)
@given(seed=seeds)
def test_the_marker_stands_nowhere_but_before_the_answer(
    family: str, level: int, seed: int
) -> None:
    question = draw(Random(seed), "train", family, level)

    assert MARKER not in question.prompt + question.work + question.answer
    assert "\n" not in question.prompt
    assert question.prompt == question.prompt.strip()


@given(a=st.integers(0, 10**6), b=st.integers(0, 10**6))
def test_columns_of_a_sum_spell_the_sum(a: int, b: int) -> None:
    columns = [int(step.split("=")[1]) for step in add_columns(a, b).split()]

    digits = "".join(str(c % 10) for c in columns[:-1])[::-1]

    assert int(f"{columns[-1]}{digits}") == a + b


@given(a=st.integers(1, 10**6), b=st.integers(0, 10**6))
def test_columns_of_a_difference_spell_the_difference(a: int, b: int) -> None:
    a, b = max(a, b), min(a, b)

    digits = [step.split("=")[1] for step in subtract_columns(a, b).split()]

    assert int("".join(reversed(digits))) == a - b


@given(a=st.integers(1, 10**6), b=st.integers(2, 9))
def test_columns_of_a_product_spell_the_product(a: int, b: int) -> None:
    columns = [int(step.split("=")[1]) for step in multiply_columns(a, b).split()]

    digits = "".join(str(c % 10) for c in columns[:-1])[::-1]

    assert int(f"{columns[-1]}{digits}") == a * b


@pytest.mark.parametrize("level", LEVELS)
@given(seed=seeds)
def test_sums_products_and_stories_agree_with_plain_arithmetic(level: int, seed: int) -> None:
    rng = Random(seed)

    for family in ("sums", "products"):
        draft = FAMILIES[family](rng, level)
        a, sign, b = re.fullmatch(r"(\d+)([-+*])(\d+)", draft.key.split("|")[0]).groups()  # type: ignore[union-attr]
        value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert draft.answer == str(value)
        assert a in draft.prompt
        assert b in draft.prompt
    story = FAMILIES["word problems"](rng, level)
    first, *changes = re.findall(r"[-+]?\d+", story.key)
    assert int(story.answer) == int(first) + sum(int(c) for c in changes)
    assert len(changes) == level


@pytest.mark.parametrize("level", LEVELS)
@given(seed=seeds)
def test_traced_code_prints_what_python_prints(level: int, seed: int) -> None:
    draft = FAMILIES["code"](Random(seed), level)
    values: dict[str, int] = {}

    *statements, last = draft.key.split(";")
    for statement in statements:
        name, operator, operand = re.fullmatch(r"(\w)([-+]?=)(\w+)", statement).groups()  # type: ignore[union-attr]
        number = values[operand] if operand in values else int(operand)
        values[name] = {
            "=": number,
            "+=": values.get(name, 0) + number,
            "-=": values.get(name, 0) - number,
        }[operator]

    assert draft.answer == str(values[last[len("print(")]])


@pytest.mark.parametrize("level", LEVELS)
@given(seed=seeds)
def test_sorted_letters_are_the_same_letters_in_order(level: int, seed: int) -> None:
    draft = FAMILIES["sorting"](Random(seed), level)

    assert list(draft.answer) == sorted(draft.key)


@pytest.mark.parametrize("level", LEVELS)
@given(seed=seeds)
def test_rules_are_followed_one_step_per_level(level: int, seed: int) -> None:
    draft = FAMILIES["logic"](Random(seed), level)
    listed, at = draft.key.split("|")
    rules = dict(rule.split(":") for rule in listed.split(", "))

    for _ in range(level):
        at = rules[at]

    assert draft.answer == at


@pytest.mark.parametrize("level", LEVELS)
@given(seed=seeds)
def test_closing_brackets_balance_the_row(level: int, seed: int) -> None:
    draft = FAMILIES["brackets"](Random(seed), level)
    row = draft.key.split("|")[0]

    if draft.answer.isdigit():
        assert row.count("(") - row.count(")") == int(draft.answer)
        return
    closed, pairs = row + draft.answer, ("()", "[]", "{}")
    while any(pair in closed for pair in pairs):
        for pair in pairs:
            closed = closed.replace(pair, "")
    assert closed == ""


def test_popular_places_are_few_and_rare_places_many() -> None:
    sizes = [len(ATLAS[level]) for level in LEVELS]
    names = [name for level in LEVELS for name, _ in ATLAS[level]]

    assert sizes == sorted(sizes)
    assert sizes[0] * 10 <= sizes[-1]
    assert len(names) == len(set(names))


def test_an_unknown_split_and_a_negative_count_are_refused_with_a_sentence() -> None:
    with pytest.raises(ValueError, match="split='dev' is unknown; use one of train"):
        generate("dev", 0, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n=-1 is negative"):
        generate("test", 0, -1)
