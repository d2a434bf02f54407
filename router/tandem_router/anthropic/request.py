"""The chat request that a body of `/v1/messages` means.

Text, images, tools and their results are carried over, and a budget of thought. What would need
Anthropic's servers (their tools, files, containers) is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from tandem_router.anthropic.body import (
    AnyTool,
    Assistant,
    AutoTool,
    Base64Source,
    Image,
    Message,
    MessageTokens,
    NoTool,
    OneTool,
    System,
    Text,
    Tool,
    ToolChoice,
    ToolResult,
    ToolUse,
    User,
)
from tandem_router.errors import bad_request
from tandem_router.openai.declared import checked

Body = TypeVar("Body", bound=MessageTokens)

_PASSED_ON = ("temperature", "top_p", "top_k")
_REFUSED = ("container", "mcp_servers", "context_management", "speed", "inference_geo")


def to_chat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The chat that is to be answered. Raises ApiError (400)."""
    said = _checked(fields, Message)
    chat = _conversation(said)
    chat["max_tokens"] = said.max_tokens
    chat.update({name: fields[name] for name in _PASSED_ON if fields.get(name) is not None})
    if said.stop_sequences:
        chat["stop"] = said.stop_sequences
    chat.update(_output(said))
    chat.update(_thought(said))
    if said.metadata is not None and said.metadata.user_id is not None:
        chat["user"] = said.metadata.user_id
    if said.stream is not None:
        chat["stream"] = said.stream
    if said.stream:
        chat["stream_options"] = {"include_usage": True}
    return chat


def to_counted_chat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The chat whose tokens are to be counted. Raises ApiError (400)."""
    return _conversation(_checked(fields, MessageTokens))


def _checked(fields: Mapping[str, Any], declared: type[Body]) -> Body:
    for name in _REFUSED:
        if fields.get(name):
            raise bad_request(f"`{name}` is not supported on /v1/messages here", name)
    return checked(fields, declared)


def _conversation(said: MessageTokens) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if said.system:
        messages.append({"role": "system", "content": _text(said.system)})
    for message in said.messages:
        if isinstance(message, System):
            messages.append({"role": "system", "content": _text(message.content)})
        elif isinstance(message, Assistant):
            messages.append(_said(message))
        else:
            messages += _asked(message)
    return {"model": said.model, "messages": messages, **_tools(said)}


def _text(content: str | Sequence[Text]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _asked(message: User) -> list[dict[str, Any]]:
    """A user's turn: results of tools first, as chat wants them, then what was said."""
    if isinstance(message.content, str):
        return [{"role": "user", "content": message.content}]
    results: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for block in message.content:
        if isinstance(block, Text):
            parts.append({"type": "text", "text": block.text})
        elif isinstance(block, Image):
            parts.append(_image(block))
        else:
            text, images = _result(block)
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
            parts += images
    if not parts:
        return results
    if all(part["type"] == "text" for part in parts):
        said: Any = "\n".join(part["text"] for part in parts)
    else:
        said = parts
    return [*results, {"role": "user", "content": said}]


def _result(block: ToolResult) -> tuple[str, list[dict[str, Any]]]:
    """What a tool gave: its text, and its images, which chat takes from users only."""
    content = block.content or ""
    images: list[dict[str, Any]] = []
    if isinstance(content, str):
        text = content
    else:
        text = _text([each for each in content if isinstance(each, Text)])
        images = [_image(each) for each in content if isinstance(each, Image)]
    return (f"Error: {text}" if block.is_error else text), images


def _image(block: Image) -> dict[str, Any]:
    source = block.source
    if isinstance(source, Base64Source):
        url = f"data:{source.media_type};base64,{source.data}"
    else:
        url = source.url
    return {"type": "image_url", "image_url": {"url": url}}


def _said(message: Assistant) -> dict[str, Any]:
    """The assistant's turn: text and the tools that it used. Its thoughts are not told on."""
    content = message.content
    blocks = [Text(content)] if isinstance(content, str) else content
    text = _text([block for block in blocks if isinstance(block, Text)])
    calls = [_call(block) for block in blocks if isinstance(block, ToolUse)]
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": text or None, "tool_calls": calls}


def _call(block: ToolUse) -> dict[str, Any]:
    arguments = json.dumps(block.input or {}, ensure_ascii=False)
    function = {"name": block.name, "arguments": arguments}
    return {"id": block.id, "type": "function", "function": function}


def _output(said: Message) -> dict[str, Any]:
    """`response_format` for a JSON schema, as `output_config.format` or its older name."""
    config = said.output_config
    chat: dict[str, Any] = {}
    if config is not None and config.effort is not None:
        chat["reasoning_effort"] = config.effort
    form = (config.format if config is not None else None) or said.output_format
    if form is not None:
        schema = {"name": "answer", "schema": form.schema, "strict": True}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    return chat


def _thought(said: Message) -> dict[str, Any]:
    """How long the model may think. Raises ApiError (400)."""
    if said.thinking is None:
        return {}
    kind, budget = said.thinking.type, said.thinking.budget_tokens
    if kind != "enabled":
        if budget is not None:
            raise bad_request(
                f"`thinking.budget_tokens`={budget} belongs to type enabled; the type is {kind}",
                "thinking",
            )
        return {}
    if budget is None:
        raise bad_request(
            "`thinking.budget_tokens` is missing; say it, or `thinking.type`: adaptive", "thinking"
        )
    if not 1 <= budget < said.max_tokens:
        raise bad_request(
            f"`thinking.budget_tokens`={budget} must be at least 1 and less than "
            f"`max_tokens`={said.max_tokens}: thoughts are part of the answer",
            "thinking",
        )
    return {"thinking_token_budget": budget}


def _tools(said: MessageTokens) -> dict[str, Any]:
    if not said.tools:
        return {}
    tools = [{"type": "function", "function": _function(tool)} for tool in said.tools]
    return {"tools": tools, **_tool_choice(said.tool_choice)}


def _function(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema or {}}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return function


def _tool_choice(choice: ToolChoice | None) -> dict[str, Any]:
    chat: dict[str, Any] = {}
    match choice:
        case None:
            return {}
        case AutoTool():
            chat["tool_choice"] = "auto"
        case NoTool():
            chat["tool_choice"] = "none"
        case AnyTool():
            chat["tool_choice"] = "required"
        case OneTool(name=name):
            chat["tool_choice"] = {"type": "function", "function": {"name": name}}
    if choice.disable_parallel_tool_use:
        chat["parallel_tool_calls"] = False
    return chat
