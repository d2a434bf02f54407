"""Requests to replay: public traces, one's own JSON lines, and generators.

Every reader yields :class:`Arrival` in order of time, one at a time, so that a million of them
need no memory.
"""

from __future__ import annotations

import csv
import datetime
import json
import math
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tandem_router.policy import Score

MOST_TOKENS = 10_000_000
"""Of a prompt or an answer."""
_UNREADABLE = (KeyError, TypeError, ValueError, OverflowError, RecursionError, AttributeError)


class TraceError(ValueError):
    """A trace cannot be read; the message names the file, the line and what was expected."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace.

    Attributes:
        at_s: Since the first request.
        prompt_tokens: Length of the prompt.
        output_tokens: Length of the answer by tier name; under "" for every other tier.
        prefix: Ids of the prompt's blocks of ``block_tokens`` tokens: equal ids in front mean an
            equal prefix. Empty where the trace does not say.
        quality: True quality of each tier's answer, 0 to 1; empty where unknown.
        predicted: What the predictor says of them; empty: nothing.
        tier: Forced, or None.
        expected_tokens: Predicted length of the answer, or None.
        predicted_tokens: Lengths that the predictor expects of each tier's answer; they price the
            choice.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: Mapping[str, int]
    prefix: tuple[int, ...] = ()
    block_tokens: int = 512
    quality: Mapping[str, float] | None = None
    predicted: Mapping[str, float] | None = None
    tier: str | None = None
    expected_tokens: int | None = None
    predicted_tokens: Mapping[str, float] | None = None

    def output_of(self, tier: str) -> int:
        """Length of a tier's answer, at least one token."""
        found = self.output_tokens.get(tier)
        return max(1, self.output_tokens.get("", 1) if found is None else found)


def read_trace(path: Path) -> Iterator[Arrival]:
    """Arrivals of a file; its form is told by its first line.

    Known: Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens), ServeGen's (timestamp_s,
    input_tokens, output_tokens), Splitwise's (arrival_timestamp, prompt_size, token_size),
    Mooncake's JSON lines (timestamp in ms, input_length, output_length, hash_ids) and own JSON
    lines {"at_s", "prompt_tokens", "output_tokens", "prefix"?, "quality"?, "predicted"?, "tier"?,
    "expected_tokens"?}.

    Raises TraceError.
    """
    try:
        with path.open(encoding="utf-8") as f:
            first = f.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error
    if not first.strip():
        raise TraceError(f"{path} is empty")
    rows = _json_rows(path) if first.lstrip().startswith("{") else _csv_rows(path, first)
    return _in_order(path, rows)


def _in_order(path: Path, rows: Iterator[tuple[int, Arrival]]) -> Iterator[Arrival]:
    start: float | None = None
    last = -math.inf
    for line, arrival in rows:
        start = arrival.at_s if start is None else start
        if arrival.at_s < last:
            raise TraceError(f"{path}:{line}: times go back; sort the trace by time")
        last = arrival.at_s
        yield replace(arrival, at_s=arrival.at_s - start)


_CSV_FORMS: tuple[tuple[str, str, str], ...] = (
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    ("timestamp_s", "input_tokens", "output_tokens"),
    ("arrival_timestamp", "prompt_size", "token_size"),
    ("at_s", "prompt_tokens", "output_tokens"),
)


def _csv_rows(path: Path, header: str) -> Iterator[tuple[int, Arrival]]:
    columns = [name.strip() for name in header.strip().split(",")]
    form = next((form for form in _CSV_FORMS if set(form) <= set(columns)), None)
    if form is None:
        wanted = "; ".join(", ".join(form) for form in _CSV_FORMS)
        raise TraceError(f"{path} has the columns {', '.join(columns)}; wanted: {wanted}")
    when, prompt, output = form
    read_time = _timestamp if when == "TIMESTAMP" else float
    with path.open(encoding="utf-8", errors="replace", newline="") as f:
        rows = csv.DictReader(f)
        try:
            for row in rows:
                at_s = _finite(read_time(row[when]))
                lengths = {"": _tokens(float(row[output]))}
                yield rows.line_num, Arrival(at_s, _tokens(float(row[prompt])), lengths)
        except (*_UNREADABLE, csv.Error) as error:
            raise TraceError(f"{path}:{rows.line_num}: {_said(error)}") from error


def _timestamp(text: str) -> float:
    whole, _, fraction = text.partition(".")
    moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
    return moment.timestamp() + float(f"0.{fraction or 0}")


