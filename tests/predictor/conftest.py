"""A small synthetic pair of models: the small one fails at long sums, the large one rarely."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem_router.predictor import Predictor, loads
from tandem_router.predictor.records.dataset import Dataset, read_dataset
from tandem_router.predictor.training import trainer
from tandem_router.predictor.training.options import Options

SMALL = Options(num_trees=12, num_folds=3, max_features=3000)


def outcomes(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Graded prompts: sums of 1 to 8 digits and recall questions about places."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        digits = draw.randint(1, 8)
        if draw.random() < 0.5:
            a, b = (draw.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
            prompt = f"What is {a} + {b}? Give the sum only."
            small, large, task = 1.1 - digits / 7.0, 1.0 - digits / 60.0, "sums"
        else:
            place = draw.choice(["Calby", "Norford", "Elholm", "Selwick", "Ostness", "Felmouth"])
            prompt = f"Which crop grows around the town of {place} in the year {1900 + index}?"
            small, large, task = 0.55, 0.6, "recall"
        rows.append(
            {
                "prompt": prompt,
                "quality": {
                    "small": float(draw.random() < small),
                    "large": float(draw.random() < large),
                },
                "output_tokens": {"small": 4 + 3 * digits, "large": 20 + draw.randint(0, 9)},
                "task": task,
            }
        )
    return rows


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    return outcomes(400)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (objects, or raw lines) to a JSON lines file."""

    def writer(lines: list[Any], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        raw = b"".join(
            (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n"
            for line in lines
        )
        path.write_bytes(gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw)
        return path

    return writer


@pytest.fixture(scope="session")
def dataset(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("outcomes") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_dataset([path])


@pytest.fixture(scope="session")
def trained(dataset: Dataset) -> trainer.Trained:
    return trainer.train(dataset, SMALL)


@pytest.fixture(scope="session")
def content(trained: trainer.Trained) -> bytes:
    return trained.dumps()


@pytest.fixture(scope="session")
def predictor(content: bytes) -> Predictor:
    return loads(content)


@pytest.fixture(scope="session")
def small_options() -> Options:
    return SMALL


@pytest.fixture(scope="session")
def make_outcomes() -> Callable[..., list[dict[str, Any]]]:
    return outcomes
