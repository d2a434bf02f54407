"""The text around tool calls and thoughts, per model family, told by the chat template.

A family is a few constant texts: whatever stands between a call's name and its arguments is the
same in every answer. The mask (``openai/answer_grammar``) lets a model write nothing else, so the
reader (``dialects/reader``) needs no guesses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class CallFormat:
    """An answer is text or nothing, then ``begin``, calls joined by ``separator``, and ``end``.

    A call is ``before_name``, the name, ``between``, a JSON object, ``after``.

    Attributes:
        name: Of the format, as other servers call it.
        marker: Ends the text before the calls; empty where calls take the whole answer.
        id_length: Characters of a call's id that the template takes; None for any.
        parallel: Whether an answer may hold several calls.
    """

    name: str
    marker: str
    begin: str
    before_name: str
    between: str
    after: str
    separator: str
    end: str = ""
    id_length: int | None = None
    parallel: bool = True


HERMES = CallFormat(
    name="hermes",
    marker="<tool_call>",
    begin="<tool_call>\n",
    before_name='{"name": "',
    between='", "arguments": ',
    after="}\n</tool_call>",
    separator="\n<tool_call>\n",
)
"""Hermes, Qwen2.5, Qwen3."""
LLAMA3 = CallFormat(
    name="llama3_json",
    marker="",
    begin="",
    before_name='{"name": "',
    between='", "parameters": ',
    after="}",
    separator="",
    parallel=False,
)
"""Llama 3.1 to 3.3; their template allows one call per answer."""
MISTRAL = CallFormat(
    name="mistral",
    marker="[TOOL_CALLS]",
    begin="[TOOL_CALLS] [",
    before_name='{"name": "',
    between='", "arguments": ',
    after="}",
    separator=", ",
    end="]",
    id_length=9,
)
"""Mistral with sentencepiece, whose first token after a control token begins with a space."""
MISTRAL_TEKKEN = replace(MISTRAL, begin="[TOOL_CALLS][")
"""Mistral Nemo and others with the tekken tokenizer."""
MISTRAL_ARGS = CallFormat(
    name="mistral_args",
    marker="[TOOL_CALLS]",
    begin="",
    before_name="[TOOL_CALLS]",
    between="[ARGS]",
    after="",
    separator="",
    id_length=9,
)
"""Mistral's tokenizers from version 11 on."""


def call_format(template: str) -> CallFormat | None:
    """The format that a template teaches; None where it shows no tools or in a way not known."""
    if "tools" not in template or "<function=" in template:  # Qwen3-Coder's XML
        return None
    if "[TOOL_CALLS]" in template:
        if "[ARGS]" in template:
            return MISTRAL_ARGS
        return MISTRAL if "[TOOL_CALLS] [" in template else MISTRAL_TEKKEN
    if "<tool_call>" in template:
        return HERMES
    if re.search(r'"parameters":\s*(dictionary|["\'}])', template) and "ipython" in template:
        return LLAMA3
    return None


@dataclass(frozen=True, slots=True)
class ThoughtTags:
    """What opens and closes a thought; each one token."""

    begin: str
    end: str


THINK = ThoughtTags("<think>", "</think>")
"""Qwen3, DeepSeek-R1 and its distillations, QwQ."""


@dataclass(frozen=True)
class Dialect:
    """What one model writes beside plain text.

    Attributes:
        calls: Its tool calls, or None.
        thought: Its tags around thoughts, or None.
        token_ids: Of the texts above that are one added token each.
    """

    calls: CallFormat | None = None
    thought: ThoughtTags | None = None
    token_ids: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, template: str | None, added_token_id: Callable[[str], int | None]) -> Dialect:
        """From the chat template and the tokenizer."""
        if template is None:
            return cls()
        calls = call_format(template)
        known: dict[str, int] = {}
        tags = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", THINK.begin, THINK.end)
        for text in tags:
            token_id = added_token_id(text)
            if token_id is not None:
                known[text] = token_id
        if calls is MISTRAL_ARGS and not {calls.marker, calls.between} <= known.keys():
            calls = None
        thought = THINK if THINK.begin in known and THINK.end in known else None
        return cls(calls, thought, known)
