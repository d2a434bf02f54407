"""The chat request that a body of `/v1/messages` means.

Text, images, tools and their results are carried over; `thinking` as far as it is the model's own
choice. What would need Anthropic's servers (their tools, files, containers) is refused by name.
`cache_control` is read by nobody: every prefix is kept as long as there is room.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tandem_router.errors import bad_request

_PASSED_ON = ("temperature", "top_p", "top_k")
_REFUSED = ("container", "mcp_servers", "context_management", "speed", "inference_geo")
_THINKING = ("disabled", "adaptive")
# Blocks of earlier turns that say nothing to another model.
_FORGOTTEN = ("thinking", "redacted_thinking")


def to_chat(fields: Mapping[str, Any], counts_only: bool = False) -> dict[str, Any]:
    """Raises ApiError (400). counts_only: for count_tokens, which asks for no answer."""
    for name in _REFUSED:
        if fields.get(name):
            raise bad_request(f"`{name}` is not supported on /v1/messages here", name)
    chat: dict[str, Any] = {"model": fields.get("model"), "messages": _messages(fields)}
    chat.update(_tools(fields))
    _check_thinking(fields.get("thinking"))
    if counts_only:
        return chat
    if fields.get("max_tokens") is None:
        raise bad_request("`max_tokens` is required", "max_tokens")
    chat["max_tokens"] = fields["max_tokens"]
    chat.update({name: fields[name] for name in _PASSED_ON if fields.get(name) is not None})
    if fields.get("stop_sequences"):
        chat["stop"] = fields["stop_sequences"]
    chat.update(_output(fields.get("output_config"), fields.get("output_format")))
    tier = fields.get("service_tier")
    if tier not in (None, "auto", "standard_only"):
        raise bad_request("`service_tier` must be auto or standard_only", "service_tier")
    metadata = fields.get("metadata")
    if isinstance(metadata, dict) and metadata.get("user_id") is not None:
        chat["user"] = metadata["user_id"]
    if fields.get("stream") is not None:
        chat["stream"] = fields["stream"]
    if fields.get("stream") is True:
        chat["stream_options"] = {"include_usage": True}
    return chat


def _check_thinking(thinking: Any) -> None:
    kind = thinking.get("type") if isinstance(thinking, dict) else thinking
    if thinking is not None and kind not in _THINKING:
        raise bad_request(
            f"`thinking.type`={kind!r} is not supported: no tier takes a budget of thought; leave "
            "it out, or say adaptive (the model decides) or disabled",
            "thinking",
        )


def _output(config: Any, form: Any) -> dict[str, Any]:
    """`response_format` for a JSON schema, as `output_config.format` or its older name."""
    if config is not None and not isinstance(config, dict):
        raise bad_request("`output_config` must be an object", "output_config")
    config = config or {}
    said = config.get("format") or form
    chat: dict[str, Any] = {}
    if config.get("effort") is not None:
        chat["reasoning_effort"] = config["effort"]
    if said is None:
        return chat
    if not isinstance(said, dict) or said.get("type") != "json_schema":
        raise bad_request("only a format of type json_schema is supported", "output_config.format")
    schema = {"name": "answer", "schema": said.get("schema"), "strict": True}
    return {**chat, "response_format": {"type": "json_schema", "json_schema": schema}}


def _messages(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = fields.get("messages")
    if not isinstance(given, list) or not given:
        raise bad_request("`messages` must be a non-empty list", "messages")
    messages: list[dict[str, Any]] = []
    if fields.get("system"):
        messages.append({"role": "system", "content": _text(fields["system"], "system")})
    for index, message in enumerate(given):
        where = f"messages[{index}]"
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if role not in ("user", "assistant", "system") or not isinstance(content, list):
            raise bad_request(
                f"`{where}` must have a role, user or assistant, and `content`, text or a list "
                "of blocks",
                where,
            )
        if role == "assistant":
            messages.append(_said(content, where))
        elif role == "system":
            messages.append({"role": "system", "content": _text(content, where)})
        else:
            messages += _asked(content, where)
    return messages


def _block(block: Any, where: str) -> tuple[str, dict[str, Any]]:
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(kind, str):
        raise bad_request(f"`{where}` must be an object with a `type`", where)
    return kind, block


def _text(content: Any, where: str) -> str:
    """Text, or blocks of nothing else."""
    if isinstance(content, str):
        return content
    parts = []
    for index, each in enumerate(content if isinstance(content, list) else [None]):
        at = f"{where}[{index}]"
        kind, block = _block(each, at)
        if kind != "text" or not isinstance(block.get("text"), str):
            raise bad_request(f"`{at}` is of type {kind!r}; use text", at)
        parts.append(block["text"])
    return "\n".join(parts)


def _asked(content: list[Any], where: str) -> list[dict[str, Any]]:
    """A user's turn: results of tools first, as chat wants them, then what was said."""
    results: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for index, each in enumerate(content):
        at = f"{where}.content[{index}]"
        kind, block = _block(each, at)
        if kind == "text" and isinstance(block.get("text"), str):
            parts.append({"type": "text", "text": block["text"]})
        elif kind == "image":
            parts.append(_image(block, at))
        elif kind == "tool_result":
            text, images = _result(block, at)
            results.append(
                {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}
            )
            parts += images
        else:
            raise bad_request(f"`{at}` has content of type {kind!r}, which no tier reads here", at)
    if not parts:
        return results
    if all(part["type"] == "text" for part in parts):
        said: Any = "\n".join(part["text"] for part in parts)
    else:
        said = parts
    return [*results, {"role": "user", "content": said}]


