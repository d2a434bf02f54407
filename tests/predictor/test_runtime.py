"""Serving: the artifact answers like the estimators it came from, whatever the prompt."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from tandem_router.predictor import ArtifactError, Predictor, artifact, load
from tandem_router.predictor.reading import hand_features, ngrams
from tandem_router.predictor.records.dataset import Dataset
from tandem_router.predictor.training import stacking
from tandem_router.predictor.training.corpus import Corpus
from tandem_router.predictor.training.options import Options
from tandem_router.predictor.training.views import default_views


def test_served_numbers_equal_the_estimators(
    predictor: Predictor, dataset: Dataset, small_options: Options
) -> None:
    corpus = Corpus.of([row.prompt for row in dataset.rows])
    labels = dataset.quality()
    with threadpool_limits(limits=1):  # as in training: a sum's last bit depends on threads
        fitted = {
            name: view.fit(corpus, labels).predict(corpus)
            for name, view in default_views(small_options).items()
        }

    for index in range(0, len(dataset.rows), 17):
        _, outputs = predictor.score_with_views(dataset.rows[index].prompt)
        for position, name in enumerate(predictor.view_names):
            np.testing.assert_allclose(outputs[position], fitted[name][index], atol=1e-6, rtol=0)


def test_gain_is_the_difference_of_the_qualities_and_antisymmetric(
    predictor: Predictor, dataset: Dataset
) -> None:
    for row in dataset.rows[:40]:
        score = predictor.score(row.prompt)

        assert score.gain(("small", "large")) == -score.gain(("large", "small"))
        inside = all(0.0 < value < 1.0 for value in score.quality.values())
        if inside:
            difference = score.quality["large"] - score.quality["small"]
            assert score.gain(("small", "large")) == pytest.approx(difference, abs=1e-9)


def test_long_sums_are_worth_the_large_tier_and_short_ones_are_not(predictor: Predictor) -> None:
    short = predictor.score("What is 3 + 5? Give the sum only.")
    long = predictor.score("What is 48213377 + 90127741? Give the sum only.")

    assert short.gain(("small", "large")) < 0.25 < long.gain(("small", "large"))
    assert short.difficulty < long.difficulty


def test_output_token_quantiles_are_ordered_and_follow_the_prompt(predictor: Predictor) -> None:
    short = predictor.score("What is 3 + 5? Give the sum only.")
    long = predictor.score("What is 48213377 + 90127741? Give the sum only.")

    assert short.output_tokens is not None
    assert long.output_tokens is not None
    for low, middle, high in [*short.output_tokens.values(), *long.output_tokens.values()]:
        assert 0.0 <= low <= middle <= high
    assert short.output_tokens["small"][1] + 5 < long.output_tokens["small"][1]


def test_prompts_unlike_the_training_data_are_flagged(predictor: Predictor) -> None:
    foreign = "def f(x):\n  return {k: v for k, v in x.items()}  # обратный порядок ключей словаря"

    assert predictor.score(foreign).out_of_distribution
    assert not predictor.score("What is 312 + 754? Give the sum only.").out_of_distribution


@pytest.mark.parametrize("prompt", ["", " \n\t "])
def test_a_prompt_that_says_nothing_is_unlike_all_others(predictor: Predictor, prompt: str) -> None:
    assert predictor.score(prompt).out_of_distribution


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " ",
        "\x00\x01\xff" * 50,
        "\ud800 lone surrogate",
        "7" * 40_000,
        "a" * 10_000_000,
        "\n" * 99,
    ],
    ids=["empty", "space", "binary", "surrogate", "digits", "10 MB", "newlines"],
)
def test_absurd_prompts_are_scored_within_bounds(predictor: Predictor, prompt: str) -> None:
    score = predictor.score(prompt)

    assert set(score.quality) == {"small", "large"}
    assert all(0.0 <= value <= 1.0 for value in score.quality.values())
    assert -1.0 <= score.gain(("small", "large")) <= 1.0


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(max_size=400))
def test_any_text_gets_finite_numbers(predictor: Predictor, prompt: str) -> None:
    row = hand_features.features(ngrams.read(prompt))
    score = predictor.score(prompt)

    assert np.isfinite(row).all()
    assert np.isfinite([*score.quality.values(), *score.utility.values(), score.novelty]).all()


def cpu_s(predictor: Predictor, prompt: str) -> float:
    """The least CPU time of seven runs: what the work costs without what disturbs it."""
    times = []
    for _ in range(7):
        start = time.thread_time()
        predictor.score(prompt)
        times.append(time.thread_time() - start)
    return min(times)


def test_work_per_prompt_does_not_grow_with_its_length(predictor: Predictor) -> None:
    words = "the sum of many numbers and words is unknown to most people 1234 " * 20_000

    assert cpu_s(predictor, words) < 4.0 * cpu_s(predictor, words[:6_000]) + 0.002


@pytest.mark.parametrize(
    "unit", ["\n", " ", "\n ", "7", "1,", "'", '"a', "A. ", "$", "-", "/1", "\\", "é", "\n- "]
)
def test_no_repetition_makes_a_pattern_slow(predictor: Predictor, unit: str) -> None:
    words = "the sum of many numbers and words is unknown to most people 1234 " * 100

    assert cpu_s(predictor, unit * 5_000) < 5.0 * cpu_s(predictor, words) + 0.002


def test_serving_imports_neither_scikit_learn_nor_scipy() -> None:
    code = (
        "import sys, tandem_router.predictor, tandem_router.predictor.cli;"
        "print(sorted({'sklearn', 'scipy', 'torch'} & set(sys.modules)))"
    )

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert result.stdout.strip() == "[]", result.stderr


def test_a_mounted_folder_with_one_artifact_loads(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "predictor").write_bytes(content)
    (tmp_path / "..data").mkdir()

    assert load(tmp_path).tiers == ("small", "large")


def test_a_missing_artifact_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist; make it with `tandem train`"):
        load(tmp_path / "none")


def test_served_qualities_equal_the_stack_of_the_training(
    predictor: Predictor, content: bytes, dataset: Dataset
) -> None:
    arrays = artifact.loads(content).arrays
    stack = stacking.Stack(
        arrays["stack/quality"],
        arrays["stack/quality_bias"],
        arrays["stack/utility"],
        arrays["stack/utility_bias"],
        tuple((arrays[f"calibration/{i}/x"], arrays[f"calibration/{i}/y"]) for i in range(2)),
        ((arrays["steps/0/x"], arrays["steps/0/y"]),),
        {},
    )

    for row in dataset.rows[:50]:
        score, outputs = predictor.score_with_views(row.prompt)
        quality, utility = stack.apply(outputs[None])
        np.testing.assert_allclose(list(score.quality.values()), quality[0], atol=1e-9)
        np.testing.assert_allclose(list(score.utility.values()), utility[0], atol=1e-9)
