"""Reading outcome data: which model answered which prompt how well.

One row is ``{"prompt", "quality": {tier: 0..1 or [samples]}, "output_tokens"?, "cost_usd"?,
"responses"?, "group"?, "task"?}``; JSON lines, the same gzipped, or CSV with dotted column names
(``quality.small``). A row that cannot be used is named by line and reason and left out; more than
1 % of such rows stops, because then the file is probably not what its name says.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tandem_router.predictor.errors import DataError
from tandem_router.predictor.linear_algebra import FloatArray

MAX_UNREADABLE_SHARE = 0.01
MAX_TIERS = 16
MAX_PROMPT_CHARS = 10_000_000
#: A line is one prompt with its answers; a file without line ends must not fill the memory.
MAX_LINE_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Row:
    """One graded prompt. `samples` keeps the graded answers where a tier has several."""

    prompt: str
    quality: dict[str, float]
    samples: dict[str, tuple[float, ...]] = field(default_factory=dict)
    output_tokens: dict[str, float] = field(default_factory=dict)
    responses: dict[str, str] = field(default_factory=dict)
    group: str = ""
    task: str = ""
    line: str = ""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was left out: where, and why."""

    line: str
    reason: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """Usable rows, the tiers they speak of in order of first appearance, and what was left out."""

    rows: tuple[Row, ...]
    tiers: tuple[str, ...]
    rejected: tuple[Rejected, ...]
    digest: str

    def quality(self) -> FloatArray:
        """Labels ``(num_rows, num_tiers)``, NaN where a tier was not graded."""
        return np.array(
            [[row.quality.get(tier, math.nan) for tier in self.tiers] for row in self.rows]
        ).reshape(len(self.rows), len(self.tiers))

    def output_tokens(self) -> FloatArray:
        """Answer lengths ``(num_rows, num_tiers)``, NaN where not given."""
        return np.array(
            [[row.output_tokens.get(tier, math.nan) for tier in self.tiers] for row in self.rows]
        ).reshape(len(self.rows), len(self.tiers))

    def groups(self) -> np.ndarray:
        """A group number per row; rows with the same prompt or the same group share one."""
        parent: dict[str, str] = {}

        def find(name: str) -> str:
            root = name
            while parent.setdefault(root, root) != root:
                root = parent[root]
            while parent[name] != root:
                parent[name], name = root, parent[name]
            return root

        keys = []
        for row in self.rows:
            prompt_key = "p" + _digest(" ".join(row.prompt.split()))
            keys.append(prompt_key)
            if row.group:
                parent[find("g" + row.group)] = find(prompt_key)
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(find(key), len(numbers)) for key in keys], dtype=int)

    def take(self, rows: Sequence[int] | np.ndarray) -> Dataset:
        return Dataset(
            tuple(self.rows[int(i)] for i in rows), self.tiers, self.rejected, self.digest
        )


def _digest(value: str) -> str:
    return hashlib.sha256(value.encode("utf-8", "replace")).hexdigest()[:16]


def read(paths: Sequence[Path], *, need_quality: bool = True) -> Dataset:
    """All usable rows of the files, or a :class:`DataError` that says why they will not do."""
    rows: list[Row] = []
    rejected: list[Rejected] = []
    digest = hashlib.sha256()
    for path in paths:
        for where, value in _records(path, digest):
            if isinstance(value, str):
                rejected.append(Rejected(where, value))
                continue
            try:
                rows.append(parse(value, where, need_quality=need_quality))
            except DataError as error:
                rejected.append(Rejected(where, str(error)))
    total = len(rows) + len(rejected)
    names = ", ".join(str(path) for path in paths)
    if total == 0:
        raise DataError(f"{names} holds no rows; expected one JSON object with a prompt per line")
    if len(rejected) > MAX_UNREADABLE_SHARE * total:
        shown = "\n".join(f"  {item.line}: {item.reason}" for item in rejected[:5])
        raise DataError(
            f"{len(rejected)} of {total} rows of {names} cannot be used, more than "
            f"{MAX_UNREADABLE_SHARE:.0%}; correct them, the first are\n{shown}"
        )
    tiers: dict[str, None] = {}
    for row in rows:
        tiers.update(dict.fromkeys(row.quality))
    if len(tiers) > MAX_TIERS:
        raise DataError(
            f"the data names {len(tiers)} tiers ({', '.join(list(tiers)[:5])}, ...); at most "
            f"{MAX_TIERS} can be told apart: are these tier names?"
        )
    return Dataset(tuple(rows), tuple(tiers), tuple(rejected), digest.hexdigest())


