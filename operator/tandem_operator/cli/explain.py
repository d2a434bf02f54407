"""`tandem explain`: what a field of a resource means, from the schema that the cluster has.

`router.spec.budget` names a field; kinds go by the names that kubectl knows, and lists and maps are
walked through, as in `kubectl explain`. A word of a status or of an error, such as Degraded, is
explained with what to look at and what to do.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tandem_operator.cli.errors import CommandError
from tandem_operator.cli.kinds import ALIASES, kind_of
from tandem_operator.resources import API_VERSION, KINDS
from tandem_operator.resources.crds import open_api
from tandem_operator.resources.schema import Schema

WIDTH = 96

#: What each reason and code means and what to do; docs/troubleshooting.md is written from it.
CAUSES = Path(__file__).with_name("troubleshooting.yaml")


def register(subparsers: Any) -> None:
    """Add the command to the parser."""
    text = "say what a field, a reason of a status or an error code means"
    parser = subparsers.add_parser(
        "explain",
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
    )
    path = parser.add_argument(
        "path",
        nargs="?",
        metavar="KIND[.FIELD...]|WORD",
        help="such as router.spec.budget, or Degraded",
    )
    path.completer = lambda prefix, **_: complete(prefix)
    parser.add_argument("--recursive", action="store_true", help="list the fields at every depth")
    parser.add_argument("--json", action="store_true", help="print the OpenAPI schema instead")
    parser.set_defaults(run=_explain)


@cache
def _schema(kind: str) -> Schema:
    return open_api(kind)


def find(path: str) -> tuple[str, list[str], Schema]:
    """(kind, field names, schema) of a path such as routers.spec.tiers.name.

    Raises CommandError with the fields there are.
    """
    word, *fields = path.split(".")
    kind = kind_of(word)[0]
    if kind not in KINDS or word == "all":
        raise CommandError(
            f"{word} is Kubernetes' own, `kubectl explain {word}` knows it; here: "
            f"{', '.join(k.lower() for k in KINDS)}"
        )
    schema, walked = _schema(kind), [kind.lower()]
    for field in fields:
        children = named(schema).get("properties", {})
        if field not in children:
            import difflib

            where = ".".join(walked)
            close = difflib.get_close_matches(field, children, n=1)
            if not children:
                raise CommandError(f"{where} has no fields, so no {field!r}")
            hint = f"did you mean {close[0]}? " if close else ""
            raise CommandError(
                f"{where} has no field {field!r}; {hint}it has {', '.join(children)}"
            )
        schema = children[field]
        walked.append(field)
    return kind, fields, schema


def named(schema: Schema) -> Schema:
    """The part of a schema that has the named fields: of a list's items, of a map's values."""
    while True:
        if "items" in schema:
            schema = schema["items"]
        elif "additionalProperties" in schema:
            schema = schema["additionalProperties"]
        else:
            return schema


def type_of(schema: Schema) -> str:
    """The type as kubectl writes it, such as []Object or map[string]string."""
    if "items" in schema:
        return "[]" + type_of(schema["items"])
    if "additionalProperties" in schema:
        return f"map[string]{type_of(schema['additionalProperties'])}"
    kind = str(schema.get("type", "object"))
    return "Object" if kind == "object" else kind


def limits(schema: Schema) -> Iterator[str]:
    """What a value must keep to, one sentence each."""
    if "enum" in schema:
        yield "one of " + ", ".join(map(str, schema["enum"]))
    for low, high, unit in (
        ("minimum", "maximum", ""),
        ("minItems", "maxItems", " entries"),
        ("minProperties", "maxProperties", " entries"),
    ):
        least, most = schema.get(low), schema.get(high)
        if least is not None and most is not None:
            yield f"{least} to {most}{unit}"
        elif least is not None or most is not None:
            yield f"at least {least}{unit}" if most is None else f"at most {most}{unit}"
    if "enum" not in schema and "maxLength" in schema:
        yield f"at most {schema['maxLength']} characters"
    for rule in schema.get("x-kubernetes-validations", []):
        yield str(rule["message"])
    if "items" in schema:
        yield from (f"each: {text}" for text in limits(schema["items"]))


def default_of(schema: Schema) -> str:
    """The default as YAML would write it in one line; "" where there is none."""
    if "default" not in schema:
        return ""
    value = schema["default"]
    return json.dumps(value) if not isinstance(value, str) else f'"{value}"'


def complete(prefix: str) -> list[str]:
    """The paths that begin with what was typed, one level further."""
    head, dot, _ = prefix.rpartition(".")
    if not dot:
        return [k.lower() for k in KINDS if k.lower().startswith(prefix.lower())]
    try:
        _, _, schema = find(head)
    except CommandError:
        return []
    return [f"{head}.{name}" for name in named(schema).get("properties", {})]


def _explain(args: argparse.Namespace) -> int:
    if args.path is None:
        for kind in KINDS:
            short = [a for a, k in ALIASES.items() if k == kind and len(a) <= 3]
            description = str(open_api(kind)["description"])
            sys.stdout.write(f"{kind.lower():20}{', '.join(short):6}{description}\n")
        sys.stdout.write("\nnext: tandem explain router.spec\n")
        return 0
    if found := causes(args.path):
        lines = json.dumps(found, indent=2) if args.json else "\n".join(_causes_text(found))
        sys.stdout.write(lines + "\n")
        return 0
    kind, fields, schema = find(args.path)
    if args.json:
        sys.stdout.write(json.dumps(schema, indent=2) + "\n")
        return 0
    sys.stdout.write("\n".join(text_of(kind, fields, schema, args.recursive)) + "\n")
    return 0


def causes(word: str) -> dict[str, dict[str, str]]:
    """What is said of a reason or code, by what it is a word of; kinds and fields have none."""
    if word.lower() in ALIASES or "." in word:
        return {}
    sections: dict[str, dict[str, dict[str, str]]] = yaml.safe_load(CAUSES.read_text())
    return {
        {"types": "condition", "conditions": "reason", "requests": "reason of a request"}.get(
            section, "error code"
        ): {"word": name, **row}
        for section, rows in sections.items()
        for name, row in rows.items()
        if name.lower() == word.lower()
    }


def _causes_text(found: dict[str, dict[str, str]]) -> Iterator[str]:
    heads = {"of": "OF", "means": "MEANS", "look": "LOOK AT", "do": "DO"}
    for number, (what, row) in enumerate(found.items()):
        if number:
            yield ""
        yield f"{row['word']} ({what})"
        for key, head in heads.items():
            if key in row:
                yield from _wrap(row[key], f"  {head + ':':9} ", " " * 12)


def text_of(kind: str, fields: list[str], schema: Schema, recursive: bool = False) -> list[str]:
    """The lines that explain a field."""
    out = [f"KIND:     {kind}", f"VERSION:  {API_VERSION}"]
    if fields:
        out.append(f"FIELD:    {'.'.join(fields)} <{type_of(schema)}>")
    if default := default_of(schema):
        out.append(f"DEFAULT:  {default}")
    out += ["", "DESCRIPTION:", *_indent(str(schema.get("description", "")), 2)]
    if rules := list(dict.fromkeys(limits(schema))):
        out += ["", "RULES:"]
        out += [line for rule in rules for line in _bullet(rule)]
    if named(schema).get("properties"):
        out += ["", "FIELDS:", *_fields(named(schema), 2, recursive)]
    return out


def _fields(schema: Schema, indent: int, recursive: bool) -> Iterator[str]:
    required = schema.get("required", [])
    for name, child in schema["properties"].items():
        notes = ["required"] if name in required else []
        default = default_of(child)
        if default and len(default) <= 40:
            notes.append(f"default {default}")
        tail = f"  ({', '.join(notes)})" if notes else ""
        yield f"{' ' * indent}{name}\t<{type_of(child)}>{tail}".expandtabs(4)
        if not recursive:
            yield from _indent(str(child.get("description", "")), indent + 4)
            if "enum" in child:
                yield from _indent(f"One of {', '.join(map(str, child['enum']))}.", indent + 4)
        elif named(child).get("properties"):
            yield from _fields(named(child), indent + 2, recursive)


def _indent(text: str, by: int) -> list[str]:
    return _wrap(text, " " * by, " " * by)


def _bullet(text: str) -> list[str]:
    return _wrap(text, "  - ", "    ")


def _wrap(text: str, first: str, then: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=then, break_on_hyphens=False
    )
