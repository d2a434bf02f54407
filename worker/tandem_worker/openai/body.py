"""What the body of a completion or chat request may hold: the one declared description.

A field that would change the answer and that this worker does not have is refused by name
(:data:`REFUSED`); other unknown fields pass.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from tandem_worker.errors import RequestError
from tandem_worker.openai.answer_format import guided_grammar, response_format_grammar
from tandem_worker.openai.fields import (
    INT32,
    MAX_LOGPROBS,
    UINT64,
    Declared,
    SamplingFields,
    TokenIds,
    unsupported,
    wrong,
)
from tandem_worker.openai.tools import ToolUse, tool_use

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_SALT = 1024


@dataclass(frozen=True)
class Refusal:
    """A field that this worker knows and does not serve.

    Attributes:
        instead: What the sender can do.
        neutral: Values that ask for nothing.
    """

    instead: str
    neutral: tuple[Any, ...] = ()


_LEAVE_OUT = "leave it out"
_ONE_OF_OURS = "leave it out, or use temperature, top_p, top_k and min_p"
_NO_BEAMS = "leave it out; this worker samples, n gives several answers"

REFUSED: Mapping[str, Refusal] = {
    "functions": Refusal("use tools"),
    "function_call": Refusal("use tool_choice", ("none", "auto")),
    "bad_words": Refusal("use logit_bias with -100 on tokens"),
    "allowed_token_ids": Refusal("use logit_bias with -100 on the other tokens"),
    "continue_final_message": Refusal("use /v1/completions with the text so far as prompt"),
    "truncate_prompt_tokens": Refusal("cut the prompt before sending it"),
    "prompt_logprobs": Refusal("use /v1/completions with echo and logprobs"),
    "use_beam_search": Refusal(_NO_BEAMS),
    "num_beams": Refusal(_NO_BEAMS, (1,)),
    "length_penalty": Refusal(_NO_BEAMS, (1, 1.0, 0, 0.0)),
    "early_stopping": Refusal(_NO_BEAMS),
    "modalities": Refusal("this model writes text; leave it out or send ['text']", (["text"],)),
    "audio": Refusal("this model writes text"),
    "return_token_ids": Refusal("send the header x-tandem-token-ids: 1"),
    "priority": Refusal("send the header x-tandem-priority", (0,)),
    "suffix": Refusal(_LEAVE_OUT),
    "web_search_options": Refusal("this worker searches nothing; put results into the messages"),
    "chat_template": Refusal("the model's own template is used; use /v1/completions for another"),
    "documents": Refusal("put documents into the messages"),
    "mm_processor_kwargs": Refusal("this model reads text only"),
    "logits_processors": Refusal("use logit_bias"),
    "typical_p": Refusal(_ONE_OF_OURS, (1, 1.0)),
    "top_a": Refusal(_ONE_OF_OURS, (0, 0.0)),
    "tfs": Refusal(_ONE_OF_OURS, (1, 1.0)),
    "mirostat_mode": Refusal(_ONE_OF_OURS, (0,)),
    "xtc_probability": Refusal(_ONE_OF_OURS, (0, 0.0)),
    "dry_multiplier": Refusal(_ONE_OF_OURS, (0, 0.0)),
    "no_repeat_ngram_size": Refusal("use frequency_penalty or repetition_penalty", (0,)),
    "thinking_budget": Refusal("use thinking_token_budget"),
    "min_new_tokens": Refusal("use min_tokens"),
    "max_new_tokens": Refusal("use max_tokens"),
}


def _check_refused(data: Mapping[str, Any]) -> None:
    for name in REFUSED.keys() & data.keys():
        value = data[name]
        empty = value is None or value is False or value in ("", [], {})
        if not empty and not any(
            value == neutral and type(value) is type(neutral) for neutral in REFUSED[name].neutral
        ):
            raise unsupported(name, REFUSED[name].instead)


def _stops(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise wrong("stop", value, "must be a string or a list of strings")
    if len(values) > MAX_STOPS:
        raise wrong("stop", f"{len(values)} entries", f"must have at most {MAX_STOPS}")
    if "" in values and value != "":
        raise wrong("stop", value, "holds an empty string, which would end every answer at once")
    return [item for item in values if item]


def _biases(value: Any) -> list[tuple[int, float]]:
    if not isinstance(value, dict):
        raise wrong("logit_bias", value, "must map token ids to numbers")
    pairs = []
    for key, bias in value.items():
        is_token_id = key.isascii() and key.isdigit() and len(key) <= 10
        if not is_token_id or isinstance(bias, bool) or not isinstance(bias, int | float):
            raise wrong("logit_bias", {key: bias}, "must map token ids to numbers")
        if not -100 <= bias <= 100:
            raise wrong("logit_bias", {key: bias}, "must be between -100 and 100")
        pairs.append((int(key), float(bias)))
    return pairs


def _prompts(value: Any) -> list[str | list[int]]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if are_token_ids(value):
            return [value]
        if len(value) > MAX_CHOICES:
            raise wrong("prompt", f"{len(value)} prompts", f"must be at most {MAX_CHOICES}")
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and item and are_token_ids(item) for item in value):
            return value
    raise wrong("prompt", value, "must be a string, a list of strings, or lists of token ids")


def are_token_ids(value: list[Any]) -> bool:
    """Whether a list holds token ids only."""
    return all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= INT32
        for item in value
    )


Stops = Annotated[
    list[str],
    PlainValidator(_stops),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
Biases = Annotated[
    list[tuple[int, float]],
    PlainValidator(_biases),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_prompts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array"}]}),
]


class StreamOptions(Declared):
    """``stream_options``."""

    include_usage: bool = False


class Resume(Declared):
    """``tandem``: what the router adds when it moves a stream to another worker."""

    resume_token_ids: list[TokenIds] = []


class Body(SamplingFields):
    """What both endpoints have in common."""

    model: str | None = Field(default=None, description="The served model, if given.")
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stop: Stops = []
    logit_bias: Biases = []
    seed: int | None = Field(default=None, ge=-(1 << 63), le=UINT64)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: dict[str, Any] = {}
    structured_outputs: dict[str, Any] = {}
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    parse_special_tokens: bool = False
    cache_salt: str | None = Field(default=None, min_length=1, max_length=MAX_SALT)
    tandem: Resume = Resume()
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if isinstance(data, dict):
            _check_refused(data)
        return data

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise wrong("best_of", self.best_of, f"is not supported unless it equals n={self.n}")
        limit = self.most_tokens
        if limit is not None and self.min_tokens > limit:
            raise wrong("min_tokens", self.min_tokens, f"must not exceed max_tokens={limit}")
        if self.grammar:
            self.check_unbroken({"stop": self.stop})
        return self

    def check_unbroken(self, more: Mapping[str, Any]) -> None:
        """Refuse what could end an answer within its format, or make it go on after its end."""
        told = {
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "stop_token_ids": self.stop_token_ids,
        }
        for name, value in {**told, **more}.items():
            if value:
                raise wrong(name, value, "could break the answer's format; leave it out")

    @property
    @abstractmethod
    def most_tokens(self) -> int | None:
        """The answer's longest length, or None where the client did not say."""

    @cached_property
    def grammar(self) -> str:
        """What the answer has to match; empty for anything."""
        asked = {
            "response_format": response_format_grammar(self.response_format),
            "structured_outputs": self.structured_outputs
            and guided_grammar("structured_outputs", self.structured_outputs),
            **{
                f"guided_{key}": guided_grammar(f"guided_{key}", {key: value})
                for key, value in (
                    ("json", self.guided_json),
                    ("regex", self.guided_regex),
                    ("choice", self.guided_choice),
                    ("grammar", self.guided_grammar),
                )
                if value is not None
            },
        }
        given = {name: grammar for name, grammar in asked.items() if grammar}
        if len(given) > 1:
            raise RequestError(
                f"{' and '.join(given)} both ask for a format; give one of them",
                param=list(given)[1],
            )
        return next(iter(given.values()), "")