def parse(value: Any, where: str = "", *, need_quality: bool = True) -> Row:
    """One row, checked; the error is the reason without the place."""
    if not isinstance(value, dict):
        raise DataError(f"is a {type(value).__name__}, not an object with a prompt")
    prompt = value.get("prompt")
    if not isinstance(prompt, str):
        raise DataError("has no text under `prompt`")
    if len(prompt) > MAX_PROMPT_CHARS:
        raise DataError(
            f"its prompt has {len(prompt):,} characters, more than {MAX_PROMPT_CHARS:,}; cut it"
        )
    quality: dict[str, float] = {}
    samples: dict[str, tuple[float, ...]] = {}
    for tier, given in _mapping(value, "quality").items():
        if given is None:
            continue
        several = given if isinstance(given, list) else [given]
        numbers = tuple(_unit(number, f"quality.{tier}") for number in several)
        if numbers:
            quality[tier] = sum(numbers) / len(numbers)
            if len(numbers) > 1:
                samples[tier] = numbers
    if need_quality and not quality:
        raise DataError('has no label under `quality`, like {"small": 1, "large": 0.5}')
    tokens: dict[str, float] = {}
    for tier, given in _mapping(value, "output_tokens").items():
        if given is None:
            continue
        number = _number(given, f"output_tokens.{tier}")
        if not 0 <= number <= 1e7:
            raise DataError(f"output_tokens.{tier}={number:g} is not between 0 and 10,000,000")
        tokens[tier] = number
    responses = {
        tier: answer
        for tier, answer in _mapping(value, "responses").items()
        if isinstance(answer, str)
    }
    return Row(
        prompt,
        quality,
        samples,
        tokens,
        responses,
        _name(value.get("group")),
        _name(value.get("task")),
        where,
    )


def _name(value: Any) -> str:
    """A group or task as text; the number 0 is a name like any other."""
    return "" if value is None else str(value)


def _mapping(value: dict[str, Any], name: str) -> dict[str, Any]:
    found = value.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise DataError(f"`{name}` is {_short(found)}, not an object from tier to value")
    for tier in found:
        if not 1 <= len(tier) <= 63:
            raise DataError(f"`{name}` names a tier of {len(tier)} characters; use 1 to 63")
        if not tier.isprintable():
            raise DataError(f"`{name}` names the tier {tier!a}, which cannot be printed; rename it")
    return found


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, int | float):
        raise DataError(f"{name}={_short(value)} is not a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise DataError(f"{name} is too large a number") from error
    if not math.isfinite(number):
        raise DataError(f"{name} is {number}, not a number; leave the label out if it is unknown")
    return number


def _unit(value: Any, name: str) -> float:
    number = _number(value, name)
    if not 0.0 <= number <= 1.0:
        raise DataError(f"{name}={number:g} is outside 0..1; scale the labels first")
    return number


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def _records(path: Path, digest: Any) -> Iterator[tuple[str, Any]]:
    """(place, decoded row) or (place, reason); reads line by line."""
    with _opened(str(path)) as stream:
        if _is_csv(path.name):
            yield from _csv_records(path, stream, digest)
            return
        for number, line in _lines(path, stream):
            digest.update(line)
            if line.strip():
                yield f"{path.name}:{number}", _decode(line)


@contextmanager
def _opened(name: str) -> Iterator[Any]:
    """The bytes of a file, or of standard input for ``-``, unzipped where they are zipped."""
    try:
        with ExitStack() as stack:
            raw: Any = sys.stdin.buffer
            if name != "-":
                raw = stack.enter_context(Path(name).open("rb"))
            zipped = raw.peek(2)[:2] == b"\x1f\x8b"
            yield gzip.GzipFile(fileobj=raw) if zipped else raw
    except FileNotFoundError as error:
        raise DataError(f"{name} does not exist; check the path") from error
    except IsADirectoryError as error:
        raise DataError(f"cannot read {name}: it is a directory; name the files in it") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name} is a damaged gzip file; copy it again") from error
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror}") from error


