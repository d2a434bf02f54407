"""What an answer used: the provider's `usage` where it makes sense, else what was seen of it.

A number that is missing or senseless is estimated, never zero: an answer that was read was paid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

# Text of an answer per token, where nobody counted: English is about four.
CHARS_PER_TOKEN = 4.0
MOST_TOKENS = 10**9


class Usage(Struct, frozen=True, gc=False):
    """Tokens of one answer; cached ones are part of the prompt, reasoning ones of the output."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    estimated: bool = False

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.output_tokens + other.output_tokens,
            self.cached_tokens + other.cached_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.estimated or other.estimated,
        )


NOTHING_USED = Usage()
_DETAILS = frozenset({"prompt_tokens_details", "completion_tokens_details"})


def read_usage(usage: Any, prompt_estimate: int, output_estimate: int) -> Usage:
    """The provider's numbers, each replaced by its estimate where it is missing or senseless.

    Nothing is senseless where something was seen: there is no prompt without a token. Where the
    total is more than both, thoughts are what is missing: some providers bill them beside the
    completion.
    """
    fields: Mapping[str, Any] = usage if type(usage) is dict else {}
    prompt, output = fields.get("prompt_tokens"), fields.get("completion_tokens")
    total = fields.get("total_tokens")
    if (
        type(prompt) is int
        and type(output) is int
        and 0 < prompt <= MOST_TOKENS
        and 0 < output <= MOST_TOKENS
        and (total is None or total == prompt + output)
        and _DETAILS.isdisjoint(fields)
    ):
        return Usage(prompt, output)
    prompt = _count(fields.get("prompt_tokens"))
    output, total = _count(fields.get("completion_tokens")), _count(total)
    if prompt and total is not None and total >= prompt + (output or 0):
        output = total - prompt
    estimated = prompt is None or output is None
    if not prompt:
        prompt, estimated = prompt_estimate, estimated or prompt_estimate > 0
    if not output:
        output, estimated = output_estimate, estimated or output_estimate > 0
    cached = _detail(fields, "prompt_tokens_details", "cached_tokens")
    reasoning = _detail(fields, "completion_tokens_details", "reasoning_tokens")
    return Usage(prompt, output, min(cached, prompt), min(reasoning, output), estimated)


def usage_of(body: bytes) -> Mapping[str, Any] | None:
    """The `usage` of a whole reply; None where it has none."""
    try:
        usage = json.loads(body).get("usage")
    except (ValueError, AttributeError, RecursionError):
        return None
    return usage if isinstance(usage, dict) else None


def text_tokens(num_chars: int) -> int:
    """Tokens that so much text may be, at least one for any."""
    return math.ceil(num_chars / CHARS_PER_TOKEN)


def answer_chars(body: bytes) -> int:
    """`reply_chars` of a reply that is not read yet; 0 for one that cannot be."""
    try:
        return reply_chars(json.loads(body))
    except (ValueError, AttributeError, RecursionError):
        return 0


def reply_chars(reply: Mapping[str, Any]) -> int:
    """Characters that a whole reply's choices generated: text, reasoning and tool calls."""
    choices = reply.get("choices")
    total = 0
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict):
            total += generated_chars(choice.get("message")) + _chars(choice.get("text"))
    return total


def generated_chars(message: Any) -> int:
    """Characters of one message or delta that a model generated."""
    if not isinstance(message, Mapping):
        return 0
    total = sum(
        _chars(message.get(name))
        for name in ("content", "reasoning_content", "reasoning", "refusal")
    )
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            total += _chars(function.get("name")) + _chars(function.get("arguments"))
    return total


def _chars(value: Any) -> int:
    return len(value) if isinstance(value, str) else 0


def _count(value: Any) -> int | None:
    """A whole number of tokens, also where it is written as 500.0; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not (math.isfinite(value) and 0 <= value <= MOST_TOKENS and value == int(value)):
        return None
    return int(value)


def _detail(fields: Mapping[str, Any], group: str, name: str) -> int:
    details = fields.get(group)
    return (_count(details.get(name)) if isinstance(details, Mapping) else None) or 0
