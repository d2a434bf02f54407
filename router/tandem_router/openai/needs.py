"""What a request body asks of a model beside plain text, by the fields that ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TOOLS = ("tools", "functions")
_STRUCTURED = (
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
)
# Fields that may need something of a tier; beside them only the parts of messages do.
ASKING = frozenset({*_TOOLS, *_STRUCTURED, "response_format", "logprobs", "top_logprobs"})
_IMAGE_PARTS = frozenset({"image", "image_url", "input_image"})


def needed_features(fields: Mapping[str, Any]) -> frozenset[str]:
    """Names of the flags of `tandem_router.policy.Capabilities` that an answer to this needs."""
    needed = {"generation"}
    if any(fields.get(name) for name in _TOOLS) and fields.get("tool_choice") != "none":
        needed.add("tools")
    form = fields.get("response_format")
    if isinstance(form, dict) and form.get("type", "text") != "text":
        needed.add("structured_output")
    if any(fields.get(name) for name in _STRUCTURED):
        needed.add("structured_output")
    # Chat says true and a number apart; completions says the number, and 0 means the chosen one's.
    said = fields.get("logprobs")
    if (said is not None and said is not False) or fields.get("top_logprobs"):
        needed.add("logprobs")
    messages = fields.get("messages")
    if isinstance(messages, list) and any(map(_has_image, messages)):
        needed.add("images")
    return frozenset(needed)


def _has_image(message: Any) -> bool:
    content = message.get("content") if isinstance(message, dict) else None
    return isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type") in _IMAGE_PARTS for part in content
    )
