"""OpenAI request bodies to checked plain values; every refusal names field, value and rule."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.errors import RequestError

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_SALT = 1024
_UINT64 = (1 << 64) - 1
_LEAST_TEMPERATURE = 1e-5
"""Below this the highest logit always wins, and logits divided by it could overflow."""


@dataclass(frozen=True)
class CompletionRequest:
    """One checked request.

    Attributes:
        kind: Which endpoint it came to.
        messages: Chat only.
        prompts: Completions only: texts or token ids.
        max_tokens: None where the client did not say.
        seed: None where the client did not say.
        resume_token_ids: Per choice, tokens already sent to the client by another worker.
        cache_salt: Digest of the client's ``cache_salt`` (vLLM's field): only requests of the same
            salt share cached prefixes.
    """

    kind: Literal["chat", "completion"]
    messages: tuple[dict[str, Any], ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    template_variables: Mapping[str, Any] | None = None
    add_generation_prompt: bool = True
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    resume_token_ids: tuple[tuple[int, ...], ...] = ()
    cache_salt: bytes = b""


def parse_body(raw: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        RequestError: not JSON, or not an object.
    """
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise RequestError(f"the body must be a JSON object, got {type(data).__name__}")
    return data


class Fields:
    """Typed access to a JSON object's fields; null means absent."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data

    def raw(self, name: str) -> Any:
        """The value as it is, or None."""
        return self._data.get(name)

    def flag(self, name: str, default: bool = False) -> bool:
        """A boolean."""
        value = self._data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise _wrong(name, value, "must be true or false")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number within closed bounds."""
        value = self._data.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(name, value, "must be a number")
        if not low <= value <= high:  # also where it is not a number
            raise _wrong(name, value, f"must be between {low:g} and {high:g}")
        return float(value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """An integer within closed bounds, or None."""
        value = self._data.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong(name, value, "must be an integer")
        if not low <= value <= high:
            raise _wrong(name, value, f"must be between {low} and {high}")
        return value

    def strings(self, name: str, limit: int) -> tuple[str, ...]:
        """A string or a list of at most ``limit`` strings."""
        value = self._data.get(name)
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise _wrong(name, value, "must be a string or a list of strings")
        if len(values) > limit:
            raise _wrong(name, f"{len(values)} entries", f"must have at most {limit}")
        return tuple(values)

    def token_ids(self, name: str, limit: int = 1024) -> tuple[int, ...]:
        """A list of token ids."""
        value = self._data.get(name)
        if value is None:
            return ()
        if not _are_token_ids(value) or len(value) > limit:
            raise _wrong(name, value, f"must be a list of at most {limit} token ids")
        return tuple(value)


def parse_chat(data: Mapping[str, Any]) -> CompletionRequest:
    """POST /v1/chat/completions.

    Raises:
        RequestError: a field breaks a rule or asks for something this worker does not do.
    """
    fields = Fields(data)
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", messages, "must be a list with at least one message")
    top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    logprobs = fields.flag("logprobs")
    if top is not None and not logprobs:
        raise _wrong("top_logprobs", top, "needs logprobs to be true")
    if data.get("tools") and data.get("tool_choice") != "none":
        raise RequestError(
            "tools are not supported by this worker; leave them out or set tool_choice to 'none'",
            param="tools",
            code="unsupported_parameter",
        )
    variables = data.get("chat_template_kwargs")
    if variables is not None and not isinstance(variables, dict):
        raise _wrong("chat_template_kwargs", variables, "must be an object")
    max_tokens = fields.integer("max_completion_tokens", 1, 2**31 - 1)
    if max_tokens is None:
        max_tokens = fields.integer("max_tokens", 1, 2**31 - 1)
    reserved = {"messages", "add_generation_prompt", "tools"}
    return CompletionRequest(
        kind="chat",
        messages=tuple(_message(item, index) for index, item in enumerate(messages)),
        template_variables={k: v for k, v in (variables or {}).items() if k not in reserved},
        add_generation_prompt=fields.flag("add_generation_prompt", True),
        echo=False,
        **_shared(fields, num_logprobs=(top or 0) if logprobs else None, max_tokens=max_tokens),
    )


def parse_completion(data: Mapping[str, Any]) -> CompletionRequest:
    """POST /v1/completions.

    Raises:
        RequestError: a field breaks a rule or asks for something this worker does not do.
    """
    fields = Fields(data)
    if data.get("suffix"):
        raise RequestError(
            "suffix is not supported by this worker; leave it out",
            param="suffix",
            code="unsupported_parameter",
        )
    n = fields.integer("n", 1, MAX_CHOICES) or 1
    best_of = fields.integer("best_of", 1, MAX_CHOICES)
    if best_of is not None and best_of != n:
        raise _wrong("best_of", best_of, f"is not supported unless it equals n={n}")
    num_logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
    return CompletionRequest(
        kind="completion",
        prompts=_prompts(data.get("prompt")),
        echo=fields.flag("echo"),
        **_shared(
            fields,
            num_logprobs=num_logprobs,
            max_tokens=fields.integer("max_tokens", 0, 2**31 - 1),
        ),
    )


def _shared(fields: Fields, *, num_logprobs: int | None, max_tokens: int | None) -> dict[str, Any]:
    """What both endpoints have in common."""
    response_format = fields.raw("response_format")
    if isinstance(response_format, dict) and response_format.get("type", "text") != "text":
        raise RequestError(
            f"response_format type {response_format.get('type')!r} is not supported by this "
            "worker; use 'text'",
            param="response_format",
            code="unsupported_parameter",
        )
    options = fields.raw("stream_options")
    if options is not None and not isinstance(options, dict):
        raise _wrong("stream_options", options, "must be an object")
    n = fields.integer("n", 1, MAX_CHOICES) or 1
    sampling = parse_sampling(
        fields, num_logprobs=num_logprobs, logit_bias=_logit_bias(fields.raw("logit_bias"))
    )
    seed = fields.integer("seed", -(1 << 63), _UINT64)
    return {
        "sampling": sampling,
        "max_tokens": max_tokens,
        "seed": None if seed is None else seed & _UINT64,
        "n": n,
        "stop": fields.strings("stop", MAX_STOPS),
        "include_stop": fields.flag("include_stop_str_in_output"),
        "skip_special_tokens": fields.flag("skip_special_tokens", True),
        "stream": fields.flag("stream"),
        "include_usage": bool((options or {}).get("include_usage")),
        "resume_token_ids": _resume(fields.raw("tandem")),
        "cache_salt": _cache_salt(fields.raw("cache_salt")),
    }


def parse_sampling(
    fields: Fields, *, num_logprobs: int | None, logit_bias: tuple[tuple[int, float], ...]
) -> SamplingParams:
    """How to draw; the same names and bounds in a client's body and in a prefill order.

    Raises:
        RequestError: a field breaks a rule.
    """
    temperature = fields.number("temperature", 1.0, 0.0, 2.0)
    return SamplingParams(
        temperature=0.0 if temperature < _LEAST_TEMPERATURE else temperature,
        top_p=fields.number("top_p", 1.0, 0.0, 1.0),
        top_k=max(0, fields.integer("top_k", -1, 2**31 - 1) or 0),
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 10.0),
        num_logprobs=num_logprobs,
        min_tokens=fields.integer("min_tokens", 0, 2**31 - 1) or 0,
        stop_token_ids=fields.token_ids("stop_token_ids"),
        ignore_eos=fields.flag("ignore_eos"),
        logit_bias=logit_bias,
    )


