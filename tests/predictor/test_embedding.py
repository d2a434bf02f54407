"""The optional embedding view: token vectors of a local directory, and life without it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tandem_router.predictor import loads
from tandem_router.predictor.reading.embedding import EmbeddingError, StaticEmbedding
from tandem_router.predictor.records.dataset import Dataset
from tandem_router.predictor.training import trainer
from tandem_router.predictor.training.corpus import Corpus
from tandem_router.predictor.training.options import Options
from tandem_router.predictor.training.views import default_views
from tandem_router.routing.predictor_source import ArtifactPredictor

WORDS = ["[UNK]", "what", "is", "which", "crop", "grows", "town", "sum", "give", "the", "year"]


def model_directory(folder: Path, name: str = "model.embed_tokens.weight", seed: int = 0) -> Path:
    folder.mkdir()
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    table = np.random.default_rng(seed).normal(size=(len(WORDS), 6)).astype(np.float32)
    save_file({name: table, "lm_head.weight": table[:2]}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("models") / "tiny-model")


@pytest.fixture(scope="module")
def embedding(directory: Path) -> StaticEmbedding:
    return StaticEmbedding(directory)


@pytest.fixture(scope="module")
def options(small_options: Options, embedding: StaticEmbedding) -> Options:
    return replace(small_options, embedding=embedding)


@pytest.fixture(scope="module")
def content(dataset: Dataset, options: Options) -> bytes:
    return trainer.train(dataset, options).dumps()


def test_a_prompt_is_the_mean_of_its_tokens_rare_ones_count_more(
    embedding: StaticEmbedding, directory: Path
) -> None:
    from safetensors.numpy import load_file

    table = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]

    found = embedding("the crop the year")

    expected = sum(np.log(2 + i) * table[i] for i in (9, 4, 9, 10))
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-6)
    assert embedding("") == pytest.approx(np.zeros(6))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, "bfloat16"])
def test_half_precisions_are_read_alike(tmp_path: Path, dtype: Any) -> None:
    directory = model_directory(tmp_path / "model")
    table = np.ones((len(WORDS), 2), dtype=np.float32) * [1.0, 0.5]
    name = "bert.embeddings.word_embeddings.weight"
    if dtype == "bfloat16":
        upper = (table.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        save_file({name: upper}, directory / "model.safetensors")
        raw = (directory / "model.safetensors").read_bytes().replace(b'"U16"', b'"BF16"')
        raw = (int.from_bytes(raw[:8], "little") + 1).to_bytes(8, "little") + raw[8:]
        (directory / "model.safetensors").write_bytes(raw)
    else:
        save_file({name: table.astype(dtype)}, directory / "model.safetensors")

    found = StaticEmbedding(directory)("the crop")

    np.testing.assert_allclose(found, np.array([2.0, 1.0]) / np.sqrt(5.0), atol=1e-6)


def test_served_numbers_equal_the_estimators_with_the_view(
    content: bytes, dataset: Dataset, options: Options
) -> None:
    predictor = loads(content, options.embedding)
    corpus = Corpus.of([row.prompt for row in dataset.rows], options.embedding)
    with threadpool_limits(limits=1):
        view = default_views(options)["embedding"].fit(corpus, dataset.quality())
    expected = view.predict(corpus)

    for index in range(0, len(dataset.rows), 37):
        _, outputs = predictor.score_with_views(dataset.rows[index].prompt)

        np.testing.assert_allclose(outputs[-1], expected[index], atol=1e-6)
    assert predictor.embedding_problem is None
    assert predictor.view_names[-1] == "embedding"


def test_the_artifact_names_the_model_and_holds_neither_path_nor_weights(
    content: bytes, embedding: StaticEmbedding, directory: Path
) -> None:
    meta = loads(content, embedding).meta

    assert meta["embedding"] == {"name": "tiny-model", "digest": embedding.digest, "width": 6}
    assert str(directory.parent).encode() not in content


def test_without_its_directory_the_view_is_off_and_the_others_go_on_as_if_never_there(
    content: bytes, dataset: Dataset, small_options: Options
) -> None:
    alone = loads(trainer.train(dataset, small_options).dumps())
    without = loads(content)

    assert "'tiny-model', which is not configured" in str(without.embedding_problem)
    for row in dataset.rows[:20]:
        ours, theirs = without.score(row.prompt), alone.score(row.prompt)
        assert ours.quality == pytest.approx(theirs.quality, abs=1e-9)
        assert ours.utility == pytest.approx(theirs.utility, abs=1e-9)


def test_another_model_is_not_taken_for_the_one_trained_with(
    content: bytes, tmp_path: Path
) -> None:
    other = StaticEmbedding(model_directory(tmp_path / "other", seed=1))

    assert "another tokenizer or other vectors" in str(loads(content, other).embedding_problem)


def test_the_router_goes_on_without_a_directory_that_is_gone(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "artifact"
    path.write_bytes(content)

    with caplog.at_level(logging.WARNING):
        held = ArtifactPredictor(path, ("small", "large"), str(tmp_path / "gone"))

    assert 0.0 <= held.score("What is 1 + 2?").quality["small"] <= 1.0
    assert "gone has no tokenizer.json; name a model directory" in caplog.text
    assert "that view is off" in caplog.text


Spoil = Callable[[Path], object]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json; name a model"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read"),
        (lambda d: (d / "model.safetensors").unlink(), r"has 0 \*.safetensors and none holds"),
        (
            lambda d: save_file({"x": np.zeros((2, 2))}, d / "model.safetensors"),
            "none holds a token matrix",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b"PK"), "is no safetensors file"),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"[]"),
            "is no safetensors file",
        ),
        (
            lambda d: (d / "model.safetensors").write_bytes(
                (d / "model.safetensors").read_bytes()[:-40]
            ),
            "does not fit the file",
        ),
        (
            lambda d: save_file(
                {"wte.weight": np.zeros((3, 2), dtype=np.int32)}, d / "model.safetensors"
            ),
            "is I32, not F32, F16 or BF16",
        ),
    ],
)
def test_a_directory_that_will_not_do_is_refused_with_the_way_out(
    tmp_path: Path, spoil: Spoil, message: str
) -> None:
    directory = model_directory(tmp_path / "model")
    spoil(directory)

    with pytest.raises(EmbeddingError, match=message):
        StaticEmbedding(directory)


def test_the_commands_take_the_directory(
    rows: list[dict[str, Any]],
    write: Callable[..., Path],
    directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tandem_operator.cli import main

    path, artifact = write(rows[:120]), tmp_path / "pair.tandem"
    moved = shutil.copytree(directory, tmp_path / "moved" / directory.name)

    trained = main(
        ["train", str(path), "-o", str(artifact), "--embedding", str(directory), "--quiet"]
    )
    plain = main(["score", str(artifact), str(path)])
    said = capsys.readouterr()
    scored = main(["score", str(artifact), str(path), "--embedding", str(moved)])
    quiet = capsys.readouterr()

    assert trained == plain == scored == 0
    assert "that view is off" in said.err
    assert quiet.err == ""
    assert json.loads(quiet.out.splitlines()[0])["quality"].keys() == {"small", "large"}
