"""One grammar for a whole answer: thought, text or format, and tool calls of a family's form.

llguidance treats added tokens as no text: free text cannot hold them, and a rule that wants one
names it by its id. Free text also never spells out a marker, so that what is read as a call is one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tandem_worker.dialects.formats import CallFormat, Dialect
from tandem_worker.dialects.reader import Opening
from tandem_worker.openai.answer_format import with_whitespace
from tandem_worker.openai.tools import Tool, ToolUse

_BREAK = r"/\n{0,2}/"
"""What models write between a thought and what follows it."""


@dataclass
class _Grammar:
    """Rules in Lark's form, and named grammars beside them."""

    rules: list[str] = field(default_factory=list)
    named: list[dict[str, Any]] = field(default_factory=list)

    def text(self) -> str:
        return json.dumps({"grammars": [{"lark_grammar": "\n".join(self.rules)}, *self.named]})


def answer_grammar(
    dialect: Dialect,
    *,
    opening: Opening,
    tools: ToolUse | None = None,
    answer: str = "",
    max_thought_tokens: int | None = None,
    lenient: bool = False,
) -> str:
    """What an answer has to match, in llguidance's form; empty where any text will do.

    Args:
        dialect: Of the model.
        opening: How the prompt leaves the answer's beginning.
        tools: What may be called; needs ``dialect.calls``.
        answer: The format that a text has, in llguidance's form; empty for any.
        max_thought_tokens: The end of a thought is forced after so many; None for no limit.
        lenient: Let arguments of tools that are not strict be any object.
    """
    thinks = opening is not Opening.CLOSED
    if tools is None and (not thinks or (max_thought_tokens is None and not answer)):
        return answer
    grammar = _Grammar()
    thought = _thought(grammar, dialect, opening, max_thought_tokens)
    grammar.rules.append(f"start: {thought} answer")
    ways = []
    if tools is None or tools.mode == "auto":
        if answer:
            ways.append(f"{_BREAK} @format" if thinks else "@format")
            grammar.named.append({**json.loads(answer)["grammars"][0], "name": "format"})
        else:
            ways.append("TEXT")
            grammar.rules.append(f"TEXT: {_free_text(dialect, tools)}")
    if tools is not None:
        assert dialect.calls is not None
        may_say = tools.mode == "auto" and not answer
        ways.append(_calls(grammar, dialect, dialect.calls, tools, may_say, thinks, lenient))
    grammar.rules.append("answer: " + " | ".join(ways))
    return grammar.text()


def _thought(grammar: _Grammar, dialect: Dialect, opening: Opening, limit: int | None) -> str:
    if opening is Opening.CLOSED or (opening is Opening.MAYBE and limit == 0):
        return ""
    tags = dialect.thought
    assert tags is not None
    begin, end = (f"<[{dialect.token_ids[tag]}]>" for tag in (tags.begin, tags.end))
    if limit != 0:
        most = "" if limit is None else f"[max_tokens={limit}]"
        grammar.rules += [f"THOUGHT: {_without([tags.end])}", f"thought{most}: THOUGHT"]
        end = f"thought {end}"
    return end if opening is Opening.OPEN else f"({begin} {end})?"


def _free_text(dialect: Dialect, tools: ToolUse | None) -> str:
    calls = dialect.calls if tools is not None else None
    if calls is not None and not calls.marker:
        first = re.escape(calls.before_name[0])
        return rf"/([ \t\r\n]*[^ \t\r\n{first}](?s:.*))?/"
    markers = [calls.marker] if calls is not None else []
    if dialect.thought is not None:
        markers.append(dialect.thought.begin)
    return _without(markers)


def _calls(
    grammar: _Grammar,
    dialect: Dialect,
    calls: CallFormat,
    tools: ToolUse,
    may_say: bool,
    thinks: bool,
    lenient: bool,
) -> str:
    """The rule for calls, with the text before them where there may be some."""
    names = []
    for number, tool in enumerate(tools.callable):
        grammar.named.append({"name": f"arguments_{number}", **_arguments(tool, lenient)})
        before = _spelled(calls.before_name + tool.name + calls.between, dialect)
        after = _spelled(calls.after, dialect)
        grammar.rules.append(f"call_{number}: {before} @arguments_{number} {after}")
        names.append(f"call_{number}")
    grammar.rules.append("call: " + " | ".join(names))
    begin = calls.begin
    lead = _BREAK if thinks else ""
    if may_say and calls.marker:
        lead = "TEXT"
        if calls.marker not in dialect.token_ids:
            # The marker is ordinary text: what comes before ends where it does.
            grammar.rules.append(f"lead[lazy]: /(?s:.*){_regex(calls.marker)}/")
            assert begin.startswith(calls.marker)
            lead, begin = "lead", begin.removeprefix(calls.marker)
    more = ""
    if tools.parallel and calls.parallel:
        more = f"({_spelled(calls.separator, dialect)} call)*"
    return f"{lead} {_spelled(begin, dialect)} call {more} {_spelled(calls.end, dialect)}"


def _arguments(tool: Tool, lenient: bool) -> dict[str, Any]:
    if lenient and not tool.strict:
        schema = json.loads(with_whitespace({"type": "object"}, "tools"))
    else:
        schema = json.loads(with_whitespace(tool.parameters, "tools"))
        schema["x-guidance"]["lenient"] = not tool.strict
    return {"json_schema": schema}


def _spelled(text: str, dialect: Dialect) -> str:
    """A constant text as terminals: strings, and added tokens by their ids."""
    if not text:
        return ""
    parts: Sequence[str] = [text]
    if dialect.token_ids:
        parts = re.split("(" + "|".join(map(re.escape, dialect.token_ids)) + ")", text)
    return " ".join(
        f"<[{dialect.token_ids[part]}]>" if part in dialect.token_ids else json.dumps(part)
        for part in parts
        if part
    )


def _without(markers: Sequence[str]) -> str:
    """A terminal of any text that spells none of these."""
    return " & ".join(["/(?s:.*)/", *(f"~/(?s:.*){_regex(m)}(?s:.*)/" for m in markers)])


def _regex(text: str) -> str:
    return re.escape(text).replace("/", r"\/")
