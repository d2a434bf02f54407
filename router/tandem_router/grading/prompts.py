"""The questions in a file: text, JSON lines, tables and chat logs, each with what grades it.

Text is one prompt a line. Everything else goes through the shapes that the training data has too
(:mod:`tandem_router.predictor.records`); `id`, `reference`, `grader`, `group` and `task` travel
along. A row that cannot be asked is named by line; more than 1 % of such rows stops.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from tandem_router.grading.errors import GradingError
from tandem_router.grading.graders.reference import KINDS, Kind
from tandem_router.predictor.errors import DataError
from tandem_router.predictor.records import conversation, files, shapes

MAX_UNUSABLE_SHARE = 0.01
MAX_ID_CHARS = 200
#: Columns that often hold the right answer: named in a hint, never guessed.
_REFERENCES = ("answer", "expected", "target", "ground_truth", "gold", "solution", "output")


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt or conversation, and what is known of its right answer.

    `key` tells it from the others in the journal and stays the same when rows are added to the
    file: the row's id, else a digest of what is asked.
    """

    key: str
    messages: tuple[conversation.Message, ...]
    prompt: str | None
    place: str
    id: Any = None
    reference: Any = None
    grader: Kind | None = None
    group: Any = None
    task: Any = None

    def text(self) -> str:
        """The question as a judge or a command reads it: a conversation with its speakers."""
        if self.prompt is not None:
            return self.prompt
        if len(self.messages) == 1:
            return conversation.content_text(self.messages[0].get("content"))
        return "\n\n".join(
            f"{m['role']}: {conversation.content_text(m.get('content'))}" for m in self.messages
        )


@dataclass(frozen=True, slots=True)
class Questions:
    """What a file asks, the rows left out as (place, reason), and the columns that it has."""

    items: tuple[Question, ...]
    rejected: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]

    def no_reference(self) -> GradingError:
        """Nothing here can be graded: the columns found and the ways out."""
        found = next((name for name in self.columns if name.lower() in _REFERENCES), None)
        hint = f"--reference {found}" if found else "--reference COLUMN"
        columns = f" (columns: {', '.join(self.columns[:12])})" if self.columns else ""
        return GradingError(
            f"no row has a `reference`{columns} and there is no judge, so answers could not be "
            f"graded; name the column with {hint}, a judge with --judge URL#MODEL, or a command "
            "with --grade-command"
        )


def read(name: str, *, reference: str = "reference", limit: int | None = None) -> Questions:
    """The questions of a file, ``-`` being standard input; at most `limit` of them.

    Raises GradingError for a file that cannot be read, is empty, or repeats an id.
    """
    found: list[Question] = []
    rejected: list[tuple[str, str]] = []
    columns: dict[str, None] = {}
    seen: dict[str, str] = {}
    try:
        for place, value in _records(Path(name)):
            if limit is not None and len(found) >= limit:
                break
            try:
                question = _question(value, place, reference, columns)
            except DataError as error:
                rejected.append((place, str(error)))
                continue
            found.append(_unique(question, seen))
    except DataError as error:
        raise GradingError(str(error)) from error
    total = len(found) + len(rejected)
    if total == 0:
        raise GradingError(f"{name} holds no prompts; expected text, JSON lines or a table")
    if len(rejected) > MAX_UNUSABLE_SHARE * total:
        shown = "\n".join(f"  {place}: {reason}" for place, reason in rejected[:5])
        raise GradingError(
            f"{len(rejected)} of {total} rows of {name} cannot be asked, more than "
            f"{MAX_UNUSABLE_SHARE:.0%}; correct them, the first are\n{shown}"
        )
    return Questions(tuple(found), tuple(rejected), tuple(columns))


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record), (place, DataError), or (place, prompt as text)."""
    digest = hashlib.sha256()
    lower = path.name.lower().removesuffix(".gz")
    if files.is_table(path.name) or lower.endswith(".json"):
        for place, value in files.read(path, digest):
            yield place, DataError(value) if isinstance(value, str) else value
        return
    with files.opened(str(path)) as stream:
        numbered = (
            (number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            for number, line in files.lines(path, stream)
            if line.strip(b"\xef\xbb\xbf \t\r\n")
        )
        first = next(numbered, None)
        if first is None:
            return
        plain = lower.endswith((".txt", ".md")) or not _is_json(first[1])
        for number, line in chain([first], numbered):
            yield f"{path.name}:{number}", _line(line, plain)


def _is_json(line: bytes) -> bool:
    if line.lstrip()[:1] in (b"{", b"["):
        return True
    try:
        return isinstance(json.loads(line), str)
    except (ValueError, RecursionError):
        return False


def _line(line: bytes, plain: bool) -> Any:
    try:
        return line.decode().strip("\r\n") if plain else json.loads(line)
    except UnicodeDecodeError:
        return DataError("is not UTF-8 text")
    except (ValueError, RecursionError) as error:
        return DataError(f"is not JSON ({str(error)[:80]})")


def _question(value: Any, place: str, reference: str, columns: dict[str, None]) -> Question:
    if isinstance(value, DataError):
        raise value
    if isinstance(value, str):
        value = {"prompt": value}
    elif isinstance(value, list):
        value = {"messages": value}
    elif isinstance(value, dict):
        columns.update(dict.fromkeys(str(name) for name in value if name != "prompt"))
    else:
        raise DataError(f"is a {type(value).__name__}, not an object with a prompt")
    record = shapes.ours(value)
    prompt: str | None = None
    if record.get("messages") is not None:
        messages = conversation.asked(conversation.parse(record["messages"]))
    else:
        prompt = record.get("prompt")
        if not isinstance(prompt, str):
            raise shapes.refuse(value)
        messages = ({"role": "user", "content": prompt},)
    if not messages or not any(conversation.content_text(m.get("content")) for m in messages):
        raise DataError("has an empty prompt")
    grader = record.get("grader")
    if grader not in (None, "", *KINDS):
        raise DataError(f"names the grader {str(grader)[:40]!r}; known are {', '.join(KINDS)}")
    return Question(
        key=_key(record.get("id"), messages),
        messages=messages,
        prompt=prompt,
        place=place,
        id=record.get("id"),
        reference=_or_none(value.get(reference, record.get(reference))),
        grader=grader or None,
        group=_or_none(record.get("group")),
        task=_or_none(record.get("task")),
    )


def _or_none(value: Any) -> Any:
    return None if value == "" else value


def _key(given: Any, messages: tuple[conversation.Message, ...]) -> str:
    if given not in (None, ""):
        text = given if isinstance(given, str) else json.dumps(given, sort_keys=True)
        if len(text) > MAX_ID_CHARS:
            raise DataError(f"has an id of {len(text):,} characters; at most {MAX_ID_CHARS}")
        return f"id {text}"
    content = json.dumps(messages, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def _unique(question: Question, seen: dict[str, str]) -> Question:
    """The question with a key of its own; an id that comes twice is a mistake in the file."""
    key, count = question.key, 1
    if key in seen and question.id not in (None, ""):
        raise GradingError(
            f"the id {question.id!r} stands at {seen[key]} and again at {question.place}; give "
            "each row its own, or leave ids out"
        )
    while key in seen:
        count += 1
        key = f"{question.key} {count}"
    seen[key] = question.place
    return replace(question, key=key)
