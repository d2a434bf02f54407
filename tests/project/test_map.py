"""docs/architecture.md leads somewhere: every file and folder that its tables name is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAP = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROWS = [line for line in MAP.splitlines() if line.startswith("| ") and "`" in line]
NAMED = re.compile(r"`([A-Za-z0-9_./-]+(?:\.py|\.md|\.yaml|\.sh|/))`")


def test_every_file_of_the_map_is_there() -> None:
    """A row names a file whole, or by its end where the row's first name says the rest."""
    folders = (
        "operator",
        "router",
        "worker",
        "kernels",
        "scripts",
        "tests",
        "docs",
        "charts",
        "examples",
    )
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*")]
    ends = {f"/{p.relative_to(ROOT).as_posix()}{'/' if p.is_dir() else ''}" for p in paths}
    names = {name for row in ROWS for name in NAMED.findall(row)}
    lost = [n for n in sorted(names) if not any(end.endswith(f"/{n}") for end in ends)]

    assert len(names) > 100
    assert lost == []
