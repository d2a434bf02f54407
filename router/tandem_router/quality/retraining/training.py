"""What a predictor is trained from again, and the process that does it.

Labels of live traffic are today's and few, the data of the first training is many and of then: no
more of it is taken than there are labels, and none once a tier's quality has changed since.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tandem_router.predictor import Predictor, PredictorError
from tandem_router.predictor.reading.captured import Captured
from tandem_router.predictor.records import files
from tandem_router.store.records import Label

TRAINING_LIMIT_S = 3600.0
ROWS = "labels.jsonl"

#: Trains from the files into a file; returns why not, or nothing.
Train = Callable[[Sequence[Path], Path], Awaitable[str]]


def usable(label: Label) -> bool:
    """Whether a predictor can be trained from a label, and compared on it."""
    if label.source in ("feedback", "explored") or not label.quality:
        return False
    return isinstance(label.prompt, str) or isinstance(label.features, dict)


def text_of(label: Label) -> str | Captured:
    """What a predictor reads of a usable label. Raises DataError for damaged features."""
    return label.prompt if isinstance(label.prompt, str) else Captured.parse(label.features)


def scored(label: Label, predictor: Predictor) -> Mapping[str, float] | None:
    """What a predictor says of a label's prompt; None where it reads more than was kept."""
    try:
        return predictor.score(text_of(label)).quality
    except PredictorError:
        return None


def rows_of(labels: Sequence[Label]) -> list[dict[str, Any]]:
    """What `tandem train` reads, a row per request; gold labels go before judged ones."""
    rows: dict[str, dict[str, Any]] = {}
    for label in sorted(labels, key=lambda label: (label.gold or label.source == "gold", label.at)):
        kept = {"features": label.features} if label.prompt is None else {"prompt": label.prompt}
        row = rows.setdefault(label.request_id, {**kept, "quality": {}})
        row["quality"] |= dict(label.quality)
    return list(rows.values())


def write_rows(folder: Path, labels: Sequence[Label], data: Path | None) -> Path:
    """One file of labels and of as many rows of the data. Raises OSError, PredictorError."""
    rows = rows_of(labels)
    if data is not None:
        known = [row for _, row in files.read(data, hashlib.sha256()) if isinstance(row, dict)]
        if len(known) > len(rows):
            known = random.Random(0).sample(known, len(rows))
        rows += known
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ROWS
    with path.open("w", encoding="utf-8") as file:
        path.chmod(0o600)
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


async def train_apart(data: Sequence[Path], into: Path) -> str:
    """Train in a process of its own that everything else goes before."""
    code = "import sys; from tandem_router.predictor.cli import main; sys.exit(main(sys.argv[1:]))"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        "train",
        *map(str, data),
        "-o",
        str(into),
        "--quiet",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        os.setpriority(os.PRIO_PROCESS, process.pid, 19)
        async with asyncio.timeout(TRAINING_LIMIT_S):
            _, said = await process.communicate()
    except TimeoutError:
        return f"training took longer than {TRAINING_LIMIT_S:g} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        last = said.decode(errors="replace").strip().splitlines()[-1:]
        return f"training ended with status {process.returncode}: {''.join(last)[:500]}"
    return ""
