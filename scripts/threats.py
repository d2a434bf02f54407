"""Breaks the defence of each threat in docs/security.md, one after the other: its test has to fail.

usage: threats.py [--only WORD]

A line of a copy of this tree is changed, the named tests are run there, and the line is put back.
Exit status 1 where tests still pass: then nothing shows what the row says. Minutes, not seconds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
LISTED = Path(__file__).with_name("threats.yaml")


class Mutation(NamedTuple):
    """asset: how the row of the threat begins; then what is changed, and what has to notice."""

    asset: str
    file: str
    line: str
    broken: str
    tests: str


def mutations() -> list[Mutation]:
    """All of them, as `threats.yaml` lists them."""
    return [Mutation(**each) for each in yaml.safe_load(LISTED.read_text())]


def tried(tree: Path, mutation: Mutation) -> str | None:
    """What is wrong: the line is not there once, or nothing fails without it; None where it is."""
    file = tree / mutation.file
    before = file.read_text()
    if before.count(mutation.line) != 1:
        return f"{mutation.file} holds {before.count(mutation.line)} times {mutation.line!r}"
    file.write_text(before.replace(mutation.line, mutation.broken))
    try:
        found = [str(tree / part) for part in ("operator", "router", "worker", "kernels")]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
             *mutation.tests.split()],
            cwd=tree, capture_output=True, text=True, timeout=900,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(found)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None  # what is not bounded any more need not come back
    finally:
        file.write_text(before)
    if done.returncode == 1:
        return None
    return f"{mutation.tests} ended with {done.returncode}: {done.stdout[-300:]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="rows whose asset holds this word")
    args = parser.parse_args(argv)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in listed.stdout.splitlines():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                shutil.copy(ROOT / name, tree / name)
        for mutation in mutations():
            if args.only not in mutation.asset:
                continue
            why = tried(tree, mutation)
            wrong += why is not None
            print(f"{mutation.asset}, {mutation.file}: {why or 'is noticed'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