class TokenizeBody(Declared):
    """POST /tokenize with a text; with ``messages`` it is a chat body."""

    prompt: str
    add_special_tokens: bool = True
    parse_special_tokens: bool = False


class DetokenizeBody(Declared):
    """POST /detokenize."""

    tokens: TokenIds = Field(max_length=1 << 20)


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: int | None = Field(default=None, ge=0, le=INT32)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    add_special_tokens: bool = True

    @property
    def most_tokens(self) -> int | None:
        """``max_tokens``."""
        return self.max_tokens


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
EFFORTS: Mapping[Effort, int | None] = {
    "none": 0,
    "minimal": 512,
    "low": 1024,
    "medium": 4096,
    "high": None,
    "xhigh": None,
    "max": None,
}
"""Tokens that a thought may take; a model that does not think keeps every limit."""


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, le=INT32)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=INT32)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}
    tools: list[dict[str, Any]] = []
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    reasoning_effort: Effort | None = None
    thinking_token_budget: int | None = Field(default=None, ge=0, le=INT32)
    include_reasoning: bool = True

    @property
    def most_tokens(self) -> int | None:
        """``max_completion_tokens``, or its older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs", self.top_logprobs, "needs logprobs to be true")
        if self.tool_use is not None:
            self.check_unbroken({})
            if self.grammar and not self.response_format:
                raise RequestError(
                    "tools beside a format need response_format; the others do not say where a "
                    "call may come",
                    param="tools",
                )
        if self.max_thought_tokens is not None and self.ignore_eos:
            raise wrong("ignore_eos", True, "cannot be had beside a limit of thinking")
        return self

    @cached_property
    def tool_use(self) -> ToolUse | None:
        """What the answer may or must call; None for nothing."""
        return tool_use(self.tools, self.tool_choice, parallel=self.parallel_tool_calls)

    @property
    def max_thought_tokens(self) -> int | None:
        """The end of a thought is forced after so many tokens; None where it may take all."""
        if self.thinking_token_budget is not None:
            return self.thinking_token_budget
        return None if self.reasoning_effort is None else EFFORTS[self.reasoning_effort]
