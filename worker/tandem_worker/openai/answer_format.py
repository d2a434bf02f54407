"""What an answer has to look like: ``response_format`` and the guided fields as one grammar.

The grammar is text in llguidance's form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from tandem_worker.engine.constraints import MAX_GRAMMAR_CHARS
from tandem_worker.errors import RequestError
from tandem_worker.openai.fields import wrong

WHITESPACE = r"[ \t\n]{0,20}"
"""Between the parts of JSON: room to indent, none to run on for ever."""
_MAX_CHOICES = 10_000


def json_grammar(schema: Any, param: str) -> str:
    """Any JSON value that the schema describes.

    Raises:
        RequestError: it is no schema.
    """
    return str(LLMatcher.grammar_from_json_schema(with_whitespace(schema, param)))


def with_whitespace(schema: Any, param: str) -> str:
    """The schema as text, with our rule for white space."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise wrong(param, schema, f"is not JSON: {error}") from error
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise wrong(param, schema, "must be a JSON schema, an object")
    try:
        return json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}})
    except RecursionError as error:
        raise RequestError(f"{param} is nested too deeply", param=param) from error


def choice_grammar(choices: Any, param: str) -> str:
    """One of these texts."""
    if (
        not isinstance(choices, list)
        or not choices
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise wrong(param, choices, "must be a list of texts that are not empty")
    if len(choices) > _MAX_CHOICES:
        raise wrong(param, f"{len(choices)} texts", f"must have at most {_MAX_CHOICES}")
    return lark("start: " + " | ".join(json.dumps(choice) for choice in choices))


def regex_grammar(pattern: Any, param: str) -> str:
    """A text that the whole pattern matches."""
    if not isinstance(pattern, str) or not pattern:
        raise wrong(param, pattern, "must be a regular expression")
    return str(LLMatcher.grammar_from_regex(pattern))


def written_grammar(text: Any, param: str) -> str:
    """A grammar in Lark's or GBNF's form, starting at ``start`` or ``root``."""
    if not isinstance(text, str) or not text.strip():
        raise wrong(param, text, "must be a grammar in Lark's or GBNF's form")
    if len(text) > MAX_GRAMMAR_CHARS:
        raise wrong(param, text, f"must have at most {MAX_GRAMMAR_CHARS} characters")
    try:
        return lark(any_to_lark(text))
    except Exception as error:  # the converter raises what its parser happens to
        raise wrong(param, text, f"cannot be read as a grammar: {error}") from error


def lark(text: str) -> str:
    """A Lark grammar in llguidance's envelope."""
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def response_format_grammar(value: Mapping[str, Any]) -> str:
    """``response_format``; empty where any text will do.

    Raises:
        RequestError: the type is unknown or the schema is missing.
    """
    kind = value.get("type", "text")
    if kind == "text":
        return ""
    if kind == "json_object":
        return json_grammar({"type": "object"}, "response_format")
    if kind == "json_schema":
        described = value.get("json_schema")
        if not isinstance(described, dict) or "schema" not in described:
            raise RequestError(
                "response_format of type 'json_schema' needs json_schema.schema",
                param="response_format",
            )
        return json_grammar(described["schema"], "response_format")
    raise wrong("response_format.type", kind, "must be 'text', 'json_object' or 'json_schema'")


_GUIDED = {
    "json": json_grammar,
    "regex": regex_grammar,
    "choice": choice_grammar,
    "grammar": written_grammar,
}


def guided_grammar(name: str, value: Mapping[str, Any]) -> str:
    """``structured_outputs`` of vLLM: exactly one of json, regex, choice, grammar, json_object.

    Raises:
        RequestError: none or several are given, or one is malformed.
    """
    given = {key: item for key, item in value.items() if item is not None and item is not False}
    options = {key: given[key] for key in (*_GUIDED, "json_object") if key in given}
    unknown = given.keys() - options.keys() - {"disable_fallback", "whitespace_pattern"}
    if unknown or len(options) != 1:
        wanted = ", ".join((*_GUIDED, "json_object"))
        raise wrong(name, sorted(given), f"must hold exactly one of {wanted}")
    ((key, item),) = options.items()
    if key == "json_object":
        return json_grammar({"type": "object"}, name)
    return _GUIDED[key](item, f"{name}.{key}")