def _json_rows(path: Path) -> Iterator[tuple[int, Arrival]]:
    with path.open(encoding="utf-8", errors="replace") as f:
        for number, line in enumerate(f, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                arrival = _mooncake(row) if "input_length" in row else _own(row)
            except _UNREADABLE as error:
                raise TraceError(f"{path}:{number}: {_said(error)}") from error
            yield number, arrival


def _said(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is no number to count with")
    return number


def _tokens(value: Any) -> int:
    """A length, at least one token. Raises ValueError."""
    number = int(_finite(value))
    if number > MOST_TOKENS:
        raise ValueError(f"{number} tokens are more than {MOST_TOKENS}; is the column right?")
    return max(1, number)


def _shares(row: Mapping[str, Any], name: str) -> dict[str, float] | None:
    """Numbers by tier, or None where the row has none. Raises ValueError."""
    found = row.get(name)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ValueError(f"{name} must be an object of numbers by tier")
    return {str(tier): _finite(number) for tier, number in found.items()}


def _mooncake(row: Mapping[str, Any]) -> Arrival:
    return Arrival(
        _finite(row["timestamp"]) / 1000.0,
        _tokens(row["input_length"]),
        {"": _tokens(row["output_length"])},
        tuple(int(block) for block in row.get("hash_ids", ())),
    )


_OWN = {
    "at_s", "prompt_tokens", "output_tokens", "prefix", "block_tokens", "quality", "predicted",
    "tier", "expected_tokens",
}  # fmt: skip


def _own(row: Mapping[str, Any]) -> Arrival:
    unknown = sorted(set(row) - _OWN)
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(_OWN))}")
    output = row["output_tokens"]
    lengths = output if isinstance(output, dict) else {"": output}
    tier, expected = row.get("tier"), row.get("expected_tokens")
    if not isinstance(tier, str | None):
        raise ValueError(f"tier={tier!r} must be a tier's name")
    return Arrival(
        _finite(row["at_s"]),
        _tokens(row["prompt_tokens"]),
        {str(tier): _tokens(length) for tier, length in lengths.items()},
        tuple(int(block) for block in row.get("prefix", ())),
        _tokens(row.get("block_tokens", 512)),
        _shares(row, "quality"),
        _shares(row, "predicted"),
        tier,
        None if expected is None else _tokens(expected),
    )


def generate(
    rate: float,
    duration_s: float,
    seed: int,
    *,
    shape: float = 1.0,
    prompt_tokens: Sequence[int] = (1024,),
    output_tokens: Sequence[int] = (128,),
) -> Iterator[Arrival]:
    """Arrivals with Gamma-distributed gaps; shape 1 is a Poisson process, below 1 comes in bursts.

    Lengths are drawn in pairs, with replacement, from the two sequences.
    """
    if not (rate > 0.0 and duration_s > 0.0 and shape > 0.0):
        raise TraceError(f"rate={rate}, duration={duration_s}, shape={shape} must be positive")
    rng = random.Random(seed)
    num_pairs = min(len(prompt_tokens), len(output_tokens))
    now = rng.gammavariate(shape, 1.0 / (rate * shape))
    while now < duration_s:
        pair = rng.randrange(num_pairs)
        yield Arrival(now, max(1, prompt_tokens[pair]), {"": max(1, output_tokens[pair])})
        now += rng.gammavariate(shape, 1.0 / (rate * shape))


@dataclass(frozen=True, slots=True)
class OutcomeRow:
    """Measured outcome of one prompt: quality and answer length by tier, and a prediction."""

    quality: Mapping[str, float]
    output_tokens: Mapping[str, int]
    predicted: Mapping[str, float] | None
    predicted_tokens: Mapping[str, float] | None = None


def read_outcomes(path: Path, score: Callable[[str], Score] | None = None) -> list[OutcomeRow]:
    """Rows as `tandem train` reads them, gzip or plain; each prompt scored once if asked.

    Raises TraceError.
    """
    import gzip

    rows = []
    read = gzip.open if path.suffix == ".gz" else open
    try:
        with read(path, "rt", encoding="utf-8") as f:
            for line in f:
                row = json.loads(line)
                lengths = row.get("output_tokens") or {}
                predicted: Mapping[str, float] | None = _shares(row, "predicted")
                tokens: Mapping[str, float] | None = None
                if predicted is None and score is not None:
                    said = score(row["prompt"])
                    predicted, tokens = dict(said.quality), getattr(said, "mean_tokens", None)
                rows.append(
                    OutcomeRow(
                        {str(t): _finite(q) for t, q in row["quality"].items()},
                        {str(t): _tokens(n) for t, n in lengths.items()},
                        predicted,
                        tokens,
                    )
                )
    except (OSError, EOFError, zlib.error, *_UNREADABLE) as error:
        raise TraceError(f"{path}: {error} (rows look like those of `tandem train`)") from error
    if not rows:
        raise TraceError(f"{path} holds no outcome")
    return rows


def with_outcomes(
    arrivals: Iterator[Arrival], rows: Sequence[OutcomeRow], seed: int, *, keep_lengths: bool = True
) -> Iterator[Arrival]:
    """Each arrival with a drawn outcome; requests with the same first block draw the same row.

    keep_lengths: the trace's answer lengths stay, else those of the outcome count where it has any.
    """
    rng = random.Random(seed)
    by_root: dict[int, OutcomeRow] = {}
    for arrival in arrivals:
        root = arrival.prefix[1] if len(arrival.prefix) > 1 else None
        row = by_root.get(root) if root is not None else None
        if row is None:
            row = rows[rng.randrange(len(rows))]
            if root is not None:
                by_root[root] = row
        lengths = arrival.output_tokens
        if not keep_lengths and row.output_tokens:
            lengths = row.output_tokens
        yield replace(
            arrival,
            quality=row.quality,
            predicted=row.predicted,
            predicted_tokens=row.predicted_tokens,
            output_tokens=lengths,
        )
