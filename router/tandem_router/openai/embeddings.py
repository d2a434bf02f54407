"""What the router reads of a request for embeddings: its form, and how many tokens it may be.

Vectors of different models cannot be compared, so the tier of such a request is never a choice by
gain: it is named, or the only one that can (`tandem_router.routing.tier_router`).
"""

from __future__ import annotations

from typing import Any

from tandem_router.balancing.prefix_index import BYTES_PER_TOKEN
from tandem_router.config import LimitsConfig
from tandem_router.errors import bad_request
from tandem_router.openai.prompt_size import FEWEST_BYTES_PER_TOKEN

ENCODINGS = ("float", "base64")


def check_fields(fields: dict[str, Any]) -> None:
    """Raises ApiError (400) for what no embedding has."""
    if fields.get("stream"):
        raise bad_request("embeddings are not streamed", "stream")
    encoding = fields.get("encoding_format")
    if encoding is not None and encoding not in ENCODINGS:
        raise bad_request("`encoding_format` must be float or base64", "encoding_format")
    size = fields.get("dimensions")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise bad_request("`dimensions` must be a positive whole number", "dimensions")


def input_tokens(fields: dict[str, Any], limits: LimitsConfig) -> tuple[int, int, int]:
    """(expected, most, certain) tokens of the input; the last are counted, of its longest part.

    Raises ApiError (400) for an input that is none, or has too many parts.
    """
    given = fields.get("input")
    parts = [given] if isinstance(given, str) or _are_ids(given) else given
    if not isinstance(parts, list) or not parts:
        raise bad_request(
            "`input` must be a string, a list of strings, or token ids, and not empty", "input"
        )
    if len(parts) > limits.max_embedding_inputs:
        raise bad_request(
            f"`input` has {len(parts)} parts; at most {limits.max_embedding_inputs}", "input"
        )
    expected = most = certain = 0.0
    for index, part in enumerate(parts):
        if isinstance(part, str) and part:
            size = len(part.encode(errors="replace"))
            expected += max(1.0, size / BYTES_PER_TOKEN)
            most += max(1.0, size / FEWEST_BYTES_PER_TOKEN)
        elif _are_ids(part):
            expected += len(part)
            most += len(part)
            certain = max(certain, len(part))
        else:
            raise bad_request(f"`input[{index}]` must be text or token ids, and not empty", "input")
    return max(1, int(expected)), max(1, int(most) + 1), int(certain)


def _are_ids(part: Any) -> bool:
    return (
        isinstance(part, list)
        and bool(part)
        and all(isinstance(item, int) and not isinstance(item, bool) for item in part)
    )
