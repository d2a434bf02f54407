"""Trains a Router's predictor before its first pod starts, once per content of the data.

`python -m tandem_router.predictor.training_job DATA FOLDER` leaves FOLDER/artifact. A second run
with the same data finds it and does nothing, so that restarts and rollouts do not train again.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

Tandem = Callable[[list[str]], int]


def digest(path: Path) -> str:
    """Digest of a file's content."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def prepare(data: Path, folder: Path, tandem: Tandem) -> int:
    """Make folder/artifact match data; tandem(argv) is that command. The exit status.

    An artifact that an older version wrote and this one cannot read is trained anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = digest(data)
    artifact, mark = folder / "artifact", folder / "data.sha256"
    known = artifact.exists() and mark.exists() and mark.read_text() == wanted
    if known and _readable(artifact, folder, tandem):
        sys.stdout.write(f"{artifact} was trained from this data before\n")
        return 0
    fresh = folder / f"new-{wanted[:12]}"
    _remove(fresh)
    status = tandem(["train", str(data), "-o", str(fresh)])
    if status != 0:
        return status
    mark.unlink(missing_ok=True)
    _remove(artifact)
    fresh.rename(artifact)
    mark.write_text(wanted)
    return 0


def _readable(artifact: Path, folder: Path, tandem: Tandem) -> bool:
    prompt = folder / "prompt.txt"
    prompt.write_text("Is this readable?\n")
    try:
        return tandem(["score", str(artifact), str(prompt)]) == 0
    finally:
        prompt.unlink()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run prepare for DATA and FOLDER; the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if len(args) != 2:
        sys.stderr.write("usage: python -m tandem_router.predictor.training_job DATA FOLDER\n")
        return 2
    from tandem_router.predictor.cli import main as tandem

    try:
        return prepare(Path(args[0]), Path(args[1]), tandem)
    except OSError as error:
        sys.stderr.write(f"{args[0]}: cannot be used: {error.strerror}\n")
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
