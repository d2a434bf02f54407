"""One training row goes from file to file; docs/architecture.md lists them in order."""

from __future__ import annotations

from typing import Any

from journey import Journey
from tandem_router.predictor.records.dataset import Dataset, Row, read_dataset
from tandem_router.predictor.training import trainer
from tandem_router.predictor.training.corpus import Corpus
from tandem_router.predictor.training.options import Options

MARK = "zyxxy"
# How often one comes back to a file at most: the aim, and what the code has.
MOST_RETURNS = 8


def _holds_the_row(value: Any) -> bool:
    """The row in any of its forms: a line, an object, one of the data, one of the prompts read."""
    match value:
        case bytes():
            return MARK.encode() in value
        case str():
            return MARK in value
        case dict():
            return MARK in str(value.get("prompt", ""))
        case Row():
            return MARK in value.prompt
        case Dataset():
            return any(map(_holds_the_row, value.rows))
        case list():
            return any(isinstance(each, str | Row) and _holds_the_row(each) for each in value)
    return isinstance(value, Corpus)


def test_following_a_row_from_its_file_to_the_artifact_one_returns_to_few_files(
    make_outcomes: Any, write: Any
) -> None:
    rows = make_outcomes(60)
    rows[7]["prompt"] = f"What is the {MARK} of 5 and 6?"
    path = write(rows)
    options = Options(num_trees=2, num_folds=2, max_features=300)

    with Journey("router/tandem_router/predictor", _holds_the_row).followed() as journey:
        trainer.train(read_dataset([path]), options)

    assert journey.stations[:3] == ["records/files.py", "records/shapes.py", "records/dataset.py"]
    assert "reading/hand_features.py" in journey.stations
    assert "evaluation/report.py" in journey.stations
    assert len(journey.returns) <= MOST_RETURNS, journey.calls
