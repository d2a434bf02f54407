"""benchmarks/README.md leads to every script, and each answers --help; it counts faults right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
sys.path.append(str(FOLDER))

from faulty_day.schedule import OF_PROVIDERS, OF_WORKERS  # noqa: E402

README = (FOLDER / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(
    path.name for path in FOLDER.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_listed_and_says_what_it_takes(name: str) -> None:
    assert f"python benchmarks/{name}" in README
    assert ".parse_args(" in (FOLDER / name).read_text(encoding="utf-8")


def test_the_page_counts_the_kinds_of_faults() -> None:
    said = f"{len(OF_PROVIDERS)} kinds of faults of providers and {len(OF_WORKERS)} of workers"

    assert said in README
