"""How a file becomes records, each with its place: JSON lines, a JSON list, or a table.

A table is CSV or TSV, by name in any case (`.csv`, `.TSV`, `.csv.gz`), with the delimiter that its
header uses most; dotted columns (`quality.small`) become nested values, True and False become 1
and 0. A record that cannot be decoded comes as the reason.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tandem_router.predictor.errors import DataError

MAX_PROMPT_CHARS = 10_000_000
#: A line is one prompt with its answers; a file without line ends must not fill the memory.
MAX_LINE_BYTES = 100_000_000
#: Columns of ours, recognised in any case.
_OURS = (
    "prompt",
    "messages",
    "conversations",
    "quality",
    "output_tokens",
    "cost_usd",
    "responses",
    "judged",
    "group",
    "task",
    "id",
    "reference",
    "grader",
)
_NUMBERS = ("quality", "output_tokens", "cost_usd", "judged")
_TRUTH = {"true": 1.0, "false": 0.0}


@contextmanager
def opened(name: str) -> Iterator[Any]:
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


def lines(path: Path, stream: Any) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of every line; a DataError where one has no end."""
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES), b""), 1):
        if len(line) >= MAX_LINE_BYTES:
            raise DataError(
                f"{path}:{number} has no end within {MAX_LINE_BYTES:,} bytes; expected one row a "
                "line"
            )
        yield number, line


def is_table(name: str) -> bool:
    return name.lower().removesuffix(".gz").endswith((".csv", ".tsv"))


def read(path: Path, digest: Any) -> Iterator[tuple[str, Any]]:
    """(place, decoded record) or (place, reason as text); `digest` hears every byte."""
    with opened(str(path)) as stream:
        if is_table(path.name):
            yield from table(path, stream, digest)
        elif path.name.lower().removesuffix(".gz").endswith(".json"):
            yield from _document(path, stream, digest)
        else:
            yield from _json_lines(path, lines(path, stream), digest)


def _json_lines(
    path: Path, numbered: Iterator[tuple[int, bytes]], digest: Any
) -> Iterator[tuple[str, Any]]:
    for number, line in numbered:
        digest.update(line)
        if line.strip():
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            yield f"{path.name}:{number}", _decode(content)


def _document(path: Path, stream: Any, digest: Any) -> Iterator[tuple[str, Any]]:
    """A `.json` file: one list of records, or JSON lines under that name."""
    data = stream.read(MAX_LINE_BYTES)
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, list):
        digest.update(data)
        for index, value in enumerate(whole, 1):
            text = "is text, not an object with a prompt"
            yield f"{path.name}[{index}]", text if isinstance(value, str) else value
        return
    if len(data) >= MAX_LINE_BYTES:
        raise DataError(f"{path} is larger than {MAX_LINE_BYTES:,} bytes; make it JSON lines")
    yield from _json_lines(path, iter(enumerate(data.splitlines(keepends=True), 1)), digest)


def _decode(line: bytes) -> Any:
    try:
        value = json.loads(line)
        return "is text, not an object with a prompt" if isinstance(value, str) else value
    except UnicodeDecodeError:
        return "is not UTF-8 text"
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({str(error)[:80]})"


def table(path: Path, stream: Any, digest: Any) -> Iterator[tuple[str, Any]]:
    """Records of a table with a header; values are text but for the columns of numbers."""
    data = stream.read()
    digest.update(data)
    # Bytes that are not UTF-8 become lone surrogates, so that only their row is left out.
    text = data.decode("utf-8-sig", "surrogateescape")
    csv.field_size_limit(min(sys.maxsize, 8 * MAX_PROMPT_CHARS))
    delimiter = _delimiter(path.name, text)
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    try:
        reader.fieldnames = [_column(name) for name in reader.fieldnames or ()]
        for record in reader:
            yield f"{path.name}:{reader.line_num}", _from_columns(record, delimiter)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num} is not CSV: {error}") from error


def _delimiter(name: str, text: str) -> str:
    """The delimiter that the header uses most; a .tsv file's is the tab, should none be used."""
    header = text[:100_000].splitlines()[0] if text else ""
    tab_first = name.lower().removesuffix(".gz").endswith(".tsv")
    candidates = ("\t", ",", ";") if tab_first else (",", ";", "\t")
    return max(candidates, key=header.count)


def _column(name: str) -> str:
    """A header's name, ours in lower case: `Prompt` is `prompt`, `Quality.Small` keeps `Small`."""
    stripped = name.strip()
    first, dot, rest = stripped.partition(".")
    return first.lower() + dot + rest if first.lower() in _OURS else stripped


def _from_columns(record: dict[str, Any], delimiter: str) -> Any:
    row: dict[str, Any] = {}
    for column, cell in record.items():
        if cell in (None, "") and column != "prompt":
            continue
        if not isinstance(column, str) or not isinstance(cell, str | None):
            return "has more cells than the header"
        if cell is None:
            row[column] = None
            continue
        if not cell.isascii() and any("\udc80" <= char <= "\udcff" for char in cell):
            return f"{column[:40]} is not UTF-8 text"
        name, _, tier = column.partition(".")
        if not tier or name not in (*_NUMBERS, "responses"):
            row[column] = cell
        elif name in _NUMBERS:
            number = _number(cell.strip(), delimiter)
            if number is None:
                return f"{column}={_short(cell)} is not a number"
            row.setdefault(name, {})[tier] = number
        else:
            row.setdefault(name, {})[tier] = cell
    return row


def _number(cell: str, delimiter: str) -> Any:
    """A cell's number, or a list of them: several samples of one prompt, like [1, 0, 1]."""
    truth = _TRUTH.get(cell.lower())
    if truth is not None:
        return truth
    if delimiter != "," and cell.count(",") == 1 and "." not in cell and "[" not in cell:
        cell = cell.replace(",", ".")
    try:
        return json.loads(cell) if cell.startswith("[") else float(cell)
    except (ValueError, RecursionError):
        return None


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
