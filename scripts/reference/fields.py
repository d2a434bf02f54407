"""The pages of the four kinds and of both configurations: every field with default and bounds."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic import BaseModel
from reference.markdown import HEAD, cell, code, table

from tandem_operator.cli.explain import default_of, limits, named, type_of
from tandem_operator.resources import KINDS
from tandem_operator.resources.crds import PLURALS, SHORT_NAMES, open_api
from tandem_operator.resources.schema import Schema

FIELD_HEAD = ("field", "type", "default", "bounds", "meaning")


def kind_page(kind: str) -> str:
    """The page of one kind."""
    schema = open_api(kind)
    names = f"`{PLURALS[kind]}`, short `{SHORT_NAMES[kind]}`"
    out = [
        HEAD + f"# {kind}\n",
        f"{schema['description']} `apiVersion: tandem.dev/v1alpha1`, {names}; "
        f"`tandem explain {kind.lower()}.spec` and `kubectl explain {kind.lower()}.spec` "
        "print the same.\n",
    ]
    spec = schema["properties"]["spec"]
    nested = [n for n, c in spec["properties"].items() if named(c).get("properties")]
    out.append("## spec\n")
    out.append(table(FIELD_HEAD, (_row(n, c, spec) for n, c in spec["properties"].items())))
    out += _rules(spec, "of spec")
    for name in nested:
        child = spec["properties"][name]
        suffix = "[]" if "items" in child else ""
        out.append(f"## spec.{name}\n")
        out.append(f"{child['description']}\n")
        out.append(table(FIELD_HEAD, _rows(named(child), f"{name}{suffix}.")))
        out += _rules(child, f"of {name}")
    out.append("## status\n")
    out.append("Written by the operator; what conditions mean is in [conditions](conditions.md).\n")
    out.append(
        table(("field", "type", "meaning"), _status_rows(schema["properties"]["status"], ""))
    )
    return "\n".join(out)


def _rows(schema: Schema, at: str) -> Iterator[tuple[str, ...]]:
    for name, child in schema.get("properties", {}).items():
        yield _row(name, child, schema, at)
        if named(child).get("properties"):
            yield from _rows(named(child), f"{at}{name}{'[]' if 'items' in child else ''}.")


def _row(name: str, child: Schema, parent: Schema, at: str = "") -> tuple[str, ...]:
    own = [text for text in limits(child) if not text.startswith("is not ")]
    if plain_type(child) not in ("string", "list of string"):
        own = [text for text in own if not text.endswith(" characters")]  # the form says it
    required = name in parent.get("required", [])
    bounds = "" if named(child).get("properties") and "items" not in child else "; ".join(own)
    if "items" in child and named(child).get("properties"):
        bounds = "; ".join(t for t in own if not t.startswith("each"))
    default = default_of(child)
    return (
        code(at + name),
        cell(plain_type(child)),
        "required" if required else code(default) if len(default) < 60 else "see its fields",
        cell(bounds),
        cell(child.get("description", "")),
    )


def plain_type(schema: Schema) -> str:
    """The type in words, with the units that the form of a text says."""
    for rule in schema.get("x-kubernetes-validations", []):
        message = str(rule["message"])
        if message.startswith("is not a") and "items" not in schema:
            return message.split(";")[0].split(" ", 3)[3]
    if "items" in schema:
        return "list of " + plain_type(schema["items"]).replace("Object", "objects")
    if "additionalProperties" in schema:
        return "map to " + plain_type(schema["additionalProperties"])
    return type_of(schema)


def _rules(schema: Schema, what: str) -> list[str]:
    """The rules between fields, below a table."""
    found = dict.fromkeys(_all_rules(schema))
    if not found:
        return []
    return [f"Rules {what}:\n", "\n".join(f"- {cell(text)}" for text in found) + "\n"]


def _all_rules(schema: Schema) -> Iterator[str]:
    if schema.get("type") == "object":
        for rule in schema.get("x-kubernetes-validations", []):
            yield str(rule["message"])
    if "items" in schema:
        yield from _all_rules(schema["items"])
    for child in schema.get("properties", {}).values() if "items" not in schema else ():
        if schema.get("type") == "object" and "tiers" not in schema["properties"]:
            yield from (t for t in _all_rules(child) if not t.startswith("is not "))


def _status_rows(schema: Schema, at: str) -> Iterator[tuple[str, ...]]:
    for name, child in schema.get("properties", {}).items():
        suffix = "[]" if "items" in child else ""
        yield code(at + name + suffix), cell(type_of(child)), cell(child.get("description", ""))
        if named(child).get("properties") and name != "conditions":
            yield from _status_rows(named(child), f"{at}{name}{suffix}.")


def configuration_page(title: str, intro: str, config: type[BaseModel]) -> str:
    """The page of a process's configuration, from its pydantic class."""
    raw = config.model_json_schema()
    rows = list(_config_rows(raw, raw.get("$defs", {}), ""))
    return HEAD + f"# {title}\n\n{intro}\n\n" + table(FIELD_HEAD, rows)


