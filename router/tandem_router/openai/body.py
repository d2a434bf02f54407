"""What the body of a request may hold, as far as the router reads it: declared once.

Values that only a model gives a meaning to (temperature, tools, ...) are not declared: they pass,
and are the worker's to judge.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta, Struct, defstruct

from tandem_router.config import LimitsConfig

NonEmpty = Annotated[str, Meta(min_length=1)]
TokenIds = Annotated[list[int], Meta(min_length=1)]
Prompt = Annotated[
    str | Annotated[list[str | int | TokenIds], Meta(min_length=1)],
    Meta(description="a string, a list of strings, or token ids, and not empty"),
]
Input = Annotated[
    NonEmpty | Annotated[list[NonEmpty | int | TokenIds], Meta(min_length=1)],
    Meta(description="a string, a list of strings, or token ids, and not empty"),
]


class ChatMessage(Struct):
    """One message of a chat; what it says is read apart."""

    role: str


class StreamOptions(Struct):
    """What a stream has beside its chunks."""

    include_usage: bool | None = None


class Generation(Struct, kw_only=True):
    """What chats and completions have in common; its numbers are bounded by `Bodies`."""

    model: NonEmpty
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, Any] | list[Any] | None = None
    top_logprobs: bool | int | None = None
    logprobs: bool | int | None = None
    prompt_logprobs: bool | int | None = None


class Chat(Generation, kw_only=True):
    """`/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: int | None = None


class Completion(Generation, kw_only=True):
    """`/v1/completions`."""

    prompt: Prompt
    best_of: int | None = None


class Embedding(Struct, kw_only=True):
    """`/v1/embeddings`."""

    model: NonEmpty
    input: Input
    stream: bool | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None


class InputPart(Struct):
    """A part of a message on `/v1/responses`."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class InputItem(Struct, kw_only=True):
    """A message on `/v1/responses`, a call that the model made, or what came of it."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] | None = None
    role: str | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class FunctionTool(Struct, kw_only=True):
    """A function of the client's."""

    type: Annotated[
        Literal["function"], Meta(description="function; tools that a provider runs are not here")
    ]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Struct, kw_only=True):
    """This function is called."""

    type: Literal["function"]
    name: str


class TextFormat(Struct):
    """What form the text has."""

    type: Literal["text"] | None = None


class TextOutput(Struct):
    """How the text is given."""

    format: TextFormat | None = None


LOGPROBS = "message.output_text.logprobs"


class Response(Struct, kw_only=True):
    """`/v1/responses`."""

    model: NonEmpty
    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    # Answers here hold text alone: beside log-probabilities there is nothing of these to add.
    include: (
        list[
            Literal[
                "message.output_text.logprobs",
                "code_interpreter_call.outputs",
                "computer_call_output.output.image_url",
                "file_search_call.results",
                "message.input_image.image_url",
                "reasoning.encrypted_content",
                "web_search_call.action.sources",
                "web_search_call.results",
            ]
        ]
        | None
    ) = None
    text: TextOutput | None = None
    top_logprobs: int | None = None
    stream: bool | None = None


Body = TypeVar("Body", bound=Struct)


class Bodies:
    """The declared bodies with the bounds of one router's configuration."""

    def __init__(self, limits: LimitsConfig) -> None:
        self.limits = limits
        tokens = Annotated[int, Meta(ge=0, le=limits.max_tokens)] | None
        choices = Annotated[int, Meta(ge=1, le=limits.max_n)] | None
        # These cost a worker time in every step of every sequence of its batch.
        logprobs = bool | Annotated[int, Meta(le=limits.max_logprobs)] | None
        biases = Meta(max_length=limits.max_logit_bias)
        stop = Annotated[str, Meta(max_length=limits.max_stop_chars)]
        messages = Meta(min_length=1, max_length=limits.max_messages)
        common = {
            "max_tokens": tokens,
            "n": choices,
            "stop": stop | Annotated[list[stop], Meta(max_length=limits.max_stop)] | None,
            "logit_bias": Annotated[dict[str, Any], biases] | Annotated[list[Any], biases] | None,
            "top_logprobs": logprobs,
            "logprobs": logprobs,
            "prompt_logprobs": logprobs,
        }
        self.chat = _bounded(
            Chat,
            {"messages": Annotated[list[ChatMessage], messages]},
            {**common, "max_completion_tokens": tokens},
        )
        self.completion = _bounded(Completion, {}, {**common, "best_of": choices})
        self.embedding = Embedding


def _bounded(body: type[Body], needed: dict[str, Any], others: dict[str, Any]) -> type[Body]:
    """The same body with narrower types for some of its fields."""
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = [*needed.items()]
    fields += [(name, kind, None) for name, kind in others.items()]
    return defstruct(body.__name__, fields, bases=(body,), kw_only=True)  # type: ignore[return-value]
