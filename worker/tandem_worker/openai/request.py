"""OpenAI request bodies as the plain values that the worker computes with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.errors import RequestError
from tandem_worker.openai.body import Body, ChatBody, CompletionBody
from tandem_worker.openai.fields import UINT64, wrong
from tandem_worker.openai.tools import ToolUse

_RESERVED_VARIABLES = {"messages", "add_generation_prompt", "tools"}


@dataclass(frozen=True)
class CompletionRequest:
    """One checked request.

    Attributes:
        kind: Which endpoint it came to.
        model: The model it asks for, or None.
        messages: Chat only.
        prompts: Completions only: texts or token ids.
        max_tokens: None where the client did not say.
        seed: None where the client did not say.
        resume_token_ids: Per choice, tokens already sent to the client by another worker.
        tools: What the answer may or must call; None for nothing.
        max_thought_tokens: The end of a thought is forced after so many; None for no limit.
        parse_special_tokens: Whether a text's spelling of a control token is that token.
        include_thought: Whether the reply holds the thought.
        cache_salt: Digest of the client's ``cache_salt`` (vLLM's field): only requests of the same
            salt share cached prefixes.
    """

    kind: Literal["chat", "completion"]
    model: str | None = None
    messages: tuple[dict[str, Any], ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    tools: ToolUse | None = None
    max_thought_tokens: int | None = None
    include_thought: bool = True
    add_generation_prompt: bool = True
    add_special_tokens: bool = True
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    parse_special_tokens: bool = False
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    resume_token_ids: tuple[tuple[int, ...], ...] = ()
    cache_salt: bytes = b""


def with_defaults(data: Mapping[str, Any], defaults: Mapping[str, float]) -> Mapping[str, Any]:
    """A body with the model's own sampling settings where it says nothing, as peers do."""
    added = {name: value for name, value in defaults.items() if data.get(name) is None}
    if data.get("max_completion_tokens") is not None:
        added.pop("max_tokens", None)
    return {**data, **added}


def parse_chat(data: Mapping[str, Any]) -> CompletionRequest:
    """POST /v1/chat/completions.

    Raises:
        RequestError: a field breaks a rule or asks for something this worker does not do.
    """
    body = ChatBody.read(data)
    return CompletionRequest(
        kind="chat",
        messages=tuple(_message(item, index) for index, item in enumerate(body.messages)),
        template_variables={
            **_effort(body),
            **{
                name: value
                for name, value in body.chat_template_kwargs.items()
                if name not in _RESERVED_VARIABLES
            },
        },
        tools=body.tool_use,
        max_thought_tokens=body.max_thought_tokens,
        include_thought=body.include_reasoning,
        add_generation_prompt=body.add_generation_prompt,
        **_shared(body, num_logprobs=(body.top_logprobs or 0) if body.logprobs else None),
    )


def parse_completion(data: Mapping[str, Any]) -> CompletionRequest:
    """POST /v1/completions.

    Raises:
        RequestError: a field breaks a rule or asks for something this worker does not do.
    """
    body = CompletionBody.read(data)
    return CompletionRequest(
        kind="completion",
        prompts=tuple(p if isinstance(p, str) else tuple(p) for p in body.prompt),
        echo=body.echo,
        add_special_tokens=body.add_special_tokens,
        **_shared(body, num_logprobs=body.logprobs),
    )


def _effort(body: ChatBody) -> dict[str, Any]:
    """What templates that know how hard to think are told, as vLLM tells them."""
    effort = body.reasoning_effort
    if effort is None:
        return {}
    thinks = effort != "none"
    return {"reasoning_effort": effort, "enable_thinking": thinks, "thinking": thinks}


def _shared(body: Body, *, num_logprobs: int | None) -> dict[str, Any]:
    """What both endpoints have in common."""
    return {
        "model": body.model,
        "sampling": replace(
            body.sampling(num_logprobs=num_logprobs, logit_bias=tuple(body.logit_bias)),
            grammar=body.grammar,
        ),
        "max_tokens": body.most_tokens,
        "seed": None if body.seed is None else body.seed & UINT64,
        "n": body.n,
        "stop": tuple(body.stop),
        "include_stop": body.include_stop_str_in_output,
        "skip_special_tokens": body.skip_special_tokens,
        "parse_special_tokens": body.parse_special_tokens,
        "stream": body.stream,
        "include_usage": body.stream_options.include_usage,
        "resume_token_ids": tuple(tuple(ids) for ids in body.tandem.resume_token_ids),
        "cache_salt": salt_digest(body.cache_salt),
    }


def _message(value: dict[str, Any], index: int) -> dict[str, Any]:
    name = f"messages[{index}]"
    if not isinstance(value.get("role"), str):
        raise wrong(name, value, "must be an object with a role")
    content = value.get("content")
    if isinstance(content, list):
        texts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") not in ("text", "input_text"):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise RequestError(
                    f"{name}.content has a part of type {kind!r}; this model reads text only",
                    param=name,
                    code="unsupported_content",
                )
            if not isinstance(part.get("text"), str):
                raise wrong(f"{name}.content", part, "needs a text of type string")
            texts.append(part["text"])
        content = "\n".join(texts)  # as vLLM joins them
    elif content is not None and not isinstance(content, str):
        raise wrong(f"{name}.content", content, "must be a string or a list of text parts")
    message = {**value, "content": content or ""}
    if isinstance(value.get("reasoning"), str) and not value.get("reasoning_content"):
        message["reasoning_content"] = value["reasoning"]  # as newer servers call it
    if value.get("tool_calls"):
        message["tool_calls"] = _called(value["tool_calls"], f"{name}.tool_calls")
    return message


def _called(calls: Any, name: str) -> list[dict[str, Any]]:
    """Calls of an earlier answer as templates expect them: arguments are objects, not text."""
    if not isinstance(calls, list) or not all(
        isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls
    ):
        raise wrong(name, calls, "must be a list of objects with a function")
    return [{**call, "function": _with_object(call["function"], name)} for call in calls]


def _with_object(function: dict[str, Any], name: str) -> dict[str, Any]:
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return function
    try:
        return {**function, "arguments": json.loads(arguments) if arguments else {}}
    except (ValueError, RecursionError) as error:
        raise wrong(name, arguments, f"has arguments that are not JSON: {error}") from error


def salt_digest(salt: str | None) -> bytes:
    """What stands for a client's salt; empty for none."""
    if salt is None:
        return b""
    return hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16).digest()
