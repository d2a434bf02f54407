"""What a chat body says about tools: which there are, and which the answer may or must call."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tandem_worker.errors import RequestError
from tandem_worker.openai.fields import wrong

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_MODES = "must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}"

Mode = Literal["auto", "required", "named"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that an answer may call.

    Attributes:
        parameters: Schema of its arguments, an object.
        strict: Every keyword of the schema has to be honoured.
    """

    name: str
    parameters: dict[str, Any]
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request asks for.

    Attributes:
        shown: All tools as the body gives them, for the chat template.
        callable: Those that this answer may call.
        mode: ``auto`` leaves it to the model; ``named`` is ``required`` with one tool.
        parallel: Whether it may call several times.
    """

    shown: tuple[dict[str, Any], ...]
    callable: tuple[Tool, ...]
    mode: Mode
    parallel: bool


def tool_use(tools: Sequence[dict[str, Any]], choice: Any, *, parallel: bool) -> ToolUse | None:
    """The checked form of ``tools`` and ``tool_choice``; None where no tool may be called.

    Raises:
        RequestError: one breaks a rule.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise wrong("tool_choice", choice, "needs tools to choose from")
        return None
    if len(tools) > MAX_TOOLS:
        raise wrong("tools", f"{len(tools)} tools", f"must have at most {MAX_TOOLS}")
    known = {tool.name: tool for tool in map(_tool, range(len(tools)), tools)}
    if len(known) < len(tools):
        raise wrong("tools", sorted(known), "must have different names")
    mode, names = _choice(choice)
    if mode is None:
        return None
    for name in names or ():
        if name not in known:
            raise wrong("tool_choice", name, f"is none of the tools: {', '.join(known)}")
    chosen = tuple(known[name] for name in names) if names is not None else tuple(known.values())
    return ToolUse(tuple(tools), chosen, mode, parallel and mode != "named")


def _choice(choice: Any) -> tuple[Mode | None, list[str] | None]:
    """Mode, and the names that may be called; None for all."""
    if choice is None or choice == "auto":
        return "auto", None
    if choice == "none":
        return None, None
    if choice == "required":
        return "required", None
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        return "named", [_named(choice)]
    if kind == "allowed_tools":
        allowed = choice.get("allowed_tools")
        if isinstance(allowed, dict) and isinstance(allowed.get("tools"), list):
            mode = allowed.get("mode")
            names = [_named(item) for item in allowed["tools"]]
            if mode in ("auto", "required") and names:
                return mode, list(dict.fromkeys(names))
        raise wrong("tool_choice", choice, "needs allowed_tools with mode and tools")
    raise wrong("tool_choice", choice, _MODES)


def _named(value: Any) -> str:
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise wrong("tool_choice", value, _MODES)
    return name


def _tool(index: int, value: dict[str, Any]) -> Tool:
    where = f"tools[{index}]"
    if value.get("type", "function") != "function" or not isinstance(value.get("function"), dict):
        raise wrong(where, value, "must be {'type': 'function', 'function': {'name': ...}}")
    function = value["function"]
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise wrong(
            f"{where}.function.name",
            name,
            "must be 1 to 64 letters, digits, underscores, dots and hyphens",
        )
    if parameters is None:
        parameters = {"properties": {}}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise wrong(f"{where}.function.parameters", parameters, "must be a schema of an object")
    if function.get("strict") not in (None, True, False):
        raise wrong(f"{where}.function.strict", function["strict"], "must be true or false")
    schema = {"type": "object", **parameters}
    if "properties" in schema and not {"patternProperties", "allOf", "$ref"} & schema.keys():
        # An argument that was not declared would break the function's call.
        schema.setdefault("additionalProperties", False)
    try:
        return Tool(name, schema, strict=bool(function.get("strict")))
    except RecursionError as error:
        raise RequestError(f"{where} is nested too deeply", param=where) from error
