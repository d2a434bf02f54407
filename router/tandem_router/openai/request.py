"""What the router reads of an OpenAI request body; everything else passes through unread.

The body's bytes go to the worker unchanged. The router parses them once, checks what it must
bound (choices, lengths, nesting) and takes the few fields that routing needs. Values that only
the model gives a meaning to (temperature, tools, ...) are the worker's to judge.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from tandem_router.config import LimitsConfig
from tandem_router.errors import ApiError, bad_request
from tandem_router.openai import embeddings
from tandem_router.openai.needs import ASKING, needed_features
from tandem_router.openai.prompt_size import prompt_tokens
from tandem_router.policy import NO_OVERRIDES, Needs, Overrides
from tandem_router.predictor.records import conversation

Kind = Literal["chat", "completions", "embeddings"]
PATHS: dict[Kind, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "embeddings": "/v1/embeddings",
}
_PROMPT_FIELDS: dict[Kind, bytes] = {
    "chat": b'"messages"',
    "completions": b'"prompt"',
    "embeddings": b'"input"',
}
# Answer length assumed where neither the client nor a predictor says one, in tokens.
DEFAULT_OUTPUT_TOKENS = 256
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
# Objects and lists in one body: a conversation of 2,048 messages with parts has some 10,000.
MAX_CONTAINERS = 65_536
# What routers and workers tell each other, and what would change how others' text is read.
RESERVED = frozenset(
    {"tandem", "kv_transfer_params", "bootstrap_host", "bootstrap_port", "bootstrap_room"}
)

# Fields that are checked, bounded or say what a tier must be able to do.
_LOOKED_AT = (
    RESERVED
    | ASKING
    | {"chat_template", "n", "best_of", "max_completion_tokens", "stop", "logit_bias"}
    | {"prompt_logprobs"}
)
_PLAIN_FEATURES = needed_features({})


class InferenceRequest(Struct, frozen=True):
    """One validated request."""

    kind: Kind
    path: str
    body: bytes
    fields: Mapping[str, Any]
    model: str
    stream: bool
    include_usage: bool
    num_choices: int
    max_tokens: int | None
    # What the predictor scores: the conversation's text or the prompt; None for token ids.
    prompt: str | None
    # Estimate from the body's size; the worker's usage replaces it.
    num_prompt_tokens: int
    # What a ceiling of money has to reckon with.
    most_prompt_tokens: int
    needs: Needs
    # The first prompt, where it was given as token ids.
    token_ids: Sequence[int] | None = None

    def fields_of(self, body: bytes) -> Mapping[str, Any]:
        """What a body holds: this request's own is not read a second time."""
        if body is self.body:
            return self.fields
        fields: dict[str, Any] = msgspec.json.decode(body)
        return fields

    @property
    def prefix_bytes(self) -> bytes:
        """The part of the body that orders requests by shared prefix."""
        start = self.body.find(_PROMPT_FIELDS[self.kind])
        return self.body[max(0, start) :]


def parse_json(body: bytes, max_depth: int) -> dict[str, Any]:
    """The body as an object. Raises ApiError: not JSON, not an object, nested too deep."""

    try:
        data = msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep(max_depth) from None
    except msgspec.MsgspecError as error:
        why = str(error)
        if "UTF-8" in why:
            raise bad_request("the request body is not UTF-8") from error
        if _HALF_PAIR.search(body):
            why = "an escape \\uD800 to \\uDFFF without its other half"
        raise bad_request(f"the request body is not valid JSON: {why}") from error
    if not isinstance(data, dict):
        raise bad_request("the request body must be a JSON object")
    if body.count(b"{") + body.count(b"[") > max_depth:
        _check_shape(data, max_depth)
    return data


def _too_deep(max_depth: int) -> ApiError:
    return bad_request(f"the request body is nested deeper than {max_depth} levels")


def _check_shape(data: dict[str, Any], max_depth: int) -> None:
    """Raises ApiError: too deep, or too many values inside each other; stops as soon as it is."""
    depth, num_containers = 0, 0
    level: list[Any] = [data]
    while level:
        depth += 1
        num_containers += len(level)
        if depth > max_depth:
            raise _too_deep(max_depth)
        if num_containers > MAX_CONTAINERS:
            raise bad_request(f"the request body has more than {MAX_CONTAINERS} objects and lists")
        below: list[Any] = []
        for value in level:
            inside = value.values() if isinstance(value, dict) else value
            below.extend(each for each in inside if isinstance(each, dict | list))
        level = below


