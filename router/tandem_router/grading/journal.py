"""Every answer is written down as it comes, so that no question is asked twice.

An append-only file of JSON lines beside the output: a first line with what the answers depend on,
then one line per answer or verdict. A last line that a crash tore is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem_router.grading.errors import GradingError

VERSION = 1
#: (question, who, sample, order): `who` is a tier, or which judge said something about one.
Key = tuple[str, str, int, int]


def verdict_key(question: str, judge: str, tier: str, sample: int, order: int) -> Key:
    """Where a verdict stands: another judge is asked anew, and answers do not depend on one."""
    return (question, f"judge {judge} on {tier}", sample, order)


class Journal:
    """The answers so far; `put` adds one and does not return before the system has it."""

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self.path = path
        self._entries: dict[Key, dict[str, Any]] = {}
        self._head = {"tandem_grade": VERSION, **head}
        try:
            # Unbuffered: what `put` wrote is the system's, and nothing is left to fail at the end.
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise GradingError(
                f"cannot write {path}: {error.strerror}; name another place with -o"
            ) from error
        try:
            if not path.is_file():
                raise GradingError(f"{path} is not a plain file; name another place with -o")
            self._lock()
            self._load()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> dict[str, Any] | None:
        return self._entries.get(key)

    def entries(self) -> Mapping[Key, dict[str, Any]]:
        return self._entries

    def put(self, key: Key, value: Mapping[str, Any]) -> None:
        """Raises GradingError where it cannot be written, such as on a full disk."""
        self._entries[key] = dict(value)
        question, who, sample, order = key
        self._write({"q": question, "who": who, "sample": sample, "order": order, **value})

    def _lock(self) -> None:
        """Two runs on one journal would ask everything twice."""
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise GradingError(f"{self.path} is in use by another `tandem grade`") from error

    def _write(self, value: Mapping[str, Any]) -> None:
        line = json.dumps(value, ensure_ascii=True).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise GradingError(f"cannot write {self.path}: {error.strerror}") from error
        if written != len(line):
            raise GradingError(f"cannot write {self.path}: no space left")

    def _load(self) -> None:
        content = self.path.read_bytes()
        good = 0
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break  # torn by a crash in the middle of a write
            value = self._decode(number, line)
            if number == 1:
                self._compare(value)
            else:
                try:
                    key = (
                        value.pop("q"),
                        value.pop("who"),
                        value.pop("sample"),
                        value.pop("order"),
                    )
                except KeyError as error:
                    raise self._damaged(number) from error
                self._entries[key] = value
            good += len(line)
        if len(content) > good:
            self._file.truncate(good)
        if good == 0:
            self._write(self._head)

    def _decode(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._damaged(number) from error
        if not isinstance(value, dict):
            raise self._damaged(number)
        return value

    def _damaged(self, number: int) -> GradingError:
        return GradingError(
            f"{self.path}:{number} is not what `tandem grade` wrote; delete the file to ask anew, "
            "or name another -o"
        )

    def _compare(self, found: dict[str, Any]) -> None:
        if found.get("tandem_grade") != VERSION:
            raise self._damaged(1)
        for name, now in self._head.items():
            before = found.get(name)
            if before != now:
                raise GradingError(
                    f"{self.path} holds answers of another run: {_difference(name, before, now)}; "
                    "go on with what it had, name another -o, or delete it to ask anew"
                )


def _difference(name: str, before: Any, now: Any) -> str:
    if name == "tiers":
        return f"its tiers are {_tiers(before)}, not {_tiers(now)}"
    return f"its {name} is {_plain(before)}, not {_plain(now)}"


def _tiers(value: Any) -> str:
    if not isinstance(value, list):
        return "unknown"
    return ", ".join(
        f"{each.get('name')} ({each.get('model')} at {each.get('url')})"
        for each in value
        if isinstance(each, dict)
    )


def _plain(value: Any) -> str:
    return "not set" if value is None else str(value)