def _is_csv(name: str) -> bool:
    return name.removesuffix(".gz").endswith(".csv")


def _lines(path: Path, stream: Any) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES), b""), 1):
        if len(line) >= MAX_LINE_BYTES:
            raise DataError(
                f"{path}:{number} has no end within {MAX_LINE_BYTES:,} bytes; expected one row a "
                "line"
            )
        yield number, line


def prompts(name: str, note: Callable[[str], None] = lambda _: None) -> Iterator[str]:
    """The prompts to score in a file (``-``: standard input), in order; blank lines are none.

    JSON lines with a `prompt`, JSON strings or plain text, gzipped or not, or CSV with a column
    `prompt`. A JSON object without a prompt is text like any other, and `note` hears of it.
    """
    path = Path(name)
    with _opened(name) as stream:
        if _is_csv(name):
            for where, record in _csv_records(path, stream, hashlib.sha256()):
                if isinstance(record, str):
                    raise DataError(
                        f"{where} {record}; correct it, a line left out shifts the rest"
                    )
                yield str(record["prompt"] or "")
            return
        for number, raw in _lines(path, stream):
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8", "replace").rstrip("\r\n")
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = line
            prompt = value.get("prompt") if isinstance(value, dict) else value
            if isinstance(value, dict) and not isinstance(prompt, str):
                note(f"note: {name}:{number} has no text under `prompt`; scored as plain text")
            yield prompt if isinstance(prompt, str) else line


def _decode(line: bytes) -> Any:
    try:
        value = json.loads(line)
        return "is text, not an object with a prompt" if isinstance(value, str) else value
    except UnicodeDecodeError:
        return "is not UTF-8 text"
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({str(error)[:80]})"


def _csv_records(path: Path, stream: Any, digest: Any) -> Iterator[tuple[str, Any]]:
    data = stream.read()
    digest.update(data)
    # Bytes that are not UTF-8 become lone surrogates, so that only their row is left out.
    decoded = io.StringIO(data.decode("utf-8-sig", "surrogateescape"))
    csv.field_size_limit(min(sys.maxsize, 8 * MAX_PROMPT_CHARS))
    reader = csv.DictReader(decoded)
    if "prompt" not in (reader.fieldnames or ()):
        raise DataError(f"{path} has no column `prompt`; expected prompt, quality.<tier>, ...")
    try:
        for record in reader:
            yield f"{path.name}:{reader.line_num}", _from_columns(record)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num} is not CSV: {error}") from error


def _from_columns(record: dict[str, Any]) -> Any:
    row: dict[str, Any] = {}
    for column, cell in record.items():
        if cell in (None, "") and column != "prompt":
            continue
        if not isinstance(column, str) or not isinstance(cell, str):
            return "has more cells than the header"
        if not cell.isascii() and any("\udc80" <= char <= "\udcff" for char in cell):
            return f"{column[:40]} is not UTF-8 text"
        name, _, tier = column.partition(".")
        if not tier:
            row[name] = cell
        elif name in ("quality", "output_tokens"):
            try:
                # several samples of one prompt: a JSON list in the cell, like [1, 0, 1]
                number = json.loads(cell) if cell.startswith("[") else float(cell)
            except (ValueError, RecursionError):
                return f"{column}={_short(cell)} is not a number"
            row.setdefault(name, {})[tier] = number
        else:
            row.setdefault(name, {})[tier] = cell
    return row
