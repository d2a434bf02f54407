"""Which rules an object breaks, as local mode and the commands ask it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem_operator.resources.rules.model import MODEL_RULES
from tandem_operator.resources.rules.router import ROUTER_RULES
from tandem_operator.resources.rules.rule import Obj, Rule
from tandem_operator.resources.rules.scaling import POLICY_RULES, POOL_RULES

RULES: dict[str, list[Rule]] = {
    "Model": MODEL_RULES,
    "Router": ROUTER_RULES,
    "AutoscalingPolicy": POLICY_RULES,
    "WorkerPool": POOL_RULES,
}


@dataclass(frozen=True)
class Violation:
    """A rule that does not hold: where, its sentence, and the value there if it is one word."""

    path: tuple[str | int, ...]
    message: str
    value: str | float | None = None


def _find(obj: Any, path: tuple[str, ...], at: tuple[str | int, ...]) -> list[Any]:
    """All (location, value) pairs that path names in obj."""
    if not path:
        return [(at, obj)]
    head, rest = path[0], path[1:]
    if head == "*":
        return [x for i, item in enumerate(obj) for x in _find(item, rest, (*at, i))]
    if not isinstance(obj, Mapping) or head not in obj:
        return []
    return _find(obj[head], rest, (*at, head))


def violations(
    kind: str, obj: Obj, old: Obj | None = None, *, harmless: bool | None = None
) -> list[Violation]:
    """The rules of the kind that the object breaks.

    obj and old hold all defaults, as Resource.to_wire gives them; without old, rules that compare
    with the previous object are left out. harmless: only rules that are, or only the others.
    """
    found: list[Violation] = []
    for rule in RULES[kind]:
        if (rule.transition and old is None) or harmless not in (None, rule.harmless):
            continue
        before = dict(_find(old, rule.path, ())) if rule.transition and old is not None else {}
        for at, value in _find(obj, rule.path, ()):
            if not rule.check(value, before.get(at)):
                field = tuple(rule.field.split(".")) if rule.field else ()
                there = _find(value, field, at)
                plain = there[0][1] if len(there) == 1 else None
                said = plain if isinstance(plain, str | int | float) else None
                found.append(Violation((*at, *field), rule.message, said))
    return found
