"""Each row of the threat table names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
HEAD = "| asset | attacker | path | defence | test |"


def rows() -> list[list[str]]:
    """The cells of each row of the table."""
    table = PAGE.split(HEAD, 1)[1].split("\n\n", 1)[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][1:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


ROWS = rows()


def test_the_table_is_read_whole() -> None:
    assert len(ROWS) >= 15
    assert {len(row) for row in ROWS} == {5}
    assert all(cell for row in ROWS for cell in row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_a_threat_names_tests_that_exist(row: list[str]) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row[4])

    assert named, f"{row[0]} has no test"
    for path, function in named:
        file = ROOT / path
        assert file.is_file(), path
        assert re.search(rf"^(async )?def {function or 'test_'}", file.read_text(), re.M), function