def parse_inference(kind: Kind, body: bytes, limits: LimitsConfig) -> InferenceRequest:
    """Parse and bound a request for an answer or for embeddings. Raises ApiError (400)."""
    fields = parse_json(body, limits.max_json_depth)
    # Most bodies hold no field of these, and one look says so.
    is_plain = _LOOKED_AT.isdisjoint(fields)
    if not is_plain:
        for reserved in RESERVED & fields.keys():
            raise bad_request(f"`{reserved}` is reserved for the router", reserved)
        if fields.get("chat_template") is not None:
            raise bad_request(
                "`chat_template` is not taken from requests: the model's own is used",
                "chat_template",
            )
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise bad_request("`model` must be a non-empty string", "model")
    if kind == "embeddings":
        return _embeddings(model, body, fields, limits)
    stream = fields.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise bad_request("`stream` must be true or false", "stream")
    include_usage = False
    if "stream_options" in fields:
        include_usage = _include_usage(fields["stream_options"])
    max_tokens = _bounded_int(fields, "max_tokens", 0, limits.max_tokens)
    num_choices = 1
    if not is_plain:
        num_choices = _bounded_int(fields, "n", 1, limits.max_n) or 1
        if kind == "completions":
            num_choices = max(num_choices, _bounded_int(fields, "best_of", 1, limits.max_n) or 1)
        else:
            newer = _bounded_int(fields, "max_completion_tokens", 0, limits.max_tokens)
            max_tokens = newer if newer is not None else max_tokens
        _check_stop(fields.get("stop"), limits)
        _check_costs(fields, limits)

    ids: Sequence[Sequence[int]] = ()
    num_prompts, longest = 1, 0
    prompt: str | None
    if kind == "chat":
        prompt, is_text = _chat_prompt(fields.get("messages"), limits)
    else:
        prompt, num_prompts, ids = _completion_prompt(fields.get("prompt"), limits)
        is_text = True
    if num_choices * num_prompts > limits.max_sequences:
        raise bad_request(
            f"{num_prompts} prompts with {num_choices} choices each are "
            f"{num_prompts * num_choices} sequences; at most {limits.max_sequences} in one request",
            "prompt" if num_prompts > 1 else "n",
        )
    if ids:
        num_expected = num_most = sum(map(len, ids))
        longest = max(map(len, ids))
    else:
        num_expected, num_most = prompt_tokens(len(body), {} if is_text else fields)
    per_prompt = longest or num_expected // num_prompts
    features = _PLAIN_FEATURES if is_plain and is_text else needed_features(fields)
    return InferenceRequest(
        kind=kind,
        path=PATHS[kind],
        body=body,
        fields=fields,
        model=model,
        stream=bool(stream),
        include_usage=include_usage,
        num_choices=num_choices * num_prompts,
        max_tokens=max_tokens,
        prompt=prompt,
        num_prompt_tokens=num_expected,
        most_prompt_tokens=num_most,
        needs=Needs(features, per_prompt + (max_tokens or 0), longest),
        token_ids=ids[0] if ids else None,
    )


def _embeddings(
    model: str, body: bytes, fields: dict[str, Any], limits: LimitsConfig
) -> InferenceRequest:
    """No answer is generated: what is paid is the input."""
    embeddings.check_fields(fields)
    expected, most, certain = embeddings.input_tokens(fields, limits)
    return InferenceRequest(
        kind="embeddings",
        path=PATHS["embeddings"],
        body=body,
        fields=fields,
        model=model,
        stream=False,
        include_usage=False,
        num_choices=1,
        max_tokens=0,
        prompt=None,
        num_prompt_tokens=expected,
        most_prompt_tokens=most,
        needs=Needs(frozenset({"embeddings"}), 0, certain),
    )


def with_max_tokens(
    kind: Kind, fields: Mapping[str, Any], max_tokens: int, name: str
) -> dict[str, Any]:
    """The fields with another bound on the answer, under the client's name for it or `name`."""
    names = ["max_tokens"] if kind == "completions" else ["max_tokens", "max_completion_tokens"]
    said = [each for each in names if fields.get(each) is not None]
    bounds = said or [name if kind == "chat" else "max_tokens"]
    return {**fields, **dict.fromkeys(bounds, max_tokens)}


