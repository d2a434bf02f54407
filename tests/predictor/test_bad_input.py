"""Bad input, one case after the other: what a person reads, word for word, and what goes on."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem_router.predictor import artifact, cli, load
from tandem_router.routing.predictor_source import ArtifactPredictor, PredictorUnavailableError

Rows = list[dict[str, Any]]
Make = Callable[..., Rows]
Write = Callable[..., Path]


def graded(rows: Rows, **quality: Any) -> Rows:
    return [{**row, "quality": {**row["quality"], **quality}} for row in rows]


def with_odd_row(rows: Rows, change: dict[str, Any]) -> Rows:
    return [*rows, {**rows[0], **change}]


def opposite(rows: Rows) -> Rows:
    return [{**row, "quality": {t: 1 - q for t, q in row["quality"].items()}} for row in rows]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param(
            lambda rows: [
                {**r, "quality": {"small": 1.0}} if i % 3 else r for i, r in enumerate(rows)
            ],
            "note: tier 'large' is graded on 40 of 120 rows",
            id="missing tiers",
        ),
        pytest.param(
            lambda rows: graded(rows, small=0.25),
            "note: every graded answer of tier 'small' has quality 0.25: its head is a constant; "
            "grade harder prompts to learn where it differs",
            id="constant labels",
        ),
        pytest.param(
            lambda rows: graded(rows, large=1.0),
            "note: every graded answer of tier 'large' has quality 1: its head is a constant; "
            "grade harder prompts to learn where it differs",
            id="one class",
        ),
        pytest.param(
            lambda rows: with_odd_row(rows, {"quality": {"small": float("nan"), "large": 1}}),
            "left out data.jsonl:121: quality.small is nan, not a number; leave the label out if "
            "it is unknown",
            id="NaN",
        ),
        pytest.param(
            lambda rows: with_odd_row(rows, {"quality": {"small": 7, "large": 1}}),
            "left out data.jsonl:121: quality.small=7 is outside 0..1; scale the labels first",
            id="labels outside 0..1",
        ),
        pytest.param(
            lambda rows: with_odd_row(rows, {"prompt": "x" * 10_000_001}),
            "left out data.jsonl:121: its prompt has 10,000,001 characters, more than 10,000,000; "
            "cut it",
            id="a prompt above 10 MB",
        ),
        pytest.param(
            lambda rows: with_odd_row(rows, {"prompt": "word " * 2_000_000}),
            "wrote ",
            id="10 MB prompts",
        ),
        pytest.param(
            lambda rows: with_odd_row(rows, {"prompt": "\x00\x01\x1b[2J\ud800\x7f" * 40}),
            "wrote ",
            id="binary in prompts",
        ),
        pytest.param(
            lambda rows: [
                {**row, "quality": {t: q for t, q in row["quality"].items() if (t == "small") == i}}
                for i, row in zip([True, False] * 60, rows, strict=True)
            ],
            "note: small and large are graded side by side on 0 rows, fewer than 5: whether that "
            "pair is worth routing cannot be judged; grade both tiers' answers to the same prompts",
            id="tiers never graded side by side",
        ),
        pytest.param(
            lambda rows: rows + opposite(rows),
            "note: 120 rows repeat a prompt with other labels; they count as several samples and "
            "stay in one fold",
            id="duplicate prompts with conflicting labels",
        ),
    ],
)
def test_data_that_can_be_learned_from_trains_and_says_what_is_odd(
    change: Callable[[Rows], Rows],
    sentence: str,
    make_outcomes: Make,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "pair.tandem"

    code = train(write(change(make_outcomes(120))), output)

    said = capsys.readouterr()
    assert code == 0
    assert any(line.startswith(sentence) for line in (said.err + said.out).splitlines()), said.err
    assert 0.0 <= load(output).score("What is 12 + 3?").quality["small"] <= 1.0


def train(data: Path, output: Path) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    cli.register(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["train", str(data), "-o", str(output), "--max-bytes", "150000"])
    return int(parsed.run(parsed))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param(
            lambda rows: rows[:3],
            "error: 3 rows with 3 different prompts are too few to train and check on; grade at "
            "least 20, better 500",
            id="three rows in all",
        ),
        pytest.param(
            lambda rows: [{**row, "quality": {"small": 1}} for row in rows],
            "error: the data grades 1 tier(s) (small); a choice needs at least two: add the other "
            "tier's grades under `quality`",
            id="one tier only",
        ),
        pytest.param(
            lambda rows: [{**row, "group": "same"} for row in rows],
            "error: 120 different prompts are in 1 group(s), which are never split; at least 20 "
            "are needed to train and check on: give `group` only to rows that belong together",
            id="all in one group",
        ),
        pytest.param(
            lambda rows: [
                {**row, "group": "g", "quality": {**row["quality"], "mid": i % 2}}
                if i < 30
                else row
                for i, row in enumerate(rows)
            ],
            "error: tier 'mid' is graded on 30 rows of only 1 different prompts or groups; grade "
            "at least 20 different ones, or remove it from the data",
            id="a tier graded in one group only",
        ),
        pytest.param(
            lambda rows: graded(rows, small=float("nan")),
            "error: 120 of 120 rows of ",
            id="NaN everywhere",
        ),
    ],
)
def test_data_nothing_can_be_learned_from_is_one_sentence(
    change: Callable[[Rows], Rows],
    sentence: str,
    make_outcomes: Make,
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = train(write(change(make_outcomes(120))), tmp_path / "pair.tandem")

    said = capsys.readouterr().err
    assert code == 1
    assert said.startswith(sentence)
    assert list(tmp_path.glob("*.tandem")) == []


def of_another_version(content: bytes) -> bytes:
    source = artifact.loads(content)
    return artifact.dumps({**source.meta, "format_version": 1}, source.arrays)


def hostile(content: bytes) -> bytes:
    (size,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + size])
    header["view/0/coef"]["data_offsets"] = [0, 1 << 60]
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + content[8 + size :]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        pytest.param(
            lambda content: content[: len(content) // 2],
            "does not fit the file",
            id="truncated",
        ),
        pytest.param(
            of_another_version,
            "format_version=1 was written by another version of Tandem; this one reads "
            f"{artifact.FORMAT_VERSION}: train again with `tandem train`",
            id="another version",
        ),
        pytest.param(
            hostile, "tensor 'view/0/coef' has no usable data_offsets: damaged", id="hostile"
        ),
        pytest.param(lambda _: b"\x80\x04cos\nsystem\n.", "not an artifact", id="a pickle"),
        pytest.param(lambda _: b"", "truncated: 0 bytes cannot hold a header", id="empty"),
    ],
)
def test_a_bad_artifact_leaves_the_good_one_in_use_and_alone_means_the_fallback(
    damage: Callable[[bytes], bytes],
    sentence: str,
    content: bytes,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "pair.tandem"
    path.write_bytes(content)
    held = ArtifactPredictor(path, ("small", "large"))
    before = held.score("What is 12 + 3?")

    path.write_bytes(damage(content))
    with caplog.at_level(logging.ERROR):
        changed = held.reload()
        alone = ArtifactPredictor(path, ("small", "large"))

    assert not changed
    assert held.score("What is 12 + 3?") == before
    assert f"{path}: " in caplog.text
    assert sentence in caplog.text
    with pytest.raises(PredictorUnavailableError, match=r"pair\.tandem: "):
        alone.score("What is 12 + 3?")
