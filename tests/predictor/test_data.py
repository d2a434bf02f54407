"""Reading graded answers: formats, groups, and a sentence for each thing that can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem_router.predictor import DataError
from tandem_router.predictor.records import files
from tandem_router.predictor.records.dataset import (
    MAX_PROMPT_CHARS,
    Rejected,
    parse,
    read_dataset,
    read_prompts,
)

GOOD = {"prompt": "What is 2 + 2?", "quality": {"small": 1, "large": 0.5}}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_json_lines_are_read_plain_and_gzipped(write: Callable[..., Path], name: str) -> None:
    found = read_dataset([write([GOOD, GOOD], name)])

    assert found.tiers == ("small", "large")
    np.testing.assert_array_equal(found.quality(), [[1.0, 0.5], [1.0, 0.5]])


def test_csv_has_dotted_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        'prompt,quality.small,quality.large,output_tokens.large,task\n"a, b",1,,12,t\nc,0,0.5,,t\n'
    )

    found = read_dataset([path])

    assert [row.prompt for row in found.rows] == ["a, b", "c"]
    np.testing.assert_array_equal(found.quality(), [[1.0, np.nan], [0.0, 0.5]])
    assert found.rows[0].output_tokens == {"large": 12.0}


def test_what_a_judge_said_may_stand_in_columns_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,quality.small,judged.small\na,1,true\nb,0,\n")

    assert [row.judged for row in read_dataset([path]).rows] == [{"small": 1.0}, {}]


def test_several_samples_are_kept_and_averaged(write: Callable[..., Path]) -> None:
    found = read_dataset([write([{"prompt": "p", "quality": {"small": [1, 0, 1, 1]}}])])

    assert found.rows[0].quality["small"] == 0.75
    assert found.rows[0].samples["small"] == (1.0, 0.0, 1.0, 1.0)


def test_rows_with_the_same_prompt_or_group_share_a_group(write: Callable[..., Path]) -> None:
    rows = [
        {**GOOD, "prompt": "a", "group": "x"},
        {**GOOD, "prompt": "a  ", "group": "y"},
        {**GOOD, "prompt": "b", "group": "y"},
        {**GOOD, "prompt": "c"},
    ]

    groups = read_dataset([write(rows)]).groups()

    assert groups[0] == groups[1] == groups[2] != groups[3]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"quality": {"small": 1}}, "has no text under `prompt`"),
        ({"prompt": 7, "quality": {"small": 1}}, "has no text under `prompt`"),
        ({"prompt": "p"}, "has no label under `quality`"),
        ({"prompt": "p", "quality": {}}, "has no label under `quality`"),
        ({"prompt": "p", "quality": 1}, "not an object from tier to value"),
        ({"prompt": "p", "quality": {"small": 1.5}}, r"quality.small=1.5 is outside 0..1; scale"),
        ({"prompt": "p", "quality": {"small": -1}}, r"quality.small=-1 is outside 0..1"),
        ({"prompt": "p", "quality": {"small": "good"}}, "quality.small='good' is not a number"),
        ({"prompt": "p", "quality": {"s" * 99: 1}}, "tier of 99 characters"),
        (
            {"prompt": "p", "quality": {"small": 1}, "output_tokens": {"small": -3}},
            "output_tokens.small=-3 is not between",
        ),
        (
            {"prompt": "p", "quality": {"small": 1}, "judged": {"small": 2}},
            "judged.small=2 is not between 0 and 1",
        ),
        (["prompt"], "is a list, not an object"),
    ],
)
def test_an_unusable_row_is_named_by_reason(row: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        parse(row)


def test_prompts_that_nobody_graded_are_told_how_to_be(write: Callable[..., Path]) -> None:
    path = write([{"prompt": "p", "reference": "r"}, {"prompt": "q", "reference": "s"}])

    with pytest.raises(DataError, match="2 prompts and no grades") as refused:
        read_dataset([path])

    assert f"tandem grade {path} --router" in str(refused.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "p", "quality": {"small": NaN}}', "quality.small is nan, not a number"),
        (b'{"prompt": "p", "quality": {"small": 1e999}}', "quality.small is inf"),
        (b'{"prompt": "p"', "is not JSON"),
        (b"\xff\xfe\xfa", "is not"),
        (b'"just text"', "is text, not an object"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_one_bad_line_in_many_is_left_out_with_its_place(
    write: Callable[..., Path], line: bytes, reason: str
) -> None:
    found = read_dataset([write([GOOD] * 120 + [line] + [GOOD] * 3)])

    assert len(found.rows) == 123
    assert found.rejected[0].line == "data.jsonl:121"
    assert reason in found.rejected[0].reason


def test_more_than_one_percent_bad_rows_stops(write: Callable[..., Path]) -> None:
    path = write([GOOD] * 50 + [{"prompt": "p", "quality": {"small": 2}}])

    with pytest.raises(DataError, match=r"1 of 51 rows .* more than 1%(.|\n)*data.jsonl:51"):
        read_dataset([path])


def test_a_prompt_beyond_the_limit_is_named() -> None:
    row = {"prompt": "x" * (MAX_PROMPT_CHARS + 1), "quality": {"small": 1}}

    with pytest.raises(DataError, match="10,000,001 characters, more than 10,000,000; cut it"):
        parse(row)


def test_binary_in_a_prompt_is_only_text(write: Callable[..., Path]) -> None:
    found = read_dataset([write([{**GOOD, "prompt": "\x00\x1b[2J\ud800"}])])

    assert len(found.rows) == 1
    assert len(found.groups()) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none.jsonl", "does not exist"),
        (lambda p: p, "it is a directory; name the files in it"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_dataset([make(tmp_path)])


def test_an_empty_file_says_what_was_expected(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="holds no rows; expected one JSON object"):
        read_dataset([write([])])


def test_a_damaged_gzip_file_is_named(write: Callable[..., Path]) -> None:
    path = write([GOOD] * 500, "rows.jsonl.gz")
    path.write_bytes(path.read_bytes()[:60])

    with pytest.raises(DataError, match="damaged gzip"):
        read_dataset([path])


def test_too_many_tiers_are_probably_no_tiers(write: Callable[..., Path]) -> None:
    rows = [{"prompt": "p", "quality": {f"t{i}": 1 for i in range(20)}}]

    with pytest.raises(DataError, match="names 20 tiers"):
        read_dataset([write(rows)])


def test_the_digest_is_of_the_content_not_of_the_packing(write: Callable[..., Path]) -> None:
    plain, packed = write([GOOD], "a.jsonl"), write([GOOD], "a.jsonl.gz")

    assert read_dataset([plain]).digest == read_dataset([packed]).digest


def test_quality_of_json_true_is_one() -> None:
    row = parse(json.loads('{"prompt": "p", "quality": {"small": true, "large": null}}'))

    assert row.quality == {"small": 1.0}


def test_a_group_called_zero_is_a_group(write: Callable[..., Path]) -> None:
    rows = [{**GOOD, "prompt": prompt, "group": 0, "task": 0} for prompt in "abc"]

    found = read_dataset([write(rows)])

    assert len(set(found.groups())) == 1
    assert {row.task for row in found.rows} == {"0"}


@pytest.mark.parametrize("tier", ["\x1b[31msmall", "sm\ud800all", "a\nb"])
def test_a_tier_that_cannot_be_printed_is_refused(tier: str) -> None:
    with pytest.raises(DataError, match="cannot be printed; rename it"):
        parse({"prompt": "p", "quality": {tier: 1}})


def test_a_csv_row_in_another_encoding_is_left_out_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    lines = [b"prompt,quality.small", *[b"p,1"] * 200]
    lines[5] = b"caf\xe9,1"
    path.write_bytes(b"\n".join(lines))

    found = read_dataset([path])

    assert len(found.rows) == 199
    assert found.rejected == (Rejected("rows.csv:6", "prompt is not UTF-8 text"),)


def test_csv_cells_hold_several_samples_as_a_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,quality.small\np,"[1, 0, 1, 1]"\n')

    assert read_dataset([path]).rows[0].samples["small"] == (1.0, 0.0, 1.0, 1.0)


def test_a_file_without_line_ends_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\0" * 5000)

    with pytest.raises(DataError, match=r"rows.jsonl:1 has no end within 1,000 bytes"):
        read_dataset([path])


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.jsonl.gz"])
def test_prompts_are_read_plain_and_gzipped(write: Callable[..., Path], name: str) -> None:
    lines = [b"\xef\xbb\xbf" + b'{"prompt": "a"}', b"", b'"b"', b"c d", b'{"text": "e"}']
    notes: list[str] = []

    found = list(read_prompts(str(write(lines, name)), notes.append))

    assert found == ["a", "b", "c d", '{"text": "e"}']
    assert len(notes) == 1
    assert f"{name}:5 has no text under `prompt`; scored as plain text" in notes[0]


def test_prompts_of_a_csv_file_are_its_column(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text('task,prompt\nt,"a, b"\nt,\n')

    assert list(read_prompts(str(path))) == ["a, b", ""]
