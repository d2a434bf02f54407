"""The numeric estimators keep scikit-learn's conventions; the views learn what they are for."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from tandem_router.predictor.reading import ngrams
from tandem_router.predictor.training import trainer
from tandem_router.predictor.training.combining import MonotoneCalibrator, NonNegativeStack
from tandem_router.predictor.training.corpus import Corpus
from tandem_router.predictor.training.estimators import (
    HandView,
    TextView,
    Tfidf,
    TreeView,
    floor32,
)


@parametrize_with_checks([NonNegativeStack(), MonotoneCalibrator()])
def test_scikit_learn_conventions(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize(
    "view", [Tfidf(), TextView("char"), HandView(columns=("log_chars",)), TreeView(3)]
)
def test_parameters_survive_cloning(view: Any) -> None:
    assert clone(view).get_params() == view.get_params()


def test_the_stack_finds_the_useful_view_and_keeps_weights_non_negative() -> None:
    draw = np.random.default_rng(0)
    truth = draw.normal(size=2000)
    views = np.stack([truth, draw.normal(size=2000), -truth], axis=1)

    fitted = NonNegativeStack().fit(views, truth + 0.1 * draw.normal(size=2000))

    assert (fitted.coef_ >= 0).all()
    assert np.argmax(fitted.coef_) == 0
    assert fitted.coef_[2] == 0.0


def test_a_strong_prior_keeps_the_average() -> None:
    draw = np.random.default_rng(0)
    views = draw.normal(size=(50, 4))

    fitted = NonNegativeStack(strength=1e9).fit(views, views[:, 0])

    np.testing.assert_allclose(fitted.coef_, 0.25, atol=1e-6)


def test_calibration_is_monotone_and_right_on_average() -> None:
    draw = np.random.default_rng(0)
    chance = draw.random(4000)
    label = (draw.random(4000) < chance**2).astype(float)

    fitted = MonotoneCalibrator().fit(chance[:, None], label)
    grid = fitted.predict(np.linspace(-1, 2, 50)[:, None])

    assert (np.diff(grid) >= 0).all()
    assert np.abs(fitted.predict(chance[:, None]) - chance**2).mean() < 0.03


def test_tfidf_equals_scikit_learn() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    prompts = ["the cat sat on the mat", "a cat and a dog", "dogs sat", "the mat and the dog"]
    reference = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, min_df=2, token_pattern=r"[^\W\d_]+"
    ).fit_transform(prompts)

    own = Tfidf("word", min_df=2).fit(Corpus.of(prompts)).transform(Corpus.of(prompts))

    dense = own.toarray()
    assert dense.shape == reference.shape
    np.testing.assert_allclose(dense @ dense.T, (reference @ reference.T).toarray(), atol=1e-6)


def test_missing_labels_leave_each_column_to_its_own_rows() -> None:
    corpus = Corpus.of([f"add {i} and {i * 7}" for i in range(60)])
    labels = np.random.default_rng(0).random((60, 2))
    holed = labels.copy()
    holed[::2, 1] = np.nan

    for view in (TextView("word", "squared"), HandView(), TreeView(num_trees=5)):
        full, partial = clone(view).fit(corpus, labels), clone(view).fit(corpus, holed)
        alone = clone(view).fit(corpus.take(np.arange(1, 60, 2)), labels[1::2])

        assert np.isfinite(partial.predict(corpus)).all()
        if not isinstance(view, TreeView):  # a shared forest splits for both columns
            np.testing.assert_allclose(partial.predict(corpus)[:, 0], full.predict(corpus)[:, 0])
        assert alone.predict(corpus).shape == (60, 2)


def test_one_class_gives_a_constant_head() -> None:
    corpus = Corpus.of([f"question {i}" for i in range(30)])

    fitted = TextView("word", "logistic").fit(corpus, np.ones((30, 1)))

    np.testing.assert_allclose(fitted.predict(corpus), 0.999, atol=1e-6)


def test_thresholds_round_down_so_that_float32_prompts_fall_alike() -> None:
    values = np.random.default_rng(0).normal(size=1000) * 10.0 ** np.arange(-5, 5).repeat(100)

    rounded = floor32(values)

    assert (rounded.astype(np.float64) <= values).all()
    assert (np.nextafter(rounded, np.float32(np.inf)).astype(np.float64) > values).all()


def test_folds_keep_groups_whole_and_even() -> None:
    groups = np.random.default_rng(0).integers(0, 40, 300)

    folds = trainer.fold_of(groups, 5, seed=3)

    for group in range(40):
        assert len(np.unique(folds[groups == group])) <= 1
    assert np.ptp(np.bincount(folds)) <= np.bincount(groups).max()


def tokens_of(prompt: str) -> list[str]:
    found = ngrams.read(prompt)
    return [found.text[a:b] for a, b in zip(found.starts, found.ends, strict=True)]


def test_hashes_of_words_and_characters_do_not_depend_on_the_process() -> None:
    found = ngrams.word_grams(ngrams.read("Add 567"), 2).tolist()

    assert found == [2258161457, 1183997863, 3500870704]
    assert len(ngrams.char_grams(ngrams.read("a"), 3, 5)) == 1


def test_a_prompt_is_words_numbers_and_single_symbols() -> None:
    assert tokens_of("Add 12 and 4,567!") == ["Add", "12", "and", "4", ",", "567", "!"]
    assert tokens_of("don’t — ÉCOLE_été 漢字") == ["don", "’", "t", "—", "ÉCOLE", "été", "漢字"]


@given(prompt=st.text(max_size=60))
def test_tokens_are_those_of_the_regular_expression(prompt: str) -> None:
    basic = "".join(char if ord(char) <= 0xFFFF else "\uffff" for char in prompt)

    assert tokens_of(basic) == re.findall(r"[^\W\d_]+|\d+|[^\w\s]", basic)


@given(words=st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=2, max_size=30))
def test_equal_words_and_pairs_have_equal_hashes_wherever_they_stand(words: list[str]) -> None:
    found = ngrams.read(" ".join(words))
    pairs = ngrams.word_grams(found, 2)[len(words) :]

    of_word = dict(zip(words, found.hashes.tolist(), strict=True))
    of_pair = dict(zip(itertools.pairwise(words), pairs.tolist(), strict=True))

    assert found.hashes.tolist() == [of_word[word] for word in words]
    assert pairs.tolist() == [of_pair[pair] for pair in itertools.pairwise(words)]
    assert len(set(of_word.values())) == len(of_word)
    assert len(set(of_pair.values())) == len(of_pair)


def test_case_and_the_value_of_long_numbers_do_not_matter() -> None:
    def hashes(prompt: str) -> list[int]:
        return ngrams.read(prompt).hashes.tolist()

    assert hashes("ADD École 1234") == hashes("add éCOLE 9876")
    assert hashes("12") != hashes("13")
    assert hashes("1234") != hashes("12345")


def test_ascii_and_other_text_are_read_alike() -> None:
    plain = 'Solve 3/4 + 12.5, then say "done" to Mary Ann? A) yes\nB) no'
    mixed = ngrams.read(plain + " é")

    count = len(ngrams.read(plain).hashes)

    assert ngrams.read(plain).hashes.tolist() == mixed.hashes.tolist()[:count]
