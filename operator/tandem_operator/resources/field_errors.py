"""Says in a sentence what is wrong with a field: pydantic's errors, as a person would put them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel

from tandem_operator.resources.base import DURATION_PATTERN, pattern_text

YamlPath = tuple[str | int, ...]


def show_path(path: Iterable[str | int]) -> str:
    """A field's path as kubectl writes it: spec.tiers[1].name."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


_NUMBERS = {
    "greater_than_equal": ("ge", "must be at least"),
    "less_than_equal": ("le", "must be at most"),
    "greater_than": ("gt", "must be more than"),
    "less_than": ("lt", "must be less than"),
}


def explain(root: type[BaseModel], item: dict[str, Any]) -> tuple[YamlPath, str]:
    """Turn one pydantic error below a spec into the field's path and a sentence."""
    path: YamlPath = tuple(p for p in item["loc"] if p != "[key]")
    kind, value, ctx = str(item["type"]), item.get("input"), item.get("ctx") or {}
    if kind == "extra_forbidden":
        names = fields_at(root, path[:-1])
        return path, f"unknown field; {suggest(str(path[-1]), names)}"
    if kind == "missing":
        return path, "is required; add it"
    if kind in _NUMBERS:
        key, words = _NUMBERS[kind]
        return path, f"{value} {words} {ctx.get(key)}"
    if kind == "string_type":
        if value is None:
            return path, "is empty; give a value or remove the field"
        if isinstance(value, (int, float)) and DURATION_PATTERN in _patterns_at(root, path):
            return path, f'{value} has no unit; write a duration such as "{value}s" or "{value}m"'
        if isinstance(value, (int, float)):
            return path, f'{value} is a number; this field takes text, write it quoted: "{value}"'
        return path, f"must be text, not {_word(value)}"
    if kind in ("int_type", "int_from_float"):
        if isinstance(value, str) and value.strip().lstrip("-").isdigit():
            return path, f'"{value}" is text; write the number without quotes'
        return path, f"must be a whole number, not {_word(value)}"
    if kind == "bool_type":
        return path, f"must be true or false, not {_word(value)}"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return path, f"must be a mapping of fields, not {_word(value)}"
    if kind in ("list_type", "tuple_type"):
        return path, f'must be a list, not {_word(value)}; begin each item with "- "'
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", str(ctx.get("expected", "")))
        return path, f"{_word(value)} is not allowed; {suggest(str(value), options)}"
    if kind == "string_pattern_mismatch":
        pattern = str(ctx.get("pattern", ""))
        return path, f"{value!r} {pattern_text(pattern) or f'must match {pattern}'}"
    if kind == "string_too_long":
        return path, f"has {len(value or '')} characters; at most {ctx.get('max_length')}"
    if kind == "string_too_short":
        return path, f"{value!r} is too short; at least {ctx.get('min_length')} characters"
    if kind == "too_long":
        return path, f"has {ctx.get('actual_length')} items; at most {ctx.get('max_length')}"
    if kind == "too_short":
        return path, f"has {ctx.get('actual_length')} items; at least {ctx.get('min_length')}"
    return path, str(item["msg"]).removeprefix("Value error, ").removeprefix("Input ")


def _word(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return repr(value) if isinstance(value, str) else str(value)


def fields_at(root: type[BaseModel], path: YamlPath) -> list[str]:
    """The names of the fields that may stand at a path below root."""
    current: type[BaseModel] = root
    for part in path:
        if isinstance(part, int):
            continue
        for f in current.model_fields.values():
            if f.alias == part:
                child = _model_in(f.annotation)
                if child is None:
                    return []
                current = child
    return [f.alias or n for n, f in current.model_fields.items()]


def _patterns_at(root: type[BaseModel], path: YamlPath) -> str:
    """The patterns of the text field at a path below root, as one string."""
    names = [p for p in path if not isinstance(p, int)]
    current: type[BaseModel] | None = root
    for i, name in enumerate(names):
        if current is None:
            return ""
        found = next((f for f in current.model_fields.values() if f.alias == name), None)
        if found is None:
            return ""
        if i == len(names) - 1:
            return repr((found.metadata, found.annotation)).replace("\\\\", "\\")
        current = _model_in(found.annotation)
    return ""


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for arg in get_args(annotation):
        if (found := _model_in(arg)) is not None:
            return found
    return None


def suggest(word: str, options: Iterable[str]) -> str:
    """ "did you mean X?" when one option is close, else the whole list."""
    choices = list(options)
    lowered = {c.lower(): c for c in choices}
    close = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    if close:
        return f"did you mean {lowered[close[0]]}?"
    if not choices:
        return "remove it"
    return f"use one of {', '.join(choices)}"
