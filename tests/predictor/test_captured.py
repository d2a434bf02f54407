"""What is kept of a prompt instead of its text is learned from and scored like the text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.predictor import PredictorError, load
from tandem_router.predictor.cli import main as tandem
from tandem_router.predictor.errors import DataError
from tandem_router.predictor.reading.captured import Captured
from tandem_router.predictor.records import dataset

WORDS = "prove that the integral converges name capital of country please number".split()


@given(st.text(max_size=300))
def test_what_is_kept_is_read_back(text: str) -> None:
    kept = json.loads(json.dumps(Captured.of(text).kept()))
    again = Captured.parse(kept)

    assert again.kept() == kept
    assert again.name == Captured.of(text).name
    assert again.num_chars == pytest.approx(len(text), abs=1.0)


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        {},
        {"hand": [1.0], "word_grams": {}},
        {"hand": [float("nan")] * len(Captured.of("a").hand), "word_grams": {}},
        {"hand": ["a"] * len(Captured.of("a").hand), "word_grams": {}},
        {**Captured.of("a").kept(), "word_grams": {"x": 1}},
        {**Captured.of("a").kept(), "word_grams": {"-1": 1}},
        {**Captured.of("a").kept(), "word_grams": {"1": 0}},
        {**Captured.of("a").kept(), "word_grams": [1]},
    ],
)
def test_damaged_features_are_refused_with_a_sentence(damaged: Any) -> None:
    with pytest.raises(DataError):
        Captured.parse(damaged)


def test_a_predictor_trained_from_features_scores_texts_and_features_alike(tmp_path: Path) -> None:
    rng, rows = random.Random(1), []
    for number in range(120):
        hard = number % 2
        words = [*WORDS[5 * hard : 5 * hard + 5], str(number), rng.choice(WORDS)]
        quality = {"small": float(rng.random() < (0.9 if hard else 0.2)), "large": 1.0}
        rows.append({"features": Captured.of(" ".join(words)).kept(), "quality": quality})
    data, artifact = tmp_path / "rows.jsonl", tmp_path / "artifact"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert tandem(["train", str(data), "-o", str(artifact), "--quiet"]) == 0

    predictor = load(artifact)
    text = " ".join(WORDS[:5])
    assert "chars" not in predictor.view_names
    assert predictor.reads_words_alone
    by_text, by_features = predictor.score(text), predictor.score(Captured.of(text))
    np.testing.assert_allclose(
        list(by_text.quality.values()), list(by_features.quality.values()), atol=1e-4
    )
    assert len(dataset.read_dataset([data]).rows) == 120
    assert tandem(["evaluate", str(artifact), str(data)]) == 0


def test_a_predictor_that_reads_characters_says_that_it_cannot_read_features(
    tmp_path: Path,
) -> None:
    rows = [
        {"prompt": f"{'hard' if i % 2 else 'easy'} question {i}", "quality": {"a": i % 2, "b": 1}}
        for i in range(60)
    ]
    data, artifact = tmp_path / "rows.jsonl", tmp_path / "artifact"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tandem(["train", str(data), "-o", str(artifact), "--quiet"]) == 0

    with pytest.raises(PredictorError, match="only its words were kept"):
        load(artifact).score(Captured.of("a question"))
