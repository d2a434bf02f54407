"""What the router reads of an OpenAI request body; everything else passes through unread.

The body's bytes go to the worker unchanged. The router parses them once, holds them against the
types of `body`, which bound choices and lengths, and takes the few fields that routing needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import msgspec
from msgspec import Struct

from tandem_router.config import LimitsConfig
from tandem_router.errors import bad_request
from tandem_router.openai.body import Bodies, Chat, Completion
from tandem_router.openai.declared import checked
from tandem_router.openai.embeddings import input_tokens
from tandem_router.openai.json_body import parse_json
from tandem_router.openai.needs import ASKING, needed_features
from tandem_router.openai.prompt_size import prompt_tokens
from tandem_router.policy import Needs
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
# What routers and workers tell each other, and what would change how others' text is read.
RESERVED = frozenset(
    {
        *("tandem", "kv_transfer_params", "ec_transfer_params"),
        *("bootstrap_host", "bootstrap_port", "bootstrap_room"),
    }
)
_NOT_TAKEN = RESERVED | {"chat_template", "vllm_xargs"}
_NO_IDS: Sequence[Sequence[int]] = ()
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


def parse_inference(kind: Kind, body: bytes, bodies: Bodies) -> InferenceRequest:
    """Parse and bound a request for an answer or for embeddings. Raises ApiError (400)."""
    limits = bodies.limits
    fields = parse_json(body, limits.max_json_depth)
    if not _NOT_TAKEN.isdisjoint(fields):
        _refuse(fields)
    if kind == "embeddings":
        return _embeddings(body, fields, bodies)
    num_prompts, ids, is_text, longest = 1, _NO_IDS, True, 0
    prompt: str | None
    said: Chat | Completion
    if kind == "chat":
        said = chat = checked(fields, bodies.chat)
        newer = chat.max_completion_tokens
        max_tokens = newer if newer is not None else chat.max_tokens
        num_choices = chat.n or 1
        messages = fields["messages"]
        prompt = conversation.scored_text(messages)
        for message in messages:
            if type(message.get("content")) is list:
                is_text = False
    else:
        said = completion = checked(fields, bodies.completion)
        max_tokens = completion.max_tokens
        num_choices = max(completion.n or 1, completion.best_of or 1)
        prompt, num_prompts, ids = _prompts(completion.prompt, limits)
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
    # Most bodies hold no field of these, and one look says so.
    is_plain = is_text and ASKING.isdisjoint(fields)
    features = _PLAIN_FEATURES if is_plain else needed_features(fields)
    options = said.stream_options
    # By place: names would cost as much as the rest.
    return InferenceRequest(
        kind,
        PATHS[kind],
        body,
        fields,
        said.model,
        said.stream is True,
        options is not None and options.include_usage is True,
        num_choices * num_prompts,
        max_tokens,
        prompt,
        num_expected,
        num_most,
        Needs(features, per_prompt + (max_tokens or 0), longest),
        ids[0] if ids else None,
    )


def _refuse(fields: Mapping[str, Any]) -> None:
    for reserved in RESERVED & fields.keys():
        raise bad_request(f"`{reserved}` is reserved for the router", reserved)
    extra = fields.get("vllm_xargs")
    # vLLM keeps both in one place.
    for reserved in RESERVED & (extra.keys() if isinstance(extra, dict) else frozenset()):
        raise bad_request(f"`vllm_xargs.{reserved}` is reserved for the router", "vllm_xargs")
    if fields.get("chat_template") is not None:
        raise bad_request(
            "`chat_template` is not taken from requests: the model's own is used", "chat_template"
        )


def _embeddings(body: bytes, fields: Mapping[str, Any], bodies: Bodies) -> InferenceRequest:
    """No answer is generated: what is paid is the input."""
    said = checked(fields, bodies.embedding)
    if said.stream:
        raise bad_request("embeddings are not streamed", "stream")
    expected, most, certain = input_tokens(said.input, bodies.limits)
    return InferenceRequest(
        kind="embeddings",
        path=PATHS["embeddings"],
        body=body,
        fields=fields,
        model=said.model,
        stream=False,
        include_usage=False,
        num_choices=1,
        max_tokens=0,
        prompt=None,
        num_prompt_tokens=expected,
        most_prompt_tokens=most,
        needs=Needs(frozenset({"embeddings"}), 0, certain),
    )


def _prompts(
    given: str | list[str | int | list[int]], limits: LimitsConfig
) -> tuple[str | None, int, Sequence[Sequence[int]]]:
    """(text to score, number of prompts, the prompts' token ids where given as such)."""
    if isinstance(given, str):
        return given, 1, _NO_IDS
    kinds = set(map(type, given))
    if len(kinds) > 1:
        raise bad_request("`prompt` must be a string, a list of strings, or token ids", "prompt")
    if int in kinds:
        return None, 1, (cast(list[int], given),)
    most = limits.max_n * 8
    if len(given) > most:
        raise bad_request(f"`prompt` has {len(given)} prompts; at most {most}", "prompt")
    if str in kinds:
        return cast(str, given[0]), len(given), _NO_IDS
    return None, len(given), cast(list[list[int]], given)


def with_max_tokens(
    kind: Kind, fields: Mapping[str, Any], max_tokens: int, name: str
) -> dict[str, Any]:
    """The fields with another bound on the answer, under the client's name for it or `name`."""
    names = ["max_tokens"] if kind == "completions" else ["max_tokens", "max_completion_tokens"]
    said = [each for each in names if fields.get(each) is not None]
    bounds = said or [name if kind == "chat" else "max_tokens"]
    return {**fields, **dict.fromkeys(bounds, max_tokens)}