def _result(block: Mapping[str, Any], where: str) -> tuple[str, list[dict[str, Any]]]:
    """What a tool gave: its text, and its images, which chat takes from users only."""
    if not isinstance(block.get("tool_use_id"), str):
        raise bad_request(f"`{where}.tool_use_id` must be a string", where)
    content = block.get("content")
    if isinstance(content, list):
        images = [
            _image(each, where)
            for each in content
            if isinstance(each, dict) and each.get("type") == "image"
        ]
        content = [
            each for each in content if not (isinstance(each, dict) and each.get("type") == "image")
        ]
    else:
        images = []
    text = _text(content, f"{where}.content") if content else ""
    return (f"Error: {text}" if block.get("is_error") else text), images


def _image(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    source = block.get("source")
    kind = source.get("type") if isinstance(source, dict) else None
    if isinstance(source, dict) and kind == "url" and isinstance(source.get("url"), str):
        return {"type": "image_url", "image_url": {"url": source["url"]}}
    data, media = (source or {}).get("data"), (source or {}).get("media_type")
    if kind == "base64" and isinstance(data, str) and isinstance(media, str):
        return {"type": "image_url", "image_url": {"url": f"data:{media};base64,{data}"}}
    raise bad_request(f"`{where}.source` must be base64 with a media type, or a URL", where)


def _said(content: list[Any], where: str) -> dict[str, Any]:
    """The assistant's turn: text and the tools that it used."""
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, each in enumerate(content):
        at = f"{where}.content[{index}]"
        kind, block = _block(each, at)
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "tool_use" and isinstance(block.get("name"), str):
            arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
            function = {"name": block["name"], "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind not in _FORGOTTEN:
            raise bad_request(f"`{at}` has content of type {kind!r}, which no tier reads here", at)
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if calls:
        message = {**message, "content": "\n".join(texts) or None, "tool_calls": calls}
    return message


def _tools(fields: Mapping[str, Any]) -> dict[str, Any]:
    given = fields.get("tools")
    if not given:
        return {}
    if not isinstance(given, list):
        raise bad_request("`tools` must be a list", "tools")
    tools = []
    for index, tool in enumerate(given):
        where = f"tools[{index}]"
        name = tool.get("name") if isinstance(tool, dict) else None
        if not isinstance(name, str) or tool.get("type", "custom") not in (None, "custom"):
            raise bad_request(
                f"`{where}` must be a tool of yours with a `name` and an `input_schema`; tools "
                "that Anthropic runs are not here",
                where,
            )
        function = {"name": name, "parameters": tool.get("input_schema") or {}}
        if tool.get("description") is not None:
            function["description"] = tool["description"]
        if tool.get("strict") is not None:
            function["strict"] = tool["strict"]
        tools.append({"type": "function", "function": function})
    return {"tools": tools, **_tool_choice(fields.get("tool_choice"))}


def _tool_choice(choice: Any) -> dict[str, Any]:
    if choice is None:
        return {}
    kind = choice.get("type") if isinstance(choice, dict) else None
    chat: dict[str, Any] = {}
    if kind in ("auto", "none"):
        chat["tool_choice"] = kind
    elif kind == "any":
        chat["tool_choice"] = "required"
    elif kind == "tool" and isinstance(choice.get("name"), str):
        chat["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
    else:
        raise bad_request("`tool_choice.type` must be auto, any, tool (with a name) or none")
    if choice.get("disable_parallel_tool_use"):
        chat["parallel_tool_calls"] = False
    return chat
