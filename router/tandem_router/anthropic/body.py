"""What a body of `/v1/messages` may hold, as far as it is read: declared once.

`cache_control` and whatever else is not declared passes unread: every prefix is kept as long as
there is room.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from tandem_router.openai.body import NonEmpty


class Text(Struct, tag_field="type", tag="text"):
    """What somebody says."""

    text: str


class Base64Source(Struct, tag_field="type", tag="base64"):
    """An image in the body."""

    data: str
    media_type: str


class UrlSource(Struct, tag_field="type", tag="url"):
    """An image elsewhere."""

    url: str


class Image(Struct, tag_field="type", tag="image"):
    """A picture that a user or a tool shows."""

    source: Base64Source | UrlSource


class ToolResult(Struct, tag_field="type", tag="tool_result"):
    """What a tool gave."""

    tool_use_id: str
    content: str | list[Text | Image] | None = None
    is_error: bool | None = None


class ToolUse(Struct, tag_field="type", tag="tool_use"):
    """A call of a tool by the assistant."""

    name: str
    id: str | None = None
    input: dict[str, Any] | None = None


class Thinking(Struct, tag_field="type", tag="thinking"):
    """What the assistant thought; another model is not told."""


class RedactedThinking(Struct, tag_field="type", tag="redacted_thinking"):
    """The same, unreadable."""


class User(Struct, tag_field="role", tag="user"):
    """A user's turn."""

    content: str | list[Text | Image | ToolResult]


class Assistant(Struct, tag_field="role", tag="assistant"):
    """The assistant's turn."""

    content: str | list[Text | ToolUse | Thinking | RedactedThinking]


class System(Struct, tag_field="role", tag="system"):
    """Instructions amid a conversation."""

    content: str | list[Text]


class Tool(Struct, kw_only=True):
    """A tool of the client's."""

    type: (
        Annotated[
            Literal["custom"],
            Meta(description="custom; tools that Anthropic runs are not here"),
        ]
        | None
    ) = None
    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class AutoTool(Struct, tag_field="type", tag="auto"):
    """The model chooses whether a tool is used."""

    disable_parallel_tool_use: bool = False


class AnyTool(Struct, tag_field="type", tag="any"):
    """Some tool is used."""

    disable_parallel_tool_use: bool = False


class OneTool(Struct, tag_field="type", tag="tool", kw_only=True):
    """This tool is used."""

    name: str
    disable_parallel_tool_use: bool = False


class NoTool(Struct, tag_field="type", tag="none"):
    """No tool is used."""

    disable_parallel_tool_use: bool = False


ToolChoice = AutoTool | AnyTool | OneTool | NoTool


class ThinkingMode(Struct):
    """How long the model thinks."""

    type: Annotated[
        Literal["adaptive", "disabled", "enabled"],
        Meta(description="adaptive (the model decides), disabled, or enabled with a budget"),
    ]
    budget_tokens: int | None = None


class Format(Struct):
    """What form the answer has."""

    type: Literal["json_schema"]
    schema: Any = None


class OutputConfig(Struct):
    """Form and effort of the answer."""

    format: Format | None = None
    effort: Any = None


class Metadata(Struct):
    """Who asks."""

    user_id: Any = None


class MessageTokens(Struct, kw_only=True):
    """`/v1/messages/count_tokens`, and what both have in common."""

    model: NonEmpty
    messages: Annotated[list[User | Assistant | System], Meta(min_length=1)]
    system: str | list[Text] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingMode | None = None


class Message(MessageTokens, kw_only=True):
    """`/v1/messages`."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    output_config: OutputConfig | None = None
    output_format: Format | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    metadata: Metadata | None = None
