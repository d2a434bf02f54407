"""What a conversation is, whichever tool wrote it, and the part of it that a tier is asked.

Three ways are known: `messages` (OpenAI), `conversations` (ShareGPT: from and value), and a list
of either. Work here is checked values in, plain values out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tandem_router.predictor.errors import DataError

Message = dict[str, Any]

#: ShareGPT's speakers and a few of its dialects.
_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "function",
}
MAX_MESSAGES = 10_000
#: Parts of a message that hold text: chat completions, and the Responses API's two.
_TEXT_PARTS = ("text", "input_text", "output_text")
#: What is read beside the last turn: with it they fit into the predictor's excerpt.
MAX_SYSTEM_CHARS = 200
MAX_TURN_CHARS = 400
NUM_EARLIER_TURNS = 2


def parse(value: Any, name: str = "messages") -> tuple[Message, ...]:
    """Messages with role and content. Raises DataError with the first thing that is wrong.

    A string is read as the JSON of a list, as a table's cell holds it.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"`{name}` is text, not a list of messages") from error
    if not isinstance(value, list) or not value:
        raise DataError(f"`{name}` is not a list of messages with role and content")
    if len(value) > MAX_MESSAGES:
        raise DataError(f"`{name}` has {len(value):,} messages; at most {MAX_MESSAGES:,}")
    return tuple(_message(each, f"{name}[{index}]") for index, each in enumerate(value))


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"`{name}` is not an object with role and content")
    if "role" not in value and isinstance(value.get("from"), str):
        role = _ROLES.get(value["from"].lower())
        if role is None:
            raise DataError(f"`{name}` is from {value['from'][:40]!r}; known are human and gpt")
        return {"role": role, "content": _text(value.get("value"), name)}
    if not isinstance(value.get("role"), str):
        raise DataError(f"`{name}` has no `role`, such as user or assistant")
    content = value.get("content")
    if content is not None and not isinstance(content, str | list):
        raise DataError(f"`{name}.content` is neither text nor a list of parts")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"`{name}` has no text under `value`")
    return value


def asked(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation up to what wants an answer: without the answers at its end."""
    end = len(messages)
    while end and messages[end - 1].get("role") == "assistant":
        end -= 1
    return tuple(messages[:end])


def answer(messages: Sequence[Message]) -> str:
    """The assistant's text at the end of a logged conversation; "" where it ends otherwise."""
    last = messages[-1] if messages else {}
    return content_text(last.get("content")) if last.get("role") == "assistant" else ""


def scored_text(messages: Sequence[Message]) -> str:
    """What the predictor reads of a conversation, in training and in the router alike.

    The last turn of the user, whole, after what it may refer to: the beginning of the system
    prompt and of the two turns of the user before it. A follow-up such as "now the same for the
    other one" is so as hard as what it follows, and a single turn is scored as a plain prompt.
    Work is bounded by `MAX_SYSTEM_CHARS` and `MAX_TURN_CHARS` beside the last turn.
    """
    if not messages:
        return ""
    if len(messages) <= 2 and (text := _one_turn(messages)) is not None:
        return text
    recent: list[Message] = []  # the user's, newest first
    for message in reversed(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            recent.append(message)
            if len(recent) > NUM_EARLIER_TURNS:
                break
    if not recent:
        return content_text(messages[-1].get("content"))
    last, first = content_text(recent[0].get("content")), messages[0]
    system = ""
    if first is not recent[-1] and _role(first) in ("system", "developer"):
        system = content_text(first.get("content"))[:MAX_SYSTEM_CHARS].strip()
    if len(recent) == 1:
        return f"{system}\n\n{last}" if system else last
    texts = [system]
    for message in reversed(recent[1:]):
        texts.append(content_text(message.get("content"))[:MAX_TURN_CHARS].strip())
    return "\n\n".join([*filter(None, texts), last])


def _one_turn(messages: Sequence[Message]) -> str | None:
    """As `scored_text` for the commonest: one turn after a system prompt, or alone, of texts."""
    last = messages[-1]
    if type(last) is not dict or last.get("role") != "user":
        return None
    text = last.get("content")
    if type(text) is not str:
        return None
    if len(messages) == 1:
        return text
    first = messages[0]
    if type(first) is not dict or first.get("role") != "system":
        return None
    system = first.get("content")
    if type(system) is not str:
        return None
    system = system[:MAX_SYSTEM_CHARS].strip()
    return f"{system}\n\n{text}" if system else text


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def content_text(content: Any) -> str:
    """The text of a message's content, of all its text parts where it is a list."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [
            part.get("text")
            for part in content
            if isinstance(part, dict) and part.get("type") in _TEXT_PARTS
        ]
        return "\n".join(text for text in texts if isinstance(text, str))
    return ""