def _config_rows(node: Schema, defs: Schema, at: str) -> Iterator[tuple[str, ...]]:
    required = node.get("required", [])
    for name, raw in node.get("properties", {}).items():
        child = _resolved(raw, defs)
        default = "required" if name in required else _shown_default(raw, child)
        text = raw.get("description") or child.get("description", "")
        yield (
            code(at + name),
            cell(_config_type(child, defs)),
            default,
            cell("; ".join(_config_bounds(child, defs))),
            cell(text),
        )
        inner = _resolved(child.get("items", {}), defs) if "items" in child else child
        if inner.get("properties"):
            yield from _config_rows(inner, defs, f"{at}{name}{'[]' if 'items' in child else ''}.")


def _resolved(node: Schema, defs: Schema) -> Schema:
    merged = dict(node)
    if "anyOf" in merged:
        options = [o for o in merged.pop("anyOf") if o.get("type") != "null"]
        merged = {**_resolved(options[0], defs), **merged} if len(options) == 1 else merged
    if "allOf" in merged:
        merged = {**_resolved(merged.pop("allOf")[0], defs), **merged}
    if "$ref" in merged:
        target = defs[merged.pop("$ref").rsplit("/", 1)[1]]
        merged = {**_resolved(target, defs), **merged}
    return merged


def _shown_default(raw: Schema, child: Schema) -> str:
    if "default" not in raw or raw["default"] is None:
        return ""
    if child.get("properties"):
        return "see its fields"
    return code(json.dumps(raw["default"]))


def _config_type(child: Schema, defs: Schema) -> str:
    if "items" in child:
        return "list of " + _config_type(_resolved(child["items"], defs), defs)
    if "enum" in child or "const" in child:
        return "string"
    if child.get("type") == "object" and "properties" not in child:
        return "map"
    return str(child.get("type", "any")).replace("object", "section")


def _config_bounds(child: Schema, defs: Schema) -> Iterator[str]:
    if "const" in child:
        yield f"only {child['const']}"
    if "enum" in child:
        yield "one of " + ", ".join(map(str, child["enum"]))
    low = child.get("minimum", child.get("exclusiveMinimum"))
    high = child.get("maximum", child.get("exclusiveMaximum"))
    over = "above" if "exclusiveMinimum" in child else "at least"
    if low is not None and high is not None:
        yield f"{'above ' if over == 'above' else ''}{_number(low)} to {_number(high)}"
    elif low is not None:
        yield f"{over} {_number(low)}"
    elif high is not None:
        yield f"at most {_number(high)}"
    if "maxItems" in child:
        yield f"at most {child['maxItems']} entries"
    if "items" in child and not _resolved(child["items"], defs).get("properties"):
        for text in _config_bounds(_resolved(child["items"], defs), defs):
            yield f"each {text}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def kind_pages() -> dict[str, str]:
    """All pages of kinds, by file name."""
    return {f"{kind.lower()}.md": kind_page(kind) for kind in KINDS}
