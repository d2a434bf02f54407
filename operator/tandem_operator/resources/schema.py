"""Turns the pydantic types into structural OpenAPI v3 schemas, as an apiserver accepts them.

Raw pydantic JSON schema is refused there: it has $ref, anyOf with null and numeric
exclusiveMaximum. Every list, map and string must be bounded as well, or the cost estimate of the
CEL rules rejects the whole CRD; an unbounded one is an error here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from tandem_operator.resources.base import pattern_text
from tandem_operator.resources.rules import Rule

Schema = dict[str, Any]

_KEPT = (
    "type",
    "description",
    "default",
    "enum",
    "pattern",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "minItems",
    "maxItems",
    "x-kubernetes-preserve-unknown-fields",
)


class SchemaError(Exception):
    """A type cannot be written as a structural schema."""


def structural(model: type[BaseModel], rules: list[Rule], root: tuple[str, ...]) -> Schema:
    """The structural schema of one pydantic model, with the CEL rules below root attached.

    Raises SchemaError for a field without description or bound.
    """
    raw = model.model_json_schema(by_alias=True)
    schema = _convert(raw, raw.get("$defs", {}), root)
    for rule in rules:
        if rule.path[: len(root)] != root:
            continue
        target = schema
        for part in rule.path[len(root) :]:
            target = target["items"] if part == "*" else target["properties"][part]
        entry: Schema = {"rule": rule.cel, "message": rule.message}
        if rule.field and "*" not in rule.path:
            entry["fieldPath"] = "." + rule.field
        target.setdefault("x-kubernetes-validations", []).append(entry)
        if isinstance(target.get("default"), dict):
            # The apiserver checks a default before it fills in those of its fields.
            target["default"] = _full_default(target)
    return schema


def _convert(node: Mapping[str, Any], defs: Mapping[str, Any], at: tuple[str, ...]) -> Schema:
    where = ".".join(at)
    merged = dict(node)
    if "$ref" in merged:
        target = defs[merged.pop("$ref").rsplit("/", 1)[1]]
        merged = {**target, **merged}
    if "anyOf" in merged:
        options = [o for o in merged.pop("anyOf") if o.get("type") != "null"]
        if len(options) != 1:
            raise SchemaError(f"{where}: a union of {len(options)} types is not structural")
        own = {k: v for k, v in merged.items() if k in ("description", "default")}
        merged = {**options[0], **own, **{k: v for k, v in merged.items() if k.startswith("x-")}}
        if "$ref" in merged:
            return _convert(merged, defs, at)
    if "const" in merged:
        merged["enum"] = [merged.pop("const")]
    schema: Schema = {k: merged[k] for k in _KEPT if k in merged and merged[k] is not None}
    kind = schema.get("type")
    if kind == "object" and "properties" in merged:
        schema["properties"] = {
            name: _convert(child, defs, (*at, name)) for name, child in merged["properties"].items()
        }
        for name, child in schema["properties"].items():
            if not child.get("description"):
                raise SchemaError(f"{where}.{name}: has no description")
        required = merged.get("required", [])
        if required:
            schema["required"] = sorted(required)
        for name, child in schema["properties"].items():
            # A field made by a default factory: its own fields' defaults fill the object.
            made = "default" not in merged["properties"][name] and name not in required
            if made and "properties" in child:
                child.setdefault("default", {})
        if schema.get("default") is not None:
            # Nested defaults fill the rest; the bare object is the shortest form.
            schema["default"] = _bare_default(schema["default"], schema["properties"])
    elif kind == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        values = merged.get("additionalProperties")
        if not isinstance(values, Mapping) or "maxProperties" not in merged:
            raise SchemaError(f"{where}: a map needs a value type and a bound")
        schema["additionalProperties"] = _convert(values, defs, (*at, "*"))
        schema["maxProperties"] = merged["maxProperties"]
    elif kind == "array":
        if "maxItems" not in schema:
            raise SchemaError(f"{where}: a list needs a bound")
        schema["items"] = _convert(merged["items"], defs, (*at, "*"))
    elif kind == "string":
        if "enum" not in schema and "maxLength" not in schema:
            raise SchemaError(f"{where}: a string needs a bound")
        if (text := pattern_text(schema.get("pattern", ""))) is not None:
            # As a rule instead of a pattern: that one's message would be the expression itself.
            rule = f"self.matches(r'{schema.pop('pattern')}')"
            schema["x-kubernetes-validations"] = [{"rule": rule, "message": text}]
    elif kind == "integer":
        schema["format"] = "int64"
    return schema


def _full_default(schema: Schema) -> Schema:
    """The default of an object with its fields' own defaults put in, at any depth."""
    given: Schema = schema.get("default", {})
    fields = {
        name: _full_default(child) if isinstance(child["default"], dict) else child["default"]
        for name, child in schema["properties"].items()
        if "default" in child
    }
    return {**fields, **given}


def _bare_default(default: Mapping[str, Any], properties: Mapping[str, Schema]) -> Schema:
    """The entries of a default object that its fields' own defaults would not give."""
    return {
        k: v
        for k, v in default.items()
        if v is not None and v != properties.get(k, {}).get("default") and v != {} and v != []
    }


def count_fields(schema: Schema) -> int:
    """Number of named fields in a schema, at any depth."""
    total = 0
    for child in schema.get("properties", {}).values():
        total += 1 + count_fields(child)
    if "items" in schema:
        total += count_fields(schema["items"])
    return total
