"""Each row of the threat table names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

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


MUTATIONS = yaml.safe_load((ROOT / "scripts" / "threats.yaml").read_text())


def test_the_defence_of_every_threat_is_taken_away_by_somebody() -> None:
    """`scripts/threats.py` shows of each, in minutes, that the row's tests notice."""
    assert {each["asset"] for each in MUTATIONS} == {row[0] for row in ROWS}


@pytest.mark.parametrize(
    "mutation", MUTATIONS, ids=lambda each: f"{each['file']}: {each['asset'][:30]}"
)
def test_a_defence_stands_where_it_is_looked_for(mutation: dict[str, str]) -> None:
    shown_by = next(row[4] for row in ROWS if row[0] == mutation["asset"])

    assert (ROOT / mutation["file"]).read_text().count(mutation["line"]) == 1
    for path in re.findall(r"tests/\S+\.py", mutation["tests"]):
        assert path in shown_by
