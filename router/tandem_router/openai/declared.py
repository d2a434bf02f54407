"""Holds a body against the type that declares it, and says in a sentence what is wrong.

What a field may be is written once, in its type: the check, the sentence of a refusal and the
OpenAPI document are made from it. Fields that a type does not declare pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import msgspec
from msgspec import inspect

from tandem_router.errors import ApiError, bad_request

Declared = TypeVar("Declared")

_AT = re.compile(r" - at `\$(.*)`$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")
_MISSING = re.compile(r"Object missing required field `([^`]*)`")


def checked(fields: Mapping[str, Any], declared: type[Declared]) -> Declared:
    """The declared fields as values. Raises ApiError (400) that names field, value and rule."""
    try:
        return msgspec.convert(fields, declared)
    except msgspec.ValidationError as error:
        raise _refusal(fields, declared, str(error)) from None


def _refusal(fields: Mapping[str, Any], declared: type[Any], text: str) -> ApiError:
    at = _AT.search(text)
    path = at[1] if at is not None else ""
    rule, value = inspect.type_info(declared), fields
    for name, index in _STEP.findall(path):
        rule, value = _inside(rule, value, name or int(index))
    where = path.removeprefix(".")
    missing = _MISSING.match(text)
    if missing is None:
        return bad_request(f"`{where}`{_shown(value)} must be {sentence(rule)}", where)
    lacking = f"{where}.{missing[1]}".removeprefix(".")
    wanted, _ = _inside(rule, value, missing[1])
    return bad_request(f"`{lacking}` is missing; it must be {sentence(wanted)}", lacking)


def _inside(rule: inspect.Type, value: Any, step: str | int) -> tuple[inspect.Type, Any]:
    """(declared type, given value) one step further down."""
    options = list(_options(rule))
    if isinstance(step, int):
        items = next(each for each in options if isinstance(each, inspect.ListType))
        return items.item_type, value[step]
    structs = [each for each in options if isinstance(each, inspect.StructType)]
    given = value.get(step)
    if structs and step == structs[0].tag_field:
        return inspect.LiteralType(tuple(each.tag for each in structs)), given
    struct = next(
        (each for each in structs if each.tag_field and value.get(each.tag_field) == each.tag),
        structs[0],
    )
    return next(field.type for field in struct.fields if field.encode_name == step), given


def _options(rule: inspect.Type) -> Iterator[inspect.Type]:
    """The types that a value may have, without the words about them."""
    if isinstance(rule, inspect.Metadata):
        yield from _options(rule.type)
    elif isinstance(rule, inspect.UnionType):
        for each in rule.types:
            yield from _options(each)
    else:
        yield rule


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f" ({len(value)} {'entry' if len(value) == 1 else 'entries'})"
    text = json.dumps(value, ensure_ascii=False)
    return f"={text if len(text) <= 40 else text[:37] + '...'}"


def sentence(rule: inspect.Type, many: bool = False) -> str:
    """What a value of this type is, such as "a whole number from 1 to 16"."""
    match rule:
        case inspect.Metadata(extra_json_schema={"description": str(words)}):
            return words
        case inspect.Metadata(type=inner):
            return sentence(inner, many)
        case inspect.UnionType(types=options):
            said = [sentence(each, many) for each in options if not _is_tagged(each)]
            kinds = [each for each in options if _is_tagged(each)]
            if kinds:
                said.append(_tagged(kinds, many))
            return " or ".join(each for each in dict.fromkeys(said) if each != "null")
        case inspect.BoolType():
            return "true or false"
        case inspect.LiteralType(values=values):
            names = [json.dumps(each) if not isinstance(each, str) else each for each in values]
            return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        case inspect.IntType(ge=low, le=high):
            return f"{'whole numbers' if many else 'a whole number'}{_range(low, high)}"
        case inspect.FloatType(ge=low, le=high):
            return f"{'numbers' if many else 'a number'}{_range(low, high)}"
        case inspect.StrType(min_length=least, max_length=most):
            empty = "non-empty " if least else ""
            size = f" of at most {most} characters" if most is not None else ""
            return f"{empty}strings{size}" if many else f"a {empty}string{size}"
        case inspect.ListType(item_type=item, min_length=least, max_length=most):
            of = sentence(item, many=True)
            size = f" of at most {most} entries:" if most is not None else " of"
            empty = "non-empty " if least else ""
            return f"{empty}lists{size} {of}" if many else f"a {empty}list{size} {of}"
        case inspect.DictType(max_length=most):
            size = f" of at most {most} entries" if most is not None else ""
            return f"{'objects' if many else 'an object'}{size}"
        case inspect.StructType(tag_field=str()):
            return _tagged([rule], many)
        case inspect.StructType(fields=fields):
            needed = [f"`{each.encode_name}`" for each in fields if each.required]
            having = f" with {' and '.join(needed)}" if needed else ""
            return f"{'objects' if many else 'an object'}{having}"
        case inspect.AnyType():
            return "values" if many else "a value"
    return "null"


def _is_tagged(rule: inspect.Type) -> TypeGuard[inspect.StructType]:
    return isinstance(rule, inspect.StructType) and rule.tag_field is not None


def _tagged(kinds: Sequence[inspect.StructType], many: bool) -> str:
    """Objects that one of their fields tells apart."""
    names = sentence(inspect.LiteralType(tuple(each.tag for each in kinds)))
    return f"{'objects' if many else 'an object'} with `{kinds[0].tag_field}` {names}"


def _range(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if low is not None:
        return f" of at least {low}"
    return f" of at most {high}" if high is not None else ""
