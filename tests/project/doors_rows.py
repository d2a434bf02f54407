"""What shows that a field of a configuration has its effect: tests by their ids, or a probe.

A probe is a function of the whole configuration and two values of the field for which it must give
something different.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tandem_operator.resources.base import Object
from tandem_router.config import RouterConfig, parse_config
from tandem_router.testing.two_tiers import CONFIG


@dataclass(frozen=True)
class Tests:
    """The tests that show a field's effect; word: how they call it, its own name when absent."""

    nodes: tuple[str, ...]
    word: str = ""


@dataclass(frozen=True)
class Probe:
    """What two values of a field do, side by side; then: what comes of it, where that is more."""

    see: Callable[[RouterConfig], Any]
    a: Any
    b: Any
    given: Mapping[str, Any] | None = None
    then: Tests | None = None


def shown_by(*nodes: str, word: str = "") -> Tests:
    """Tests below tests/."""
    return Tests(tuple(f"tests/{node}" for node in nodes), word)


def configured(path: str, value: Any, given: Mapping[str, Any] | None = None) -> RouterConfig:
    """The standard two tiers with a field set."""
    data: Object = json.loads(json.dumps(CONFIG))
    for name, change in {**(given or {}), path: value}.items():
        at: Any = data
        *parents, last = name.split(".")
        for part in parents:
            at = at.setdefault(part, {})
            at = at[0] if isinstance(at, list) else at
        at[last] = copy.deepcopy(change)  # a later field of the same row goes into it
    return parse_config(json.dumps(data))


def same(path: str, row: Probe) -> bool:
    """Whether nothing shows which of its two values the field has.

    A probe that sees a difference where there is none shows nothing, whatever it sees elsewhere.
    """
    a, again, b = (row.see(configured(path, value, row.given)) for value in (row.a, row.a, row.b))
    return bool(a == b) or bool(a != again)


def nodes(table: Mapping[str, Tests | Probe]) -> list[tuple[str, Tests]]:
    """The tests that rows name."""
    named = ((path, row.then if isinstance(row, Probe) else row) for path, row in table.items())
    return [(path, tests) for path, tests in named if tests is not None]


def probes(table: Mapping[str, Tests | Probe]) -> list[tuple[str, Probe]]:
    """The rows that try two values."""
    return [(path, row) for path, row in table.items() if isinstance(row, Probe)]


def unknown(table: Mapping[str, Any], known: set[str]) -> list[str]:
    """Rows of fields that do not exist, and fields without a row."""
    gone = (f"{path} does not exist" for path in sorted(set(table) - known))
    missing = (f"{path} has no row" for path in sorted(known - set(table)))
    return list(itertools.chain(gone, missing))
