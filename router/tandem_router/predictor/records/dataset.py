"""Reading outcome data: which model answered which prompt how well.

One row is ``{"prompt" | "messages", "quality": {tier: 0..1 or [samples]}, "output_tokens"?,
"cost_usd"?, "responses"?, "token_statistics"?, "judged"?, "group"?, "task"?}``; JSON lines, a JSON
list or a table, gzipped or not (:mod:`..records.files`), also in the shapes of other tools
(:mod:`..records.shapes`). A row that cannot be used is named by line and reason and left out; more
than 1 % of such rows stops, because then the file is probably not what its name says.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tandem_router.predictor.cascade.token_statistics import TokenStatistics
from tandem_router.predictor.errors import DataError
from tandem_router.predictor.linear_algebra import FloatArray
from tandem_router.predictor.reading.captured import Captured
from tandem_router.predictor.records import conversation, files, shapes
from tandem_router.predictor.records.files import MAX_PROMPT_CHARS

MAX_UNREADABLE_SHARE = 0.01
MAX_TIERS = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One graded prompt. `samples` keeps the graded answers where a tier has several.

    `messages` is the conversation where one was given; `prompt` is then the text that the router
    scores of it.
    """

    prompt: str
    quality: dict[str, float]
    samples: dict[str, tuple[float, ...]] = field(default_factory=dict)
    output_tokens: dict[str, float] = field(default_factory=dict)
    responses: dict[str, str] = field(default_factory=dict)
    group: str = ""
    task: str = ""
    line: str = ""
    messages: tuple[conversation.Message, ...] = ()
    cost_usd: dict[str, float] = field(default_factory=dict)
    token_statistics: dict[str, TokenStatistics] = field(default_factory=dict)  # of `responses`
    captured: Captured | None = None  # instead of the prompt, which is then only its name
    judged: dict[str, float] = field(default_factory=dict)  # what a judge said of `responses`


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
        return self._by_tier([row.quality for row in self.rows])

    def output_tokens(self) -> FloatArray:
        """Answer lengths ``(num_rows, num_tiers)``, NaN where not given."""
        return self._by_tier([row.output_tokens for row in self.rows])

    def cost_usd(self) -> FloatArray:
        """US dollars of every answer ``(num_rows, num_tiers)``, NaN where not given."""
        return self._by_tier([row.cost_usd for row in self.rows])

    def _by_tier(self, values: Sequence[Mapping[str, float]]) -> FloatArray:
        return np.array(
            [[given.get(tier, math.nan) for tier in self.tiers] for given in values]
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


def read_dataset(paths: Sequence[Path], *, need_quality: bool = True) -> Dataset:
    """All usable rows of the files, or a :class:`DataError` that says why they will not do."""
    rows: list[Row] = []
    rejected: list[Rejected] = []
    digest = hashlib.sha256()
    by_prompt: dict[str, int] = {}
    for path in paths:
        for where, value in files.read(path, digest):
            if isinstance(value, str):
                rejected.append(Rejected(where, value))
                continue
            try:
                record = shapes.ours(value) if isinstance(value, dict) else value
                row = parse(record, where, need_quality=need_quality)
            except DataError as error:
                rejected.append(Rejected(where, str(error)))
                continue
            first = by_prompt.get(row.prompt) if "one_of_several" in record else None
            if first is not None:
                rows[first] = _joined(rows[first], row)
                continue
            if "one_of_several" in record:
                by_prompt[row.prompt] = len(rows)
            rows.append(row)
    total = len(rows) + len(rejected)
    names = ", ".join(str(path) for path in paths)
    if total == 0:
        raise DataError(f"{names} holds no rows; expected one JSON object with a prompt per line")
    if not rows and all(item.reason == shapes.UNGRADED for item in rejected):
        raise DataError(
            f"{names} holds {total:,} prompts and no grades of any tier's answers; get them first: "
            f"tandem grade {' '.join(map(str, paths))} --router http://127.0.0.1:8000 "
            "-o graded.jsonl.gz, then give graded.jsonl.gz here"
        )
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
            f"{MAX_TIERS} can be told apart: are these tier names? Keep the rows of the models "
            "that you would serve"
        )
    return Dataset(tuple(rows), tuple(tiers), tuple(rejected), digest.hexdigest())


