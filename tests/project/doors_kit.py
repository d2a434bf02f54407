"""Walks what can be written into a resource or a configuration, and finds who reads each field.

A field is a door: something has to be behind it. `unread` looks for a reader outside the module
that defines the field; that a field has an effect is shown by the tables in `doors_resources`,
`doors_router` and `doors_worker`.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Door:
    """One field: its path as users write it, the class that has it, its name in Python."""

    path: str
    owner: type[BaseModel]
    name: str

    @property
    def annotation(self) -> Any:
        return self.owner.model_fields[self.name].annotation

    @property
    def options(self) -> list[Any]:
        """All values, where there are few of them; empty otherwise."""
        return _options(self.annotation)


def doors(root: type[BaseModel], at: str = "") -> Iterator[Door]:
    """The fields that hold values, at any depth; a section is what its own fields are."""
    for name, field in root.model_fields.items():
        path = f"{at}{field.alias or name}"
        sections = list(_sections(field.annotation))
        if not sections:
            yield Door(path, root, name)
        for section in sections:
            yield from doors(section, f"{path}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for argument in get_args(annotation):
        yield from _sections(argument)


def _options(annotation: Any) -> list[Any]:
    if annotation is bool:
        return [False, True]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    for argument in get_args(annotation):
        if argument is not type(None) and (found := _options(argument)):
            return found
    return []


@dataclass(frozen=True)
class Readers:
    """What a package reads: attribute names outside the defining modules, and their own functions.

    own: functions and properties of the defining modules, by the attributes that they read; a field
    is read where such a function is. whole: classes whose objects are dumped as a whole.
    """

    attributes: frozenset[str]
    own: Mapping[str, frozenset[str]]
    whole: frozenset[str]

    def reads(self, door: Door) -> bool:
        if door.owner.__name__ in self.whole or door.name in self.attributes:
            return True
        return bool(self.own.get(door.name, frozenset()) & self.attributes)


@cache
def readers(package: str, own: str, whole: frozenset[str] = frozenset()) -> Readers:
    """Readers in a package, given relative to the checkout; own: the defining file or folder."""
    attributes: set[str] = set()
    by_field: dict[str, set[str]] = {}
    for path in (ROOT / package).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not path.is_relative_to(ROOT / own):
            attributes.update(_read_in(tree))
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                for name in _read_in(node):
                    by_field.setdefault(name, set()).add(node.name)
    return Readers(
        frozenset(attributes), {k: frozenset(v) for k, v in by_field.items()}, frozenset(whole)
    )


def _read_in(tree: ast.AST) -> Iterable[str]:
    """Attributes that are read; where getattr is called, also the names that stand there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = list(ast.walk(node))
            if any(isinstance(n, ast.Name) and n.id == "getattr" for n in inside):
                yield from (
                    n.value
                    for n in inside
                    if isinstance(n, ast.Constant) and isinstance(n.value, str)
                )


def unread(found: Iterable[Door], by: Readers) -> list[str]:
    """Paths of the fields that nobody reads."""
    return [door.path for door in found if not by.reads(door)]


def missing_tests(nodes: Iterable[str], word: str) -> list[str]:
    """What is wrong with test ids that should show a field's effect: absent, or not about it."""
    wrong = []
    for node in nodes:
        file, _, function = node.partition("::")
        source = _source(file)
        if source is None or f"def {function}(" not in source:
            wrong.append(f"{node} does not exist")
        elif word not in source:
            wrong.append(f"{node} does not mention {word}")
    return wrong


@cache
def _source(file: str) -> str | None:
    path = ROOT / file
    return path.read_text(encoding="utf-8") if path.is_file() else None


def source_of(thing: Any) -> str:
    """The path of the module that defines a class, relative to the checkout."""
    return str(Path(inspect.getfile(thing)).relative_to(ROOT))