def parse_biases(value: Any) -> tuple[tuple[int, float], ...]:
    """``logit_bias`` as a prefill order carries it: pairs of token and bias.

    Raises:
        RequestError: it is something else.
    """
    if not isinstance(value, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and _are_token_ids(pair[:1]) for pair in value
    ):
        raise _wrong("logit_bias", value, "must be a list of [token, bias] pairs")
    return tuple((token, Fields({"bias": b}).number("bias", 0.0, -100, 100)) for token, b in value)


def _message(value: Any, index: int) -> dict[str, Any]:
    name = f"messages[{index}]"
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise _wrong(name, value, "must be an object with a role")
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
                raise _wrong(f"{name}.content", part, "needs a text of type string")
            texts.append(part["text"])
        content = "".join(texts)
    elif content is not None and not isinstance(content, str):
        raise _wrong(f"{name}.content", content, "must be a string or a list of text parts")
    return {**value, "content": content or ""}


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(value, str):
        return (value,)
    if _are_token_ids(value) and value:
        return (tuple(value),)
    if isinstance(value, list) and value:
        if len(value) > MAX_CHOICES:
            raise _wrong("prompt", f"{len(value)} prompts", f"must be at most {MAX_CHOICES}")
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(_are_token_ids(item) and item for item in value):
            return tuple(tuple(item) for item in value)
    raise _wrong("prompt", value, "must be a string, a list of strings, or lists of token ids")


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if not value:
        return ()
    if not isinstance(value, dict):
        raise _wrong("logit_bias", value, "must map token ids to numbers")
    pairs = []
    for key, bias in value.items():
        is_token_id = key.isascii() and key.isdigit() and len(key) <= 10
        if not is_token_id or isinstance(bias, bool) or not isinstance(bias, int | float):
            raise _wrong("logit_bias", {key: bias}, "must map token ids to numbers")
        if not -100 <= bias <= 100:
            raise _wrong("logit_bias", {key: bias}, "must be between -100 and 100")
        pairs.append((int(key), float(bias)))
    return tuple(pairs)


def _cache_salt(value: Any) -> bytes:
    if value is None:
        return b""
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_SALT:
        raise _wrong("cache_salt", value, f"must be a string of 1 to {MAX_SALT} characters")
    return hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _resume(value: Any) -> tuple[tuple[int, ...], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise _wrong("tandem", value, "must be an object")
    lists = value.get("resume_token_ids")
    if lists is None:
        return ()
    if not isinstance(lists, list) or not all(_are_token_ids(item) for item in lists):
        raise _wrong("tandem.resume_token_ids", lists, "must be a list of lists of token ids")
    return tuple(tuple(item) for item in lists)


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**31 for item in value
    )


def _wrong(name: str, value: Any, rule: str) -> RequestError:
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return RequestError(f"{name}={shown} {rule}", param=name)