def parse(value: Any, where: str = "", *, need_quality: bool = True) -> Row:
    """One row of ours, checked; the error is the reason without the place."""
    if not isinstance(value, dict):
        raise DataError(f"is a {type(value).__name__}, not an object with a prompt")
    messages: tuple[conversation.Message, ...] = ()
    if value.get("messages") is not None:
        messages = conversation.parse(value["messages"])
    prompt = conversation.scored_text(messages) if messages else value.get("prompt")
    captured = None
    if prompt is None and isinstance(value.get("features"), dict):
        captured = Captured.parse(value["features"])
        prompt = captured.name
    if not isinstance(prompt, str):
        raise shapes.refuse(value)
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
        raise shapes.no_grade(value)
    tokens = _bounded(value, "output_tokens", 10_000_000)
    costs = _bounded(value, "cost_usd", 1_000_000)
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
        messages,
        costs,
        _token_statistics(value),
        captured,
        _bounded(value, "judged", 1),
    )


def _token_statistics(value: dict[str, Any]) -> dict[str, TokenStatistics]:
    found = {}
    for tier, given in _mapping(value, "token_statistics").items():
        if given is None:
            continue
        statistics = TokenStatistics.parse(given)
        if statistics is None:
            raise DataError(
                f"token_statistics.{tier}={_short(given)} is not what a worker says of an answer's "
                "tokens; leave it out"
            )
        found[tier] = statistics
    return found


def _joined(first: Row, other: Row) -> Row:
    """Two rows of the same prompt that speak of one model each; a model twice has two samples."""
    quality, samples = dict(first.quality), dict(first.samples)
    for tier, value in other.quality.items():
        if tier in quality:
            several = (*samples.get(tier, (quality[tier],)), *other.samples.get(tier, (value,)))
            samples[tier], quality[tier] = several, sum(several) / len(several)
        else:
            quality[tier] = value
            if tier in other.samples:
                samples[tier] = other.samples[tier]
    return replace(
        first,
        quality=quality,
        samples=samples,
        output_tokens={**other.output_tokens, **first.output_tokens},
        cost_usd={**other.cost_usd, **first.cost_usd},
        responses={**other.responses, **first.responses},
        token_statistics={**other.token_statistics, **first.token_statistics},
        judged={**other.judged, **first.judged},
    )


def _bounded(value: dict[str, Any], name: str, most: int) -> dict[str, float]:
    """A number per tier, from 0 to `most`; the mean where several answers were measured."""
    found: dict[str, float] = {}
    for tier, given in _mapping(value, name).items():
        several = given if isinstance(given, list) else [given]
        numbers = [_number(each, f"{name}.{tier}") for each in several if each is not None]
        for number in numbers:
            if not 0 <= number <= most:
                raise DataError(f"{name}.{tier}={number:g} is not between 0 and {most:,}")
        if numbers:
            found[tier] = sum(numbers) / len(numbers)
    return found


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


def read_prompts(name: str, note: Callable[[str], None] = lambda _: None) -> Iterator[str]:
    """The prompts to score in a file (``-``: standard input), in order; blank lines are none.

    JSON lines with a `prompt` or `messages`, JSON strings or plain text, gzipped or not, or a
    table with a column `prompt`. A JSON object without either is text like any other, and `note`
    hears of it.
    """
    path = Path(name)
    with files.opened(name) as stream:
        if files.is_table(name):
            for where, record in files.table(path, stream, hashlib.sha256()):
                if isinstance(record, str):
                    raise DataError(
                        f"{where} {record}; correct it, a line left out shifts the rest"
                    )
                found = shapes.ours(record)
                if "prompt" not in found and "messages" not in found:
                    raise DataError(f"{name} {shapes.refuse(record)}")
                yield _scored(found) or ""
            return
        for number, raw in files.lines(path, stream):
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8", "replace").rstrip("\r\n")
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = line
            prompt = value
            if isinstance(value, dict):
                try:
                    prompt = _scored(shapes.ours(value))
                except DataError:
                    prompt = None
                if not isinstance(prompt, str):
                    note(f"note: {name}:{number} has no text under `prompt`; scored as plain text")
            yield prompt if isinstance(prompt, str) else line


def _scored(record: dict[str, Any]) -> str | None:
    """The text that the router would score of a record; None where it has none."""
    if record.get("messages") is not None:
        return conversation.scored_text(conversation.parse(record["messages"]))
    prompt = record.get("prompt")
    return prompt if isinstance(prompt, str) else None