def _bounded_int(fields: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_request(f"`{name}` must be a whole number, not {_shown(value)}", name)
    if not low <= value <= high:
        raise bad_request(f"`{name}`={value} is outside {low}..{high}", name)
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def _check_stop(stop: Any, limits: LimitsConfig) -> None:
    stops = [stop] if isinstance(stop, str) else stop
    if stops is None:
        return
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise bad_request("`stop` must be a string or a list of strings", "stop")
    if len(stops) > limits.max_stop:
        raise bad_request(f"`stop` has {len(stops)} strings; at most {limits.max_stop}", "stop")
    if any(len(text) > limits.max_stop_chars for text in stops):
        raise bad_request(
            f"a `stop` string is longer than {limits.max_stop_chars} characters", "stop"
        )


def _check_costs(fields: Mapping[str, Any], limits: LimitsConfig) -> None:
    """Bound what costs a worker time in every step of every sequence of its batch."""
    biases = fields.get("logit_bias")
    if isinstance(biases, dict | list) and len(biases) > limits.max_logit_bias:
        raise bad_request(
            f"`logit_bias` has {len(biases)} entries; at most {limits.max_logit_bias}",
            "logit_bias",
        )
    for name in ("top_logprobs", "logprobs", "prompt_logprobs"):
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > limits.max_logprobs:
            raise bad_request(f"`{name}`={value} is more than {limits.max_logprobs}", name)


def _include_usage(options: Any) -> bool:
    if options is not None and not isinstance(options, dict):
        raise bad_request("`stream_options` must be an object", "stream_options")
    include_usage = (options or {}).get("include_usage")
    if include_usage is not None and not isinstance(include_usage, bool):
        raise bad_request(
            "`stream_options.include_usage` must be true or false", "stream_options.include_usage"
        )
    return bool(include_usage)


def _chat_prompt(messages: Any, limits: LimitsConfig) -> tuple[str, bool]:
    """(text to score, whether every message is plain text)."""
    if not isinstance(messages, list) or not messages:
        raise bad_request("`messages` must be a non-empty list", "messages")
    if len(messages) > limits.max_messages:
        raise bad_request(
            f"`messages` has {len(messages)} entries; at most {limits.max_messages}", "messages"
        )
    is_text = True
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad_request(
                f"`messages[{index}]` must be an object with a `role`", f"messages[{index}]"
            )
        if isinstance(message.get("content"), list):
            is_text = False
    return conversation.scored_text(messages), is_text


def _completion_prompt(
    prompt: Any, limits: LimitsConfig
) -> tuple[str | None, int, Sequence[Sequence[int]]]:
    """(text to score, number of prompts, the prompts' token ids where given as such)."""
    if isinstance(prompt, str):
        return prompt, 1, ()
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, str) for item in prompt):
            _check_num_prompts(len(prompt), limits)
            return prompt[0], len(prompt), ()
        if _are_ids(prompt):
            return None, 1, (prompt,)
        if all(isinstance(item, list) and _are_ids(item) for item in prompt):
            _check_num_prompts(len(prompt), limits)
            return None, len(prompt), prompt
    raise bad_request(
        "`prompt` must be a string, a list of strings, or token ids, and not empty", "prompt"
    )


def _are_ids(items: list[Any]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) for item in items)


def _check_num_prompts(number: int, limits: LimitsConfig) -> None:
    if number > limits.max_n * 8:
        raise bad_request(f"`prompt` has {number} prompts; at most {limits.max_n * 8}", "prompt")


class RequestHeaders(Struct, frozen=True):
    """The only client headers that have an effect."""

    overrides: Overrides
    priority: int | None
    no_cache: bool
    api_key: str | None


NO_HEADERS = RequestHeaders(NO_OVERRIDES, None, False, None)
_READ = frozenset(
    {
        b"authorization",
        b"x-api-key",
        b"cache-control",
        b"x-tandem-quality",
        b"x-tandem-max-cost-usd",
        b"x-tandem-ttft-slo-ms",
        b"x-tandem-priority",
    }
)


def parse_headers(headers: list[tuple[bytes, bytes]], limits: LimitsConfig) -> RequestHeaders:
    """Raises ApiError (400, 431). Anything not read here never reaches a worker."""
    names = dict(headers)
    if len(names) == len(headers):
        num_bytes = sum(map(len, names)) + sum(map(len, names.values()))
    else:
        num_bytes = sum(len(name) + len(value) for name, value in headers)
    if num_bytes + 4 * len(headers) > limits.max_header_bytes:
        raise ApiError(431, f"request headers are larger than {limits.max_header_bytes} bytes")
    if _READ.isdisjoint(names):
        return NO_HEADERS
    quality = cost = ttft = priority = api_key = None
    no_cache = False
    for name, value in headers:
        if name not in _READ:
            continue
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer":
                api_key = key.strip()
        elif name == b"x-api-key":
            api_key = api_key or value.decode("latin-1").strip()
        elif name == b"cache-control":
            no_cache = b"no-cache" in value or b"no-store" in value
        elif name == b"x-tandem-quality":
            quality = _number(name, value, 0.0, 1.0)
        elif name == b"x-tandem-max-cost-usd":
            cost = _number(name, value, 0.0, 1e9)
        elif name == b"x-tandem-ttft-slo-ms":
            ttft = _number(name, value, 0.001, 1e9) / 1000.0
        elif name == b"x-tandem-priority":
            priority = int(_number(name, value, -100, 100, whole=True))
    overrides = NO_OVERRIDES
    if quality is not None or cost is not None or ttft is not None:
        overrides = Overrides(quality=quality, max_cost_usd=cost, ttft_slo_s=ttft)
    return RequestHeaders(overrides, priority, no_cache, api_key)


def _number(name: bytes, value: bytes, low: float, high: float, whole: bool = False) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not low <= number <= high or (whole and not number.is_integer()):
        kind = "a whole number" if whole else "a number"
        raise bad_request(
            f"header {name.decode()}: {value[:40].decode('latin-1')!r} is not {kind} "
            f"from {low:g} to {high:g}",
            name.decode(),
        )
    return number
