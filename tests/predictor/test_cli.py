"""The commands a person types: train, evaluate, score; no stack trace reaches them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem_router.predictor import cli

Write = Callable[..., Path]


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    cli.register(parser.add_subparsers(required=True))
    parsed = parser.parse_args([str(argument) for argument in arguments])
    return int(parsed.run(parsed))


@pytest.fixture(scope="module")
def artifact_path(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "pair.tandem"
    path.write_bytes(content)
    return path


def test_train_writes_an_artifact_and_says_what_it_is_worth(
    write: Write, rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[Any] = [*rows[:150], {"prompt": 3}]
    output = tmp_path / "pair.tandem"

    code = run("train", write(lines), "-o", output, "--max-bytes", 200_000)

    said = capsys.readouterr()
    assert code == 0
    assert output.stat().st_size <= 200_000
    assert "small -> large" in said.out
    assert "left out data.jsonl:151: has no text under `prompt`" in said.err


def test_evaluate_writes_text_json_and_a_page(
    artifact_path: Path,
    write: Write,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = tmp_path / "report.json", tmp_path / "report.html"

    code = run(
        "evaluate", artifact_path, write(rows[:100]), "--json", where[0], "--html", where[1],
        "--bootstrap", 10,
    )  # fmt: skip

    assert code == 0
    assert "oracle" in capsys.readouterr().out
    assert json.loads(where[0].read_text())["data"]["num_rows"] == 100
    assert where[1].read_text().startswith("<!doctype html>")


def test_score_writes_one_line_per_prompt_in_order(
    artifact_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(
        b'{"prompt": "What is 2 + 3?"}\nplain text\n\n"a string"\n{"broken": \n\xff\xfe\n[1]\n'
    )

    code = run("score", artifact_path, prompts)

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 0
    assert len(lines) == 6
    for line in lines:
        assert set(line["quality"]) == {"small", "large"}
        assert set(line["gain"]) == {"small -> large"}
        assert len(line["output_tokens"]["large"]) == 3
        assert isinstance(line["out_of_distribution"], bool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{none}", "-o", "{out}"], "does not exist"),
        (["train", "{data}", "-o", "{none}/x/y"], "does not exist; make it first"),
        (["train", "{data}", "-o", "{out}", "--html", "{out}"], "name K, say 5"),
        (["train", "{data}", "-o", "{out}"], "3 rows with 3 different prompts are too few"),
        (["evaluate", "{none}", "{data}"], "make it with `tandem train`"),
        (["evaluate", "{data}", "{data}"], "not an artifact"),
        (["score", "{artifact}", "{none}"], "does not exist; check the path"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    arguments: list[str],
    message: str,
    artifact_path: Path,
    write: Write,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {
        "none": tmp_path / "none",
        "out": tmp_path / "out",
        "data": write(rows[:3]),
        "artifact": artifact_path,
    }

    code = run(*(argument.format(**places) for argument in arguments))

    said = capsys.readouterr().err
    assert code == 1
    assert said.startswith("error: ")
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "option",
    [
        ("--seed", "-1"),
        ("--seed", str(2**32)),
        ("--seed", "x"),
        ("--max-features", "0"),
        ("--max-bytes", "-10"),
        ("--cross-validate", "0"),
        ("--cross-validate", "1"),
    ],
)
def test_a_number_that_cannot_work_is_refused_by_name(
    option: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("train", tmp_path / "none", "-o", tmp_path / "out", *option)

    said = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option[0]}: {option[1]!r} is not a whole number from" in said


@pytest.mark.parametrize("where", ["--json", "--html", "-o"])
def test_what_cannot_be_written_is_said_before_anything_is_read(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"-o": tmp_path / "out", where: tmp_path}
    places = [item for pair in paths.items() for item in pair]

    code = run("train", tmp_path / "none", *places, "--cross-validate", 2)

    assert code == 1
    assert capsys.readouterr().err == (
        f"error: cannot write {tmp_path}: it is a directory; name a file in it\n"
    )


def test_prompts_that_no_encoding_can_write_still_make_a_page(
    artifact_path: Path, write: Write, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    odd = [{**row, "prompt": "\ud800\x00\x1b" + row["prompt"]} for row in rows[:60]]

    code = run(
        "evaluate", artifact_path, write(odd), "--html", tmp_path / "r.html", "--bootstrap", 0
    )

    assert code == 0
    assert "most surprising" in (tmp_path / "r.html").read_text()


def test_impossible_cross_validation_is_said_before_training(
    write: Write, rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apart = [
        {**row, "quality": {"small" if i % 2 else "large": 1}} for i, row in enumerate(rows[:80])
    ]
    few = [{**row, "quality": {**row["quality"], "mid": 1}} for row in rows[:22]] + rows[22:80]

    codes = [
        run("train", write(lines), "-o", tmp_path / "out", "--cross-validate", 2)
        for lines in (apart, few)
    ]

    said = capsys.readouterr().err.splitlines()
    assert codes == [1, 1]
    assert not (tmp_path / "out").exists()
    assert said[0].startswith(
        "error: cross-validation has nothing to judge: large and small are graded side by side on "
        "0 rows"
    )
    assert said[1].startswith("error: without part 1 of 2, tier 'mid' is graded on ")


def test_grades_of_a_tier_the_predictor_does_not_know_are_named(
    artifact_path: Path,
    write: Write,
    rows: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = [{**row, "quality": {**row["quality"], "mid": 1}} for row in rows[:40]]

    code = run("evaluate", artifact_path, write(more), "--bootstrap", 0)

    assert code == 0
    assert "note: the predictor does not know mid; those grades are not used" in (
        capsys.readouterr().err
    )


def test_evaluate_says_when_the_prompts_are_not_those_it_was_trained_on(
    artifact_path: Path,
    write: Write,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Good figures on other traffic say little, and bad ones have a reason."""
    poems = [
        {**row, "prompt": f"Write a poem about the sea, number {i}, in a quiet tone."}
        for i, row in enumerate(rows[:120])
    ]
    said, report = [], tmp_path / "report.json"
    for data in (poems, rows[::3]):
        code = run(
            "evaluate", artifact_path, write(data), "--bootstrap", 0, "--json", report
        )  # fmt: skip
        assert code == 0
        said.append((capsys.readouterr().err, json.loads(report.read_text())["drift"]))

    (moved, index), (stayed, _) = said
    assert "these prompts are not like those the predictor was trained on (" in moved
    assert max(index.values()) > 0.25
    assert "not like those" not in stayed
